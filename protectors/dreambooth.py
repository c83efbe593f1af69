"""DreamBooth (Ruiz et al., CVPR 2023, https://arxiv.org/abs/2208.12242) on the surrogates of a batch's subjects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from protectors.base import Batch
from protectors.config import ProtectorConfig, require
from protectors.diffusion import DiffusionModel
from protectors.objectives import draw, draw_for, joined, latent_denoising_loss
from protectors.pgd import repaired
from protectors.randomness import normal, streams
from protectors.surrogate import SurrogateKind, Surrogates, subject_seeds

_SAMPLING_STEPS = 50
_GUIDANCE = 7.5
_STREAMS = "class images"
# How class images are drawn, for provenance. Number i of a draw has seed i of the streams.
CLASS_SAMPLER = {"sampler": "ddim", "steps": _SAMPLING_STEPS, "guidance": _GUIDANCE, "streams": _STREAMS}
_SAMPLED_TOGETHER = 8
# Prompts per model whose class images are kept: an archive can bring one caption per image. 200 class images of SD take
# 13 MB.
_KEPT = 16

Moments = tuple[Tensor, Tensor]
ClassLatents = Mapping[str, Tensor]
"""Class images by class prompt: scaled latents ``(prior_images, C, h, w)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateConfig(ProtectorConfig):
    """Fields of methods that attack surrogates which they train by DreamBooth themselves."""

    # Length of one sign step in 8-bit levels.
    step_levels: float = 1.0
    # Start at a uniform random point of the budget (True) or at the original (False).
    random_start: bool = False
    # Draws for the objective that is measured before and after; more make the facts less noisy, never the pixels.
    eval_draws: int = 8
    # "lora" trains low-rank deltas, those of all subjects of a batch at once; "full" trains all weights, one subject
    # after the other, which costs an optimizer's memory and needs a model in float32.
    surrogate: SurrogateKind = "lora"
    # Whether the attacker's text encoder is expected to be trained as well.
    train_text_encoder: bool = True
    # AdamW's. Full weights take about 1e-6; low-rank deltas need about 1000 times as much.
    learning_rate: float = 2e-3
    # Largest L2 norm of a surrogate's gradient.
    clip_norm: float = 1.0
    # Images of a subject per training step; as many class images go with them if there are any.
    train_batch: int = 1
    # Class images for prior preservation, drawn from the model once per class; 0 trains on the subject alone.
    # At 512 pixels 200 of them take longer than the protection of some images.
    prior_images: int = 0
    # Weight of the loss on class images.
    prior_weight: float = 1.0
    # What an image shows, for images that come without a prompt of their own; class images are drawn under it.
    class_prompt: str = "a photo of person"
    # The attacker's word for the subject; it goes before the last word of the prompt: "a photo of sks person".
    identifier: str = "sks"

    def check(self) -> None:
        ProtectorConfig.check(self)
        require(0 < self.step_levels <= 255, "step_levels", self.step_levels, "use more than 0 (8-bit levels)")
        require(self.eval_draws >= 1, "eval_draws", self.eval_draws, "use 1 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "use more than 0")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "use more than 0")
        require(self.train_batch >= 1, "train_batch", self.train_batch, "use 1 or more")
        require(self.prior_images >= 0, "prior_images", self.prior_images, "use 0 (no class images) or more")
        require(self.prior_weight >= 0, "prior_weight", self.prior_weight, "use 0 or more")


class DreamBooth:
    """Trains one surrogate per subject on the subject's images.

    L = L_ldm(images of the subject; "a photo of sks person") + w L_ldm(images of the class; "a photo of person"),
    equation 2 of the paper. Every subject goes through its images in its own shuffled order, which goes on from one
    block of steps to the next, so that no image is left out however short the blocks are. Original and perturbed
    images have an order each: with one for both, blocks in turn could leave the same images out of one kind for ever.

    Args:
        surrogates: one per group of the batch, in the order of ``batch.groups``.
        batch: the subjects' images, places and prompts.
        config: batch size, rate, clipping, prompts.
        class_latents: ``(prior_images, C, h, w)`` on the model's device for every class prompt of the batch; None
            trains without class images.
        one_pass: images of subject and class go through the UNet together; the rounding is another.
        shared_t: both are taken at one timestep.
    """

    def __init__(
        self,
        surrogates: Surrogates,
        batch: Batch,
        config: SurrogateConfig,
        class_latents: ClassLatents | None = None,
        *,
        one_pass: bool = False,
        shared_t: bool = False,
    ) -> None:
        self.surrogates, self.batch, self.config = surrogates, batch, config
        self._one_pass, self._shared_t = one_pass, shared_t
        self.class_prompts, self.prompts = class_prompts(batch, config), instance_prompts(batch, config)
        self._class_latents = class_latents
        subjects = range(len(batch.groups))
        self._owner_of_row = [subject for subject in subjects for _ in range(config.train_batch)]
        self._generators = streams(subject_seeds(batch), "dreambooth")
        self.original_decks, self.perturbed_decks = self._decks(batch.groups), self._decks(batch.groups)
        numbers = range(0 if class_latents is None else config.prior_images)
        self._class_decks = self._decks([numbers] * len(batch.groups))

    @property
    def model(self) -> DiffusionModel:
        return self.surrogates.model

    @cached_property
    def original_moments(self) -> Moments:
        """Of the VAE's posterior of the batch's originals, without graph."""
        with torch.no_grad():
            return self.model.encode_moments(self.batch.originals)

    def train(
        self, images: Tensor | None = None, *, steps: int, before_step: Callable[[int], None] | None = None
    ) -> None:
        """Trains on the originals, or on the images as they are now.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], in the batch's order; of one that is not finite the original is taken.
                None is the originals.
            steps: AdamW steps with new moments.
            before_step: called with each step's number from 0, before the weights change.
        """
        if steps == 0:
            return
        config = self.config
        if images is None:
            moments, decks = self.original_moments, self.original_decks
        else:
            with torch.no_grad():
                moments = self.model.encode_moments(repaired(images, self.batch.originals))
            decks = self.perturbed_decks

        def loss(step: int) -> Tensor:
            if before_step is not None:
                before_step(step)
            return self.loss(moments, decks)

        with self.surrogates.owned(self._owner_of_row):
            self.surrogates.fit(loss, steps=steps, rate=config.learning_rate, clip=config.clip_norm)

    def loss(self, moments: Moments, decks: Sequence[Deck]) -> Tensor:
        """L per surrogate ``(S,)`` at the next draws, inside ``owned`` of the rows of one pass.

        Args:
            moments: of the VAE's posterior of the batch's images.
            decks: deal places in the batch; one per subject.
        """
        rows = [decks[owner].deal() for owner in self._owner_of_row]
        generators = [self._generators[owner] for owner in self._owner_of_row]
        draws = draw(self.model, self.batch.originals, generators)
        mean, logvar = moments
        latents = self.model.latents((mean[rows], logvar[rows]), draws.posterior)
        embeddings = self.surrogates.embed([self.prompts[row] for row in rows])
        if self._class_latents is None:
            return self._per_subject(latent_denoising_loss(self.model, latents, embeddings, draws))
        classes = [self.class_prompts[row] for row in rows]
        cards = zip(classes, self._owner_of_row, strict=True)
        general = torch.stack([self._class_latents[word][self._class_decks[owner].deal()] for word, owner in cards])
        others = draw_for(self.model, general.shape[1:], generators)
        # After all draws: those that follow are the same ones whatever it weighs.
        if self.config.prior_weight == 0:
            return self._per_subject(latent_denoising_loss(self.model, latents, embeddings, draws))
        if self._shared_t:
            others = replace(others, t=draws.t)
        words = self.surrogates.embed(classes)
        if self._one_pass:
            latents, embeddings = torch.cat([latents, general]), torch.cat([embeddings, words])
            both = latent_denoising_loss(self.model, latents, embeddings, joined([draws, others]))
            loss, prior = both.chunk(2)
        else:
            loss = latent_denoising_loss(self.model, latents, embeddings, draws)
            prior = latent_denoising_loss(self.model, general, words, others)
        return self._per_subject(loss) + self.config.prior_weight * self._per_subject(prior)

    @contextmanager
    def attacked(self, places: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Within it the model takes the images at these places, each with its subject's surrogate.

        Args:
            places: in the batch, one per row; None is the whole batch.

        Yields:
            Embeddings of the images' prompts ``(B, L, D)``, without graph.
        """
        places = range(len(self.batch.seeds)) if places is None else places
        owners = self.batch.owners
        with self.surrogates.owned([owners[place] for place in places]):
            with torch.no_grad():
                embeddings = self.surrogates.embed([self.prompts[place] for place in places])
            yield embeddings

    def _decks(self, cards: Sequence[Sequence[int]]) -> list[Deck]:
        return [Deck(*pair) for pair in zip(cards, self._generators, strict=True)]

    def _per_subject(self, losses: Tensor) -> Tensor:
        return losses.view(-1, self.config.train_batch).mean(1)


class Deck:
    """Deals every card once in random order, then all of them again in a new one."""

    def __init__(self, cards: Sequence[int], generator: torch.Generator) -> None:
        self._cards, self._generator = cards, generator
        self._left: list[int] = []

    def deal(self) -> int:
        if not self._left:
            order = torch.randperm(len(self._cards), generator=self._generator)
            self._left = [self._cards[number] for number in order]
        return self._left.pop()


def class_prompts(batch: Batch, config: SurrogateConfig) -> tuple[str, ...]:
    """What each image shows."""
    return batch.prompts or (config.class_prompt,) * len(batch.seeds)


def instance_prompts(batch: Batch, config: SurrogateConfig) -> tuple[str, ...]:
    """What each image is trained and attacked under: what it shows, with the attacker's word for the subject in it."""
    return tuple(_with(config.identifier, prompt) for prompt in class_prompts(batch, config))


def _with(identifier: str, prompt: str) -> str:
    *before, last = prompt.split() or [""]
    return " ".join([*before, identifier, last]).strip()


# Drawn class images by model, prompt and number, on the CPU.
_drawn: WeakKeyDictionary[DiffusionModel, dict[tuple[str, int], Tensor]] = WeakKeyDictionary()


def class_latents(model: DiffusionModel, prompt: str, count: int) -> Tensor:
    """``draw_class_latents``, not drawn again for the last few prompts of a model; on its device."""
    known, key = _drawn.setdefault(model, {}), (prompt, count)
    # Put back at the end: the first one is the one that was not asked for the longest.
    latents = known.pop(key) if key in known else draw_class_latents(model, prompt, count).cpu()
    known[key] = latents
    if len(known) > _KEPT:
        known.pop(next(iter(known)))
    return latents.to(model.device)


@torch.no_grad()
def draw_class_latents(model: DiffusionModel, prompt: str, count: int) -> Tensor:
    """Scaled latents ``(count, C, h, w)`` of images that the model draws itself; always the same ones.

    50 DDIM steps with guidance 7.5 at the size that the model was trained at. The published way decodes them and
    encodes the picture again; here they are trained on as they are.
    """
    from diffusers import DDIMScheduler

    shape = model.latent_shape(torch.empty(1, 3, model.base_size, model.base_size, device="meta"))
    abar = model.alphas_cumprod.double().cpu()
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    scheduler = DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type=model.prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(_SAMPLING_STEPS, device=model.device)
    embeddings = torch.split(model.embed_prompts([prompt, ""]), 1)
    drawn = []
    for generators in _chunks(streams(range(count), _STREAMS)):
        latents = normal(generators, shape).to(model.device)
        for t in scheduler.timesteps:
            times = t.expand(len(latents))
            guided, free = (model.predict(latents, times, states.expand(len(times), -1, -1)) for states in embeddings)
            latents = scheduler.step(free + _GUIDANCE * (guided - free), t, latents).prev_sample
        drawn.append(latents)
    return torch.cat(drawn)


def _chunks(generators: Sequence[torch.Generator]) -> list[Sequence[torch.Generator]]:
    return [generators[low : low + _SAMPLED_TOGETHER] for low in range(0, len(generators), _SAMPLED_TOGETHER)]

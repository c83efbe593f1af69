"""Learning to protect: gradients of a protection loss along the path that a simulated attacker takes.

Section 4.3 and algorithm 1 of APDM (https://arxiv.org/abs/2511.01307).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from protectors.base import Batch
from protectors.concepts import CachedConcept, Words
from protectors.config import LATE, require
from protectors.dreambooth import Deck, DreamBooth, SurrogateConfig
from protectors.model_base import ModelProtector, ModelProtectorConfig, Study
from protectors.objectives import Draws, draw_for, joined
from protectors.randomness import integers, streams
from protectors.retention import CachedKept, Kept, cache_kept, retention_loss
from protectors.surrogate import FullSurrogate, LoraSurrogates, Surrogates

Attacker = Literal["full", "cross_attention", "lora"]
GradientPoint = Literal["after", "before", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningToProtectConfig(ModelProtectorConfig):
    """Fields of methods that simulate an attacker."""

    # His training steps in each simulated attack, and so the number of gradients in each update. 0 simulates no
    # attack: each update takes one gradient at the protected weights themselves.
    inner_steps: int = 20
    # Simulated attackers, in turn: who trains all weights, who trains keys and values of cross-attention (Custom
    # Diffusion), who adds low-rank deltas.
    attackers: tuple[Attacker, ...] = ("full",)
    # Whether he who trains all weights trains the text encoder too, as DreamBooth often does. What is protected are the
    # UNet's weights in any case.
    attacker_text_encoder: bool = field(default=False, metadata=LATE)
    # AdamW's learning rate of each of them.
    attacker_rates: tuple[float, ...] = (5e-6,)
    # Images of the subject per step of the attacker, with as many of the class; pairs in each gradient likewise.
    batch: int = 1
    # Weight of the attacker's loss on class images.
    prior_weight: float = 1.0
    # Weight of the protection's loss on class images, which keeps the class as it is.
    preservation_weight: float = 1.0
    # Gradients are taken after each step of the attacker, as algorithm 1 has it, or before it, as equation 18 does; or
    # only once, after the last one, so that he gets further in the same time.
    gradient_point: GradientPoint = "after"
    # The released code never clears the attacker's own gradient, so it is part of what the protected weights descend
    # on. For comparison only: it trains the subject in.
    compat_grad_leak: bool = False
    # Whether the gradients along one attack are summed or averaged. AdamW hardly sees the difference.
    accumulation: Literal["sum", "mean"] = field(default="sum", metadata=LATE)
    # Each attack begins with a new AdamW (and new low-rank deltas), or goes on with those of the last attack of the
    # same attacker on the same concept. Weights of the model begin at the protected ones in any case.
    inner_state_reset: Literal["fresh", "carried"] = field(default="fresh", metadata=LATE)
    # Timesteps of the attacker's images of subject and class: one each, or one for both as in APDM's released code.
    t_sharing: Literal["independent", "code"] = field(default="independent", metadata=LATE)
    # 0: every update simulates a new attack, from the protected weights. Else an attack goes on from update to update,
    # what it has changed on top of the protected weights as they are by then, until it took so many steps.
    attack_length: int = field(default=0, metadata=LATE)
    # Positives are one for each image of the subject, as in the paper, or drawn from the images of the class.
    pair_source: Literal["fresh", "class"] = field(default="fresh", metadata=LATE)
    # Share of the schedule below which pairs are not drawn. Near the noise it is decided what a picture will show, and
    # errors are so small there that draws over all of it hardly weigh them.
    pairs_from: float = field(default=0.0, metadata=LATE)
    # Weight of the protected weights' difference from the given ones in what they predict on other things (see
    # ``retention_loss``); how many pictures the model draws for it, without a prompt, where none are given; and how
    # many pictures each update takes.
    retention_weight: float = field(default=0.0, metadata=LATE)
    kept_images: int = field(default=0, metadata=LATE)
    retention_batch: int = field(default=8, metadata=LATE)
    # Share of that weight which goes by the given model's own errors: near the noise they are smallest, changes show
    # most, and a plain mean hardly sees them. 0 weighs all timesteps alike.
    retention_by_error: float = field(default=0.0, metadata=LATE)
    # These images go through the UNet together: better use of a GPU, another rounding.
    one_pass: bool = field(default=False, metadata=LATE)

    def check(self) -> None:
        ModelProtectorConfig.check(self)
        require(self.inner_steps >= 0, "inner_steps", self.inner_steps, "use 0 (no simulated attack) or more")
        require(bool(self.attackers), "attackers", self.attackers, "name at least one")
        text = not self.attacker_text_encoder or "full" in self.attackers
        require(text, "attacker_text_encoder", True, "needs the full attacker")
        fits = len(self.attacker_rates) == len(self.attackers) and all(rate >= 0 for rate in self.attacker_rates)
        require(fits, "attacker_rates", self.attacker_rates, "give each of the attackers a rate of 0 or more")
        require(self.batch >= 1, "batch", self.batch, "use 1 or more")
        for name in ("prior_weight", "preservation_weight", "retention_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "use 0 or more")
        attacked = self.inner_steps > 0
        point = self.gradient_point
        require(attacked or point == "after", "gradient_point", point, "needs inner_steps above 0")
        fresh = self.inner_state_reset == "fresh"
        require(attacked or fresh, "inner_state_reset", "carried", "needs inner_steps above 0")
        long = self.attack_length == 0 or (fresh and 0 < self.inner_steps <= self.attack_length)
        require(
            long, "attack_length", self.attack_length, "use 0, or inner_steps or more, with inner_state_reset fresh"
        )
        require(0 <= self.pairs_from < 1, "pairs_from", self.pairs_from, "use 0 or more, less than 1")
        drawn = self.kept_images >= 1 if self.retention_weight > 0 else self.kept_images == 0
        require(drawn, "kept_images", self.kept_images, "use 1 or more with a retention_weight, and 0 without")
        require(self.retention_batch >= 1, "retention_batch", self.retention_batch, "use 1 or more")
        share = self.retention_by_error
        require(0 <= share <= 1, "retention_by_error", share, "use 0 to 1")
        whole = attacked and self.attackers == ("full",)
        require(whole or not self.compat_grad_leak, "compat_grad_leak", True, "needs the full attacker alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one gradient is taken on: b positives, their b negatives, b class images, in this order.

    Shape: latents ``(3 b, C, h, w)``, embeddings ``(3 b, L, D)``, draws of as many rows. A pair shares timestep and
    noise; class images have their own. Positives and negatives go under the attacker's prompt for the subject.
    """

    latents: Tensor
    embeddings: Tensor
    """By the attacker's text encoder."""
    given: Tensor
    """Of the same prompts, by the given model's."""
    draws: Draws

    def rows(self, low: int, high: int) -> Sample:
        """The thirds from number ``low`` to before number ``high``."""
        size = len(self.latents) // 3
        part = slice(low * size, high * size)
        draws = Draws(t=self.draws.t[part], noise=self.draws.noise[part], posterior=self.draws.posterior[part])
        return Sample(latents=self.latents[part], embeddings=self.embeddings[part], given=self.given[part], draws=draws)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionLoss:
    """A loss that the protected weights descend, and its parts for the log."""

    total: Tensor
    parts: dict[str, Tensor]


ConfigT = TypeVar("ConfigT", bound=LearningToProtectConfig)


class LearningToProtect(ModelProtector[ConfigT]):
    """Base of methods that sum a loss's gradients over a simulated attack; a subclass writes ``_loss``.

    For each update: th = theta; DreamBooth steps on th; g = sum over the steps of grad L(th), first order, without
    a trace of the attacker's gradients. Concepts, then attackers, take turns.
    """

    @abstractmethod
    def _loss(self, study: Study, sample: Sample) -> ProtectionLoss:
        """At the weights that ``self.model`` holds, with a graph; the sample has the rows that ``_thirds`` names."""

    def _thirds(self) -> tuple[int, int]:
        """Which rows of a sample the loss takes, as arguments of ``Sample.rows``."""
        return 0, 3

    def _accumulate(self, study: Study, step: int, gradient: tuple[Tensor, ...]) -> dict[str, float]:
        config, seed = self.config, study.draw_seed(step)
        turn, place = divmod(step, len(study.concepts))
        concept, number = study.concepts[place], turn % len(config.attackers)
        # An attacker keeps to the words that his attack began with.
        age = turn // len(config.attackers) % self._updates
        words = _drawn_words(concept, study.draw_seed(step - age * len(config.attackers) * len(study.concepts)))
        deal = self._dealer(concept, words, seed)
        named = zip(study.named.items(), gradient, strict=True)
        weights, sums = zip(*((weight, part) for (name, weight), part in named if self._trains(name)), strict=True)
        log: dict[str, list[Tensor]] = {}

        def note(name: str, value: Tensor) -> None:
            log.setdefault(name, []).append(value.detach().mean())

        if study.kept is not None:
            # Here the copy holds the protected weights: what is kept is what they do, not what an attacker makes of it.
            with _differentiable(weights), self._autocast():
                retention = retention_loss(
                    self.model,
                    study.reference,
                    study.kept,
                    concept.class_latents,
                    words,
                    batch=config.retention_batch,
                    by_error=config.retention_by_error,
                    seed=seed,
                )
                _add(sums, torch.autograd.grad(config.retention_weight * retention, weights))
            note("retention", retention)
        with (
            self._attacker(study, config.attackers[number], seed) as attacker,
            self._carried(study, f"{place}/{number}/", attacker, begins=age == 0) as moments,
        ):

            def visit() -> None:
                """Adds one gradient of the protection loss at the weights as they are."""
                sample = self._as_attacked(deal(), attacker, words).rows(*self._thirds())
                with _differentiable(weights), attacker.owned([0] * len(sample.latents)):
                    with self._autocast():
                        loss = self._loss(study, sample)
                    # Not backward(): it would mix with the attacker's gradients.
                    _add(sums, torch.autograd.grad(loss.total, weights))
                for name, value in loss.parts.items():
                    note(name, value)

            school = self._school(attacker, concept, words, seed)

            def lesson(inner: int) -> Tensor:
                # `fit` asks for the loss right after the step before, so that "after" lags by one.
                if config.gradient_point == "before" or (config.gradient_point == "after" and inner > 0):
                    visit()
                with self._autocast():
                    loss = school.loss(concept.moments, school.original_decks)
                note("personalization", loss)
                if config.compat_grad_leak:
                    _add(sums, torch.autograd.grad(loss.sum(), weights, retain_graph=True))
                return loss

            kinds = 2 if config.one_pass and config.prior_weight > 0 else 1
            with attacker.owned([0] * (kinds * config.batch)):
                rate = config.attacker_rates[number]
                attacker.fit(lesson, steps=config.inner_steps, rate=rate, moments=moments)
            if config.gradient_point != "before":
                visit()
        if config.accumulation == "mean":
            for part in sums:
                part.div_(1 if config.gradient_point == "last" else max(1, config.inner_steps))
        return {name: float(torch.stack(values).mean()) for name, values in log.items()}

    def _attacker(self, study: Study, kind: Attacker, seed: int) -> AbstractContextManager[Surrogates]:
        if kind == "lora":
            return LoraSurrogates(self.model, [seed])
        if kind == "full" and self.config.attacker_text_encoder:
            return FullSurrogate(self.model, train_text_encoder=True)
        # Not entered: the frame puts the weights back, once.
        return nullcontext(study.copy if kind == "full" else _KeysAndValues(self.model))

    @torch.no_grad()
    def _as_attacked(self, sample: Sample, attacker: Surrogates, words: Words) -> Sample:
        """The sample under the prompts as his text encoder has them by now."""
        if not attacker.trains_text:
            return sample
        instance, general = attacker.embed([words.instance, words.general])
        return replace(
            sample, embeddings=torch.stack([*[instance] * 2 * self.config.batch, *[general] * self.config.batch])
        )

    @property
    def _updates(self) -> int:
        """How many updates one attack lasts."""
        return max(1, math.ceil(self.config.attack_length / max(1, self.config.inner_steps)))

    def _keeps(self, kept: Kept | None) -> CachedKept | None:
        if self.config.retention_weight == 0:
            return ModelProtector._keeps(self, kept)
        return cache_kept(self.model, kept, drawn=self.config.kept_images)

    @contextmanager
    def _carried(
        self, study: Study, owner: str, attacker: Surrogates, *, begins: bool
    ) -> Iterator[dict[str, Tensor] | None]:
        """Within it the attacker has what was his own after his last steps, and AdamW's moments of then."""
        goes_on = self.config.attack_length > 0
        if not goes_on and self.config.inner_state_reset == "fresh":
            yield None
            return
        names = [name for name in study.memory if name.startswith(owner)]
        if goes_on and begins:
            for name in names:
                del study.memory[name]
            names = []
        kept = {name.removeprefix(owner): study.memory[name] for name in names}
        # What he has changed: low-rank deltas begin at nothing, weights of the model at the protected ones.
        adapter = isinstance(attacker, LoraSurrogates)
        changed = attacker.parameters if adapter or goes_on else []
        starts = [torch.zeros_like(weight) if adapter else weight.clone() for weight in changed]
        if kept:
            for number, (weight, start) in enumerate(zip(changed, starts, strict=True)):
                weight.copy_(start + kept[f"delta/{number}"].to(weight.device))
        yield kept
        pairs = enumerate(zip(changed, starts, strict=True))
        kept |= {f"delta/{number}": weight - start for number, (weight, start) in pairs}
        study.memory.update({owner + name: value for name, value in kept.items()})

    def _school(self, attacker: Surrogates, concept: CachedConcept, words: Words, seed: int) -> DreamBooth:
        size = len(concept.images)
        # The places of one group and a seed for all of them: the draws follow from this update alone.
        batch = Batch(
            originals=concept.images,
            seeds=(seed,) * size,
            prompts=(words.general,) * size,
            groups=(tuple(range(size)),),
        )
        config = SurrogateConfig(
            train_batch=self.config.batch,
            prior_images=len(concept.class_latents),
            prior_weight=self.config.prior_weight,
        )
        school = DreamBooth(
            attacker,
            batch,
            config,
            {words.general: concept.class_latents},
            one_pass=self.config.one_pass,
            shared_t=self.config.t_sharing == "code",
        )
        # DreamBooth would put its word before the last word of the prompt; templates say where it goes.
        school.prompts = (words.instance,) * size
        return school

    def _dealer(self, concept: CachedConcept, words: Words, seed: int) -> Callable[[], Sample]:
        """Deals samples with draws that the attacker's have nothing to do with."""
        model, size = self.model, self.config.batch
        (generator,) = streams([seed], "protection")
        generators = [generator] * size
        pairs = Deck(range(len(concept.images)), generator)
        numbers = Deck(range(len(concept.class_latents)), generator)
        mean, logvar = concept.moments
        shape, steps = mean.shape[1:], model.schedule.timesteps
        noisy = (int(self.config.pairs_from * steps), steps - 1)
        embeddings = model.embed_prompts([words.instance] * (2 * size) + [words.general] * size)

        drawn = Deck(range(len(concept.class_latents)), generator)

        def positives(places: list[int]) -> Tensor:
            if self.config.pair_source == "fresh":
                return concept.positives[[place % len(concept.positives) for place in places]]
            return concept.class_latents[[drawn.deal() for _ in places]]

        def deal() -> Sample:
            places = [pairs.deal() for _ in range(size)]
            classes = [numbers.deal() for _ in range(size)]
            pair = draw_for(model, shape, generators, t_range=noisy)
            other = draw_for(model, shape, generators)
            negatives = model.latents((mean[places], logvar[places]), pair.posterior)
            return Sample(
                latents=torch.cat([positives(places), negatives, concept.class_latents[classes]]),
                embeddings=embeddings,
                given=embeddings,
                draws=joined([pair, pair, other]),
            )

        return deal

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.bf16)


class _KeysAndValues(FullSurrogate):
    """Trains keys and values of cross-attention alone."""

    @property
    def parameters(self) -> list[Tensor]:
        named = self.model.unet.named_parameters()
        return [weight for name, weight in named if "attn2.to_k." in name or "attn2.to_v." in name]


def _drawn_words(concept: CachedConcept, seed: int) -> Words:
    return concept.words[int(integers(streams([seed], "words"), 0, len(concept.words)))]


def _add(sums: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    for total, part in zip(sums, parts, strict=True):
        total.add_(part)


@contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    """Within it the weights take gradients; afterwards those that did before."""
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.requires_grad_(flag)

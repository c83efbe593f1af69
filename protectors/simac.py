"""SimAC (Wang et al., CVPR 2024, https://arxiv.org/abs/2312.07865)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from protectors.aspl import ASPLConfig, alternate
from protectors.base import Batch
from protectors.config import require
from protectors.dreambooth import DreamBooth, Moments, instance_prompts
from protectors.objectives import Draws, denoising_loss, draw, latent_denoising_loss
from protectors.pgd import PgdPlan, pgd
from protectors.randomness import integers, streams
from protectors.subject import SubjectProtector

# Timesteps that are tried in a round of the selection, and how many on either side of the worst are struck off.
_TRIED = 5
_REACH = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SimACConfig(ASPLConfig):
    """Fields of ``ASPLConfig``, the selection of timesteps and the loss on features."""

    # Most rounds of the selection, each six gradients of one image; 0 keeps every timestep.
    selection_rounds: int = 50
    # The selection ends when no more timesteps than this are left.
    kept_timesteps: int = 100
    # Weight of the loss on features; 0 takes the denoising loss alone and saves the reference's pass.
    feature_weight: float = 1.0
    # What the features are driven away from: those of the clean image, or of the image at the start of the round.
    reference: Literal["clean", "previous"] = "clean"

    def check(self) -> None:
        ASPLConfig.check(self)
        require(self.selection_rounds >= 0, "selection_rounds", self.selection_rounds, "use 0 (off) or more")
        # One round more must leave something.
        require(self.kept_timesteps >= 2 * _REACH, "kept_timesteps", self.kept_timesteps, f"use {2 * _REACH} or more")
        require(self.feature_weight >= 0, "feature_weight", self.feature_weight, "use 0 (off) or more")


class SimAC(SubjectProtector[SimACConfig]):
    """ASPL at timesteps whose gradients are large, with a second loss on the UNet's late features.

    "SimAC: A Simple Anti-Customization Method for Protecting Face Privacy against Text-to-Image Synthesis of
    Diffusion Models", https://arxiv.org/abs/2312.07865. First every image gets its own timesteps: of five that are
    tried, those around the one with the smallest sum ``|grad_x L_ldm|`` are struck off. Then the turns of ASPL, with
    J = L_ldm + w L_feat, maximised; L_feat = mean (f(z_t(x)) - f(z_t(reference)))^2 over the outputs f of the ResNet
    blocks in the UNet's last decoder block, with the same noise and t for both.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``SimACConfig``. The published 16/255 and 0.005 are on [-1, 1]: 8 and 0.6375 levels (times 127.5).
        model: ``DiffusionModel``.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is the mean of J of the untrained model, with the clean image as reference,
        over ``eval_draws`` fixed draws at all timesteps.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``DiffusionModel``, or not in float32 for
        a full surrogate.

    Cost: per step one encoder and one UNet pass, forward and backward, and one forward UNet pass for the reference;
        training and memory as in ASPL; before it up to ``selection_rounds`` times six gradients per image.

    Differs from the paper: as ``ASPL``; timesteps are selected with the untrained model. The public code adds L_feat
        without its gradient and takes the image at the start of the round as reference; here the gradient counts and
        the reference is the clean image. Images with more than ``kept_timesteps`` left keep those.
    """

    name = "simac"
    version = "1"
    config_type = SimACConfig
    presets: ClassVar[Mapping[str, SimACConfig]] = {
        "paper": SimACConfig(
            eps_levels=8.0,
            step_levels=0.6375,
            surrogate="full",
            learning_rate=5e-7,
            prior_images=200,
        ),
        "fast": SimACConfig(rounds=5, selection_rounds=4),
        "strong": SimACConfig(eps_levels=16.0, step_levels=0.5, prior_images=50),
    }

    @property
    def steps(self) -> int:
        return self.config.rounds * self.config.pgd_steps

    def _attack(self, school: DreamBooth, tick: Callable[[], None]) -> Tensor:
        batch = school.batch
        timesteps = [self._select(school, place) for place in range(len(batch.seeds))]
        generators = streams(batch.seeds, "simac/attack")

        def climb(images: Tensor) -> Tensor:
            if self.config.reference == "clean":
                reference = school.original_moments
            else:
                with torch.no_grad():
                    reference = self.model.encode_moments(images)

            def loss(images: Tensor, embeddings: Tensor) -> Tensor:
                t = _one_of_each(timesteps, generators).to(self.model.device)
                draws = replace(draw(self.model, images, generators), t=t)
                return self._gain(self.model.encode_moments(images), reference, embeddings, draws)

            return self._climb(school, images, loss, tick, steps=self.config.pgd_steps)

        return alternate(school, self._start(batch), climb, self.config)

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        generators = streams(batch.seeds, "simac/evaluation")
        embeddings = self.model.embed_prompts(instance_prompts(batch, self.config))
        moments, reference = self.model.encode_moments(images), self.model.encode_moments(batch.originals)
        draws = [draw(self.model, images, generators) for _ in range(self.config.eval_draws)]
        return torch.stack([self._gain(moments, reference, embeddings, each) for each in draws]).mean(0)

    def _gain(self, moments: Moments, reference: Moments, embeddings: Tensor, draws: Draws) -> Tensor:
        """J per image ``(B,)``; no gradient goes to the reference."""
        model = self.model
        latents = model.latents(moments, draws.posterior)
        if self.config.feature_weight == 0:
            return latent_denoising_loss(model, latents, embeddings, draws)
        with late_features(model.unet) as features:
            loss = latent_denoising_loss(model, latents, embeddings, draws)
        with torch.no_grad(), late_features(model.unet) as expected:
            noisy = model.add_noise(model.latents(reference, draws.posterior), draws.noise, draws.t)
            model.predict(noisy, draws.t, embeddings)
        layers = [(own - other).square().flatten(1).mean(1) for own, other in zip(features, expected, strict=True)]
        return loss + self.config.feature_weight * torch.stack(layers).mean(0)

    def _select(self, school: DreamBooth, place: int) -> Tensor:
        """The timesteps ``(N,)`` that one image keeps. What happens to its pixels on the way is forgotten."""
        batch, config, model = school.batch, self.config, self.model
        original = batch.originals[[place]]
        masks = None if batch.masks is None else batch.masks[[place]]
        plan = PgdPlan(eps_levels=config.eps_levels, step_levels=config.step_levels, steps=1, ascend=True)
        (generator,) = streams([batch.seeds[place]], "simac/selection")

        def loss(images: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
            draws = replace(draw(model, images, [generator] * len(t)), t=t.to(model.device))
            return denoising_loss(model, images, embeddings, draws)

        def score(image: Tensor, t: Tensor) -> Tensor:
            images = image.repeat(len(t), 1, 1, 1).requires_grad_()
            with school.attacked([place] * len(t)) as embeddings:
                (gradient,) = torch.autograd.grad(loss(images, t, embeddings).sum(), images)
            return gradient.abs().flatten(1).sum(1).cpu()

        def ascend(image: Tensor, t: Tensor) -> Tensor:
            with school.attacked([place]) as embeddings:
                start = image - original
                return pgd(lambda x, _: loss(x, t, embeddings), original, plan, start=start, masks=masks)

        image, allowed = original, torch.ones(model.schedule.timesteps, dtype=torch.bool)
        for _ in range(config.selection_rounds):
            left = allowed.nonzero().flatten()
            if len(left) <= config.kept_timesteps:
                break
            tried = left[torch.randperm(len(left), generator=generator)[:_TRIED]]
            scores = score(image, tried)
            worst = min(max(int(tried[scores.argmin()]), _REACH), len(allowed) - _REACH)
            allowed[worst - _REACH : worst + _REACH] = False
            image = ascend(image, tried[[int(scores.argmax())]])
        return allowed.nonzero().flatten()


@contextmanager
def late_features(unet: Any) -> Iterator[list[Tensor]]:
    """Records what the ResNet blocks of the last decoder block put out, in order, for passes within the context."""
    outputs: list[Tensor] = []

    def record(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output.float())

    handles = [block.register_forward_hook(record) for block in unet.up_blocks[-1].resnets]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _one_of_each(timesteps: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Tensor:
    """A uniform draw ``(B,)`` from every image's own timesteps."""
    pairs = zip(timesteps, generators, strict=True)
    return torch.cat([own[integers([generator], 0, len(own))] for own, generator in pairs])

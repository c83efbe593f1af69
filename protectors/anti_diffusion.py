"""Anti-Diffusion (Zheng et al., AAAI 2025, https://arxiv.org/abs/2503.05595)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from protectors.attention import cross_attention_layers, recorded
from protectors.base import Batch, ImageProtector
from protectors.config import ProtectorConfig, require
from protectors.diffusion import DiffusionModel
from protectors.model_files import ModelError
from protectors.objectives import Draws, draw_for, latent_denoising_loss
from protectors.pgd import PgdPlan, Progress, pgd, repaired
from protectors.prompt_tuning import tune_prompts
from protectors.randomness import streams
from protectors.surrogate import SurrogateKind, Tick, check_surrogate, make_surrogates, perturb_parts, subject_seeds

Stage = Literal["prompt", "image", "weights"]
Heads = Literal["all", "second_half"]
Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AntiDiffusionConfig(ProtectorConfig):
    """Three stages per epoch, their lengths and rates, and the semantic disturbance loss. Defaults as published."""

    # Rounds of prompt tuning, adversarial noise and UNet update.
    epochs: int = 6
    # AdamW steps on the prompt embedding per epoch, and their rate; 0 steps keep the empty prompt.
    pt_steps: int = 30
    pt_rate: float = 1e-3
    # Sign steps on the image per epoch. epochs * pgd_steps * step_levels below eps_levels never uses up the budget.
    pgd_steps: int = 10
    # Length of one sign step in 8-bit levels: 2e-3 on [-1, 1].
    step_levels: float = 0.255
    # AdamW steps on the surrogate per epoch, and their rate; 0 steps keep the pretrained weights. Low-rank deltas
    # start from nothing and need about 1000 times the rate of full weights.
    unet_steps: int = 20
    unet_rate: float = 5e-7
    # Largest L2 norm of a surrogate's gradient; null leaves it.
    grad_clip: float | None = None
    # What the UNet stage trains: all weights, one subject at a time, or low-rank deltas of all subjects at once.
    surrogate: SurrogateKind = "full"
    # One surrogate per image, or one for all images of a subject.
    share: Literal["image", "group"] = "image"
    # "paper" is Figure 2; the public code swaps noise and prompt from the second epoch on.
    order: Literal["paper", "code"] = "paper"
    # What prompt tuning aims at: what the model predicts, or always the noise. They differ for v-prediction only.
    pt_target: Literal["model", "eps"] = "model"
    # A new sample of the posterior at every step of prompt tuning, or one for all of them.
    pt_resample: bool = False
    # Weight of the semantic disturbance loss; 0 takes the denoising loss alone and records no attention.
    lambda_sdl: float = 1.0
    # "clamp" squares attention times sdl_scale, cut at 1; "square" squares attention in units of its mean. Their
    # best points are opposite: attention on one token, and attention spread evenly.
    sdl_variant: Literal["clamp", "square"] = "clamp"
    # 100 is 1.3 times the number of tokens (77): attention above 0.77 of its mean is not pushed.
    sdl_scale: float = 100.0
    # Which heads are averaged; the public code drops the first half.
    heads: Heads = "all"
    # Layers by how much smaller their grid is than that of the latents; null takes the coarsest that there are
    # outside the middle block: 4 in Stable Diffusion 1 and 2, as published, and 2 in nano-sd.
    attn_factor: int | None = None
    # Layers with the square of this many queries instead, as in the public code (16). Sizes without any are refused.
    attn_abs: int | None = None
    # Draws of (timestep, noise, posterior) per sign step. Time grows in proportion, but for the encoder.
    n_eot: int = 1
    # First and last timestep that are drawn, in all stages.
    t_range: tuple[int, int] = (0, 999)
    # Latents are samples of the VAE's posterior, or its mean.
    latent_mode: Literal["sample", "mode"] = "sample"
    # Draws for the objective that is measured before and after; more make the facts less noisy, never the pixels.
    eval_draws: int = 8

    def check(self) -> None:
        ProtectorConfig.check(self)
        for field in ("epochs", "pgd_steps", "n_eot", "eval_draws"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "use 1 or more")
        for field in ("pt_steps", "unet_steps", "lambda_sdl"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "use 0 or more")
        for field in ("step_levels", "pt_rate", "unet_rate", "sdl_scale"):
            require(getattr(self, field) > 0, field, getattr(self, field), "use more than 0")
        for field in ("grad_clip", "attn_factor", "attn_abs"):
            value = getattr(self, field)
            require(value is None or value > 0, field, value, "use more than 0, or null")
        both = self.attn_factor is not None and self.attn_abs is not None
        require(not both, "attn_abs", self.attn_abs, "choose layers by attn_factor or by attn_abs, not by both")
        ordered = len(self.t_range) == 2 and 0 <= self.t_range[0] <= self.t_range[-1]
        require(ordered, "t_range", self.t_range, "use first and last timestep, from 0 on")


class AntiDiffusion(ImageProtector[AntiDiffusionConfig, DiffusionModel]):
    """Raises the denoising loss under the prompt that fits the image best, and drains its cross-attention.

    "Anti-Diffusion: Preventing Abuse of Modifications of Diffusion-Based Models", https://arxiv.org/abs/2503.05595,
    Figure 2 and Equation 1. Every epoch fits a prompt embedding f to the image (descends in L_dn), moves the image
    (ascends in J = L_dn + lambda L_sdl) and trains the UNet on the image (descends in L_dn). L_dn = mean
    (eps_theta(z_t, t, f) - target)^2; L_sdl = -mean clamp(100 A, 0, 1)^2, with A the cross-attention averaged over
    the heads and layers of one level.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``AntiDiffusionConfig``. Numbers are those of the authors' code, the paper's are not known to us: a
            step of 2e-3 on [-1, 1] is 0.255 levels (times 127.5). Its budget of 5e-2 (6.375 levels) is taken anew
            around the image in every epoch, so that it amounts to 15.3 levels; that of its demonstration, 1e-2,
            to 7.65. "paper" is 7, the largest whole level in the latter's reach.
        model: ``DiffusionModel``; in float32 if the surrogate is "full".

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is J under the pretrained UNet and the empty prompt, over ``eval_draws``
        fixed draws. Prompts are ignored.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``DiffusionModel``, has no cross-attention
        where the configuration looks for it, has fewer timesteps, or is not in float32 for a full surrogate.

    Cost: published, 340 UNet passes forward and backward, 100 of them with weight gradients, and 60 of the encoder.
        The full surrogate takes one subject at a time, and memory for four copies of the UNet on the device (weights,
        gradients, two moments) and one beside it.

    Differs from the paper: fixed ball around the original; v-prediction models use v as target in all stages;
        "fast" and "strong" train low-rank deltas. Not offered: the public code's re-centred ball (it is a larger
        budget by another name) and its weight gradients that leak from one stage into another; moments of AdamW that
        live on from one stage to the next (reset_adam); transforms of the image in the loop (transform_eot).
    """

    name = "anti_diffusion"
    version = "1"
    config_type = AntiDiffusionConfig
    model_type = DiffusionModel
    presets: ClassVar[Mapping[str, AntiDiffusionConfig]] = {
        "paper": AntiDiffusionConfig(eps_levels=7.0, attn_factor=4),
        "fast": AntiDiffusionConfig(
            eps_levels=8.0,
            epochs=4,
            pt_steps=10,
            pt_rate=1e-2,
            step_levels=1.0,
            unet_steps=5,
            unet_rate=1e-3,
            surrogate="lora",
        ),
        "strong": AntiDiffusionConfig(
            eps_levels=16.0, epochs=10, pgd_steps=20, step_levels=0.5, unet_rate=5e-4, surrogate="lora", n_eot=2
        ),
    }

    def __init__(self, config: AntiDiffusionConfig, model: DiffusionModel) -> None:
        super().__init__(config, model)
        check_surrogate(config.surrogate, model)
        if config.t_range[1] >= model.schedule.timesteps:
            raise ModelError(f"t_range={config.t_range}: the model has {model.schedule.timesteps} timesteps")
        if config.lambda_sdl > 0 and config.attn_abs is None:
            self._layers_at(config.attn_factor)

    @property
    def steps(self) -> int:
        """Of all three kinds together."""
        return sum(self._lengths[stage] for stage in self._stages)

    @property
    def _lengths(self) -> dict[Stage, int]:
        return {"prompt": self.config.pt_steps, "image": self.config.pgd_steps, "weights": self.config.unet_steps}

    @property
    def _stages(self) -> list[Stage]:
        stages: list[Stage] = []
        for epoch in range(self.config.epochs):
            swapped = self.config.order == "code" and epoch > 0
            stages += ["image", "prompt", "weights"] if swapped else ["prompt", "image", "weights"]
        # What comes after the last change of the image is of no use to it.
        while stages[-1] != "image":
            stages.pop()
        return stages

    def _perturb(self, batch: Batch, progress: Progress | None) -> Tensor:
        if self.config.share == "image":
            batch = replace(batch, groups=tuple((place,) for place in range(len(batch.seeds))))
        return perturb_parts(self._alternate, batch, self.config.surrogate, self.steps, progress)

    def _alternate(self, batch: Batch, tick: Tick) -> Tensor:
        """The stages in their order, for images whose surrogates are trained side by side."""
        config, images = self.config, batch.originals
        generators = streams(batch.seeds, "anti_diffusion/attack")
        embeddings, moments = self._empty_prompts(batch), self._moments(images)
        surrogates = make_surrogates(config.surrogate, self.model, subject_seeds(batch))
        with surrogates, surrogates.owned(batch.owners):
            for stage in self._stages:
                if stage == "prompt":
                    embeddings = self._tune(embeddings, moments, generators, tick)
                elif stage == "image":
                    images = self._climb(images, embeddings, generators, batch=batch, tick=tick)
                    moments = self._moments(repaired(images, batch.originals))
                else:
                    losses = self._lesson(batch.groups, embeddings, moments, generators, tick)
                    surrogates.fit(losses, steps=config.unet_steps, rate=config.unet_rate, clip=config.grad_clip)
        return images

    def _tune(
        self,
        embeddings: Tensor,
        moments: Moments,
        generators: Sequence[torch.Generator],
        tick: Tick,
    ) -> Tensor:
        """The prompts that the model denoises these images best with."""
        kept = self._latents(moments, self._draw(moments, generators))

        def loss(prompts: Tensor, step: int) -> Tensor:
            tick()
            draws = self._draw(moments, generators)
            latents = self._latents(moments, draws) if self.config.pt_resample else kept
            target = draws.noise if self.config.pt_target == "eps" else None
            return latent_denoising_loss(self.model, latents, prompts, draws, target=target)

        return tune_prompts(loss, embeddings, steps=self.config.pt_steps, rate=self.config.pt_rate)

    def _climb(
        self,
        images: Tensor,
        embeddings: Tensor,
        generators: Sequence[torch.Generator],
        *,
        batch: Batch,
        tick: Tick,
    ) -> Tensor:
        """Sign steps up J, in the ball around the originals."""

        def gain(images: Tensor, _: list[int]) -> Tensor:
            moments = self.model.encode_moments(images)
            draws = [self._draw(moments, generators) for _ in range(self.config.n_eot)]
            return torch.stack([self._gain(moments, embeddings, each) for each in draws]).mean(0)

        plan = PgdPlan(
            eps_levels=self.config.eps_levels,
            step_levels=self.config.step_levels,
            steps=self.config.pgd_steps,
            ascend=True,
        )
        start = images - batch.originals
        return pgd(gain, batch.originals, plan, start=start, masks=batch.masks, progress=lambda *_: tick())

    def _lesson(
        self,
        groups: Sequence[Sequence[int]],
        embeddings: Tensor,
        moments: Moments,
        generators: Sequence[torch.Generator],
        tick: Tick,
    ) -> Callable[[int], Tensor]:
        """What the surrogates learn: to denoise their own images."""

        def losses(step: int) -> Tensor:
            tick()
            draws = self._draw(moments, generators)
            loss = latent_denoising_loss(self.model, self._latents(moments, draws), embeddings, draws)
            return torch.stack([loss[list(group)].mean() for group in groups])

        return losses

    def _gain(self, moments: Moments, embeddings: Tensor, draws: Draws) -> Tensor:
        """J per image ``(B,)``."""
        latents = self._latents(moments, draws)
        if self.config.lambda_sdl == 0:
            return latent_denoising_loss(self.model, latents, embeddings, draws)
        with recorded(self._layers(latents)) as maps:
            loss = latent_denoising_loss(self.model, latents, embeddings, draws)
        attention = mean_attention(maps, self.config.heads)
        scale = self.config.sdl_scale if self.config.sdl_variant == "clamp" else None
        return loss + self.config.lambda_sdl * semantic_disturbance(attention, scale)

    def _layers(self, latents: Tensor) -> list[Any]:
        """Where attention is recorded for latents of this size."""
        if self.config.attn_abs is None:
            return self._layers_at(self.config.attn_factor)
        elements = latents[0, 0].numel()
        factor = math.isqrt(elements) // self.config.attn_abs
        fits = elements == (factor * self.config.attn_abs) ** 2
        return self._layers_at(factor if fits else 0, f" on latents of {latents.shape[-2]} x {latents.shape[-1]}")

    def _layers_at(self, factor: int | None, size: str = "") -> list[Any]:
        """Layers whose grid is so much smaller than that of the latents; None takes the coarsest."""
        levels = cross_attention_layers(self.model.unet)
        factor = max(levels, default=0) if factor is None else factor
        if factor not in levels:
            raise ModelError(
                f"no cross-attention for attn_factor={self.config.attn_factor}, attn_abs={self.config.attn_abs}{size}; "
                f"choose attn_factor from {sorted(levels)}"
            )
        return levels[factor]

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        generators = streams(batch.seeds, "anti_diffusion/evaluation")
        embeddings, moments = self._empty_prompts(batch), self._moments(images)
        draws = [self._draw(moments, generators) for _ in range(self.config.eval_draws)]
        return torch.stack([self._gain(moments, embeddings, each) for each in draws]).mean(0)

    @torch.no_grad()
    def _moments(self, images: Tensor) -> Moments:
        return self.model.encode_moments(images)

    def _latents(self, moments: Moments, draws: Draws) -> Tensor:
        sampled = self.config.latent_mode == "sample"
        return self.model.latents(moments, draws.posterior if sampled else torch.zeros_like(draws.posterior))

    def _draw(self, moments: Moments, generators: Sequence[torch.Generator]) -> Draws:
        return draw_for(self.model, moments[0].shape[1:], generators, t_range=self.config.t_range)

    def _empty_prompts(self, batch: Batch) -> Tensor:
        return self.model.embed_prompts([""] * len(batch.seeds))


def mean_attention(maps: Sequence[Tensor], heads: Heads) -> Tensor:
    """Average over layers and heads: maps ``(B, heads, queries, tokens)`` of one level -> ``(B, queries, tokens)``."""
    first = [layer.shape[1] // 2 if heads == "second_half" else 0 for layer in maps]
    return torch.cat([layer[:, skipped:] for skipped, layer in zip(first, maps, strict=True)], dim=1).mean(1)


def semantic_disturbance(attention: Tensor, scale: float | None) -> Tensor:
    """L_sdl per image ``(B,)``, to be ascended: minus the mean square of the attention.

    Args:
        attention: ``(B, queries, tokens)``, rows sum to 1.
        scale: attention times this is cut at 1; None takes the number of tokens and does not cut.
    """
    loud = attention * attention.shape[-1] if scale is None else (attention * scale).clamp(0, 1)
    return -loud.square().flatten(1).mean(1)

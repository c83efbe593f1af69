"""Purifiers that end in a latent upscaler: noisy upscaling and PDM-Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.scale import Box, tile_boxes
from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.padding import pad_to_multiple
from pipeline.verify.purifiers.base import Purifier
from pipeline.verify.purifiers.geometry import resize, shrink_to
from protectors.randomness import normal

# Of the x4 upscaler, whose latents are as large as the small image.
SCALE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Upscaling:
    """How a StableDiffusionUpscalePipeline is called."""

    # Noise on the small image, told to the model: 0 to 350.
    noise_level: int = 20
    steps: int = 75
    guidance: float = 9.0
    prompt: str = ""
    # Side of a tile of the small image, a multiple of the UNet's stride; memory grows with 16 times its area. Images of
    # at most two tiles' area go through at once.
    tile: int = 512


@dataclass(frozen=True, kw_only=True)
class NoisyUpscaling(Purifier):
    """Drowns the perturbation in noise and lets a x4 upscaler paint over it (noisy upscaling).

    Adversarial Perturbations Cannot Reliably Protect Artists From Generative AI, https://arxiv.org/abs/2406.12027.

    Works at: the image's own size, or a quarter of it with `quarter_first`, in overlapping tiles; the four times larger
    output is brought back to the image's size.
    """

    needs: ClassVar[ModelKind | None] = ModelKind.UPSCALER

    # Standard deviation of the noise on images in [0, 1], before the 8-bit rounding of a file.
    sigma: float = 0.1
    # Saves memory: the upscaler's output then has the image's size.
    quarter_first: bool = False
    upscaling: Upscaling = Upscaling()

    @property
    def randomised(self) -> bool:
        return True

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        pipeline = models.get(ModelKind.UPSCALER)
        height, width = images.shape[-2:]
        small = images
        if self.quarter_first:
            padded = pad_to_multiple(images, SCALE)
            height, width = padded.shape[-2:]
            small = resize(padded, height // SCALE, width // SCALE)
        noisy = (small + self.sigma * normal(generators, small.shape[1:])).clamp(0, 1)
        large = upscale(pipeline, (noisy * 255).round() / 255, generators, self.upscaling)
        return resize(large, height, width)[..., : images.shape[-2], : images.shape[-1]]


@dataclass(frozen=True, kw_only=True)
class PDMPure(Purifier):
    """A little diffusion in the pixel space of DeepFloyd IF, then a x4 upscaler (PDM-Pure).

    Pixel is a Barrier: Diffusion Models Are More Adversarially Robust Than We Think, https://arxiv.org/abs/2404.13320.

    Works at: the shorter side brought down to the cascade's side, mirrored to its stride; back to full size in the end.
    Differs from the released code: the image gets the noise of the first timestep of the loop, as diffusers has it,
    and not that of a somewhat lower one.
    """

    needs: ClassVar[ModelKind | None] = ModelKind.CASCADE

    # Timesteps of noise, of 1000, and how many of them are run, evenly spread.
    t: int = 100
    steps: int = 10
    guidance: float = 7.0
    prompt: str = "a picture"
    # Timestep of the noise on the cascade's conditioning image.
    noise_level: int = 250
    upscaling: Upscaling = Upscaling(steps=50, guidance=4.0)

    @property
    def randomised(self) -> bool:
        return True

    def missing(self, models: AttackModels) -> ModelKind | None:
        return next((kind for kind in (ModelKind.CASCADE, ModelKind.UPSCALER) if not models.has(kind)), None)

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        from diffusers import IFImg2ImgSuperResolutionPipeline
        from diffusers.models.attention_processor import AttnAddedKVProcessor2_0

        cascade, upscaler = models.get(ModelKind.CASCADE), models.get(ModelKind.UPSCALER)
        # The loader sets processors of plain attention, which would leave this UNet's keys and values of the text out.
        cascade.unet.set_attn_processor(AttnAddedKVProcessor2_0())
        small = shrink_to(images, int(cascade.unet.config.sample_size))
        padded = pad_to_multiple(small, _unet_stride(cascade)) * 2 - 1
        pipeline = IFImg2ImgSuperResolutionPipeline(
            **{**cascade.components, **_own_schedulers(cascade)}, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        clean = pipeline(
            image=padded,
            original_image=padded,
            strength=1.0,  # of the timesteps given
            timesteps=torch.linspace(self.t - 1, 0, self.steps).round().long().tolist(),
            prompt=[self.prompt] * len(images),
            guidance_scale=self.guidance,
            noise_level=self.noise_level,
            generator=list(generators),
            clean_caption=False,
            output_type="pt",
        ).images
        clean = (clean[..., : small.shape[-2], : small.shape[-1]] / 2 + 0.5).clamp(0, 1)
        return resize(upscale(upscaler, clean, generators, self.upscaling), *images.shape[-2:])


def upscale(pipeline: Any, images: Tensor, generators: Sequence[torch.Generator], settings: Upscaling) -> Tensor:
    """Four times the size, `(B, 3, 4H, 4W)` in [0, 1] on the model's device, in tiles that overlap by a quarter.

    Args:
        pipeline: StableDiffusionUpscalePipeline; neither its weights nor its schedulers change.
        images: `(B, 3, H, W)` in [0, 1], any size; mirrored to the UNet's stride.
        generators: one per image; its tiles draw from it in turn.
        settings: of the call.
    """
    from diffusers import StableDiffusionUpscalePipeline

    height, width = images.shape[-2:]
    multiple = max(pipeline.vae_scale_factor, _unet_stride(pipeline))
    padded = pad_to_multiple(images, multiple)
    levels = pipeline.config.max_noise_level
    pipeline = StableDiffusionUpscalePipeline(
        **{**pipeline.components, **_own_schedulers(pipeline)}, max_noise_level=levels
    )
    pipeline.set_progress_bar_config(disable=True)
    shape = (len(images), 3, SCALE * padded.shape[-2], SCALE * padded.shape[-1])
    total, weights = torch.zeros(shape, device=pipeline.device), torch.zeros(shape[2:], device=pipeline.device)
    for box in tile_boxes(padded.shape[-2], padded.shape[-1], settings.tile):
        large = pipeline(
            [settings.prompt] * len(images),
            image=padded[..., box.top : box.top + box.height, box.left : box.left + box.width],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            noise_level=settings.noise_level,
            generator=list(generators),
            output_type="pt",
        ).images
        weight = _weight(box).to(large)
        area = tuple(
            slice(SCALE * start, SCALE * (start + length)) for start, length in zip(box[:2], box[2:], strict=True)
        )
        total[:, :, *area] += weight * large
        weights[area] += weight
    return (total / weights)[..., : SCALE * height, : SCALE * width]


def _weight(box: Box) -> Tensor:
    """1 at the upscaled tile's border, rising to its middle, so that no seam shows."""
    rows, columns = (
        torch.minimum(torch.arange(1, SCALE * side + 1), torch.arange(SCALE * side, 0, -1))
        for side in (box.height, box.width)
    )
    return torch.minimum(rows[:, None], columns[None, :]).float()


def _own_schedulers(pipeline: Any) -> dict[str, Any]:
    """Copies of a pipeline's schedulers, by name: running a pipeline sets their timesteps."""
    from diffusers import SchedulerMixin

    return {
        name: type(part).from_config(part.config)
        for name, part in pipeline.components.items()
        if isinstance(part, SchedulerMixin)
    }


def _unet_stride(pipeline: Any) -> int:
    """What both sides of the UNet's input must be a multiple of."""
    return int(2 ** (len(pipeline.unet.config.block_out_channels) - 1))

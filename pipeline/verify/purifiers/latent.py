"""Purifiers that go through a latent diffusion model: its autoencoder alone, or with some diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.editors.base import model_stride
from pipeline.verify.editors.pipelines import check_schedule, rebuild
from pipeline.verify.padding import pad_to_multiple
from pipeline.verify.purifiers.base import Purifier


@dataclass(frozen=True, kw_only=True)
class RoundTrip(Purifier):
    """Through the VAE and back, D(mu(E(x))): the floor of every latent method.

    Works at: the image's own size, mirrored to the model's stride.
    """

    needs: ClassVar[ModelKind | None] = ModelKind.LATENT

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        pipeline = models.get(ModelKind.LATENT)
        pixels = pad_to_multiple(images, model_stride(pipeline)).to(pipeline.device) * 2 - 1
        decoded: Tensor = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
        return (decoded[..., : images.shape[-2], : images.shape[-1]] / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class LDMPure(Purifier):
    """Adds noise to the latents and lets a text-to-image model remove it (img2img, SDEdit).

    SDEdit, https://arxiv.org/abs/2108.01073, on latents, as the evaluations of image protections use it.

    Works at: the image's own size, mirrored to the model's stride.
    With an empty prompt, guidance changes nothing, since both its predictions are the same; 1.0 halves the cost.

    Raises:
        ValueError: strength is not in (0, 1], or int(strength * steps) is 0.
    """

    needs: ClassVar[ModelKind | None] = ModelKind.LATENT

    # Share of the timesteps that are noised, in (0, 1].
    strength: float
    # Of the whole schedule; int(strength * steps) of them are run.
    steps: int = 50
    guidance: float = 1.0
    prompt: str = ""

    def __post_init__(self) -> None:
        check_schedule("LDM-pure", self.steps, self.strength)

    @property
    def randomised(self) -> bool:
        return True

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        from diffusers import StableDiffusionImg2ImgPipeline

        base = models.get(ModelKind.LATENT)
        output: Tensor = rebuild(StableDiffusionImg2ImgPipeline, base)(
            [self.prompt] * len(images),
            image=pad_to_multiple(images, model_stride(base)),
            strength=self.strength,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=list(generators),
            output_type="pt",
        ).images
        return output[..., : images.shape[-2], : images.shape[-1]]

"""Inpainting: the area of a mask is painted anew under the wish, the rest is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.verify.attack_models import ModelKind
from pipeline.verify.editors.base import Edit, Editor
from pipeline.verify.editors.pipelines import check_schedule, encode, rebuild
from protectors.model_files import ModelError
from protectors.randomness import normal

_INPAINTING_CHANNELS = 9  # latents, mask, latents of the masked image: 4 + 1 + 4


@dataclass(frozen=True, kw_only=True)
class Inpaint(Editor):
    """Repaints with a model that was trained to: its UNet sees the mask and the image without the masked area.

    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., CVPR 2022,
    https://arxiv.org/abs/2112.10752), Section 4.5; steps, strength, guidance and eta as PhotoGuard attacks
    (Salman et al., ICML 2023, https://arxiv.org/abs/2302.06588). A latent is repainted where any of its pixels is.
    """

    name: ClassVar[str] = "inpaint"
    needs: ClassVar[ModelKind] = ModelKind.INPAINT
    needs_mask: ClassVar[bool] = True
    # (0, 1]; at 1 nothing of the masked area is known, below it starts from the noised image.
    strength: float = 0.7
    # Of the whole schedule; `int(strength * steps)` of them are executed.
    steps: int = 100
    # Classifier-free guidance; 1 turns it off.
    guidance: float = 7.5
    # Share of fresh noise in every step: 0 is DDIM, 1 is DDPM.
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_schedule(self.name, self.steps, self.strength)

    def _edit(self, given: Any, image: Tensor, edit: Edit, generator: torch.Generator, mask: Tensor) -> Tensor:
        from diffusers import StableDiffusionInpaintPipeline

        # With four channels diffusers would blend instead, which is a weaker attack under this one's name.
        channels = given.unet.config.in_channels
        if channels != _INPAINTING_CHANNELS:
            raise ModelError(f"the inpaint model's UNet takes {channels} channels, not {_INPAINTING_CHANNELS}")
        edited: Tensor = rebuild(StableDiffusionInpaintPipeline, given)(
            edit.target,
            image=image,
            mask_image=F.interpolate(_latent_mask(given, mask), size=mask.shape[-2:]),
            height=image.shape[-2],
            width=image.shape[-1],
            strength=self.strength,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            eta=self.eta,
            generator=generator,
            output_type="pt",
        ).images
        return edited


@dataclass(frozen=True, kw_only=True)
class BlendedInpaint(Editor):
    """Repaints with a text-to-image model: after every step the kept latents are put back at their noise level.

    Blended Latent Diffusion (Avrahami, Fried and Lischinski, SIGGRAPH 2023, https://arxiv.org/abs/2206.02779),
    Algorithm 1, without the optimization of the decoder: the kept pixels are pasted back instead. Weaker than a
    trained inpainting model, but it needs no other checkpoint than SDEdit. diffusers' inpainting pipeline does the
    like for four latent channels only; this takes any number.
    """

    name: ClassVar[str] = "inpaint-blended"
    needs_mask: ClassVar[bool] = True
    # (0, 1]; more keeps less of what the masked area showed.
    strength: float = 0.75
    # Of the whole schedule; `int(strength * steps)` of them are executed.
    steps: int = 50
    # Classifier-free guidance; 1 turns it off.
    guidance: float = 7.5

    def __post_init__(self) -> None:
        check_schedule(self.name, self.steps, self.strength)

    def _edit(self, given: Any, image: Tensor, edit: Edit, generator: torch.Generator, mask: Tensor) -> Tensor:
        from diffusers import StableDiffusionImg2ImgPipeline

        kept = encode(given, image)
        repainted = _latent_mask(given, mask).to(kept)

        def put_back(pipeline: Any, step: int, t: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
            scheduler = pipeline.scheduler
            level = t - scheduler.config.num_train_timesteps // self.steps  # of the latents after this step
            noise = normal([generator], kept.shape[1:]).to(kept)
            background = kept if level < 0 else scheduler.add_noise(kept, noise, level[None])
            return {"latents": torch.where(repainted == 1, state["latents"], background)}

        edited: Tensor = rebuild(StableDiffusionImg2ImgPipeline, given)(
            edit.target,
            image=image,
            strength=self.strength,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=generator,
            callback_on_step_end=put_back,
            output_type="pt",
        ).images
        return edited


def _latent_mask(given: Any, mask: Tensor) -> Tensor:
    """`(1, 1, h, w)`: 1 for the latents of which any pixel is repainted, so that no thin stroke gets lost."""
    return F.max_pool2d(mask, given.vae_scale_factor)

"""SDEdit, also known as img2img: noise the image part of the way, denoise it under the wish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.verify.editors.base import Edit, Editor
from pipeline.verify.editors.pipelines import check_schedule, rebuild


@dataclass(frozen=True, kw_only=True)
class SDEdit(Editor):
    """Noises the latents up to `strength * T` and denoises them with the target prompt.

    SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations (Meng et al., ICLR 2022,
    https://arxiv.org/abs/2108.01073), Algorithm 1, in the latent space and with DDIM steps. The random draws are
    the latents and the noise.
    """

    name: ClassVar[str] = "sdedit"
    # Share of the noise levels, (0, 1]; more keeps less of the image.
    strength: float = 0.5
    # Of the whole schedule; `int(strength * steps)` of them are executed.
    steps: int = 50
    # Classifier-free guidance; 1 turns it off.
    guidance: float = 7.5

    def __post_init__(self) -> None:
        check_schedule(self.name, self.steps, self.strength)

    def _edit(self, given: Any, image: Tensor, edit: Edit, generator: torch.Generator, mask: Tensor) -> Tensor:
        from diffusers import StableDiffusionImg2ImgPipeline

        edited: Tensor = rebuild(StableDiffusionImg2ImgPipeline, given)(
            edit.target,
            image=image,
            strength=self.strength,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=generator,
            output_type="pt",
        ).images
        return edited

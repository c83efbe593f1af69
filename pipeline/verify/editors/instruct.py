"""InstructPix2Pix: a model that was trained to follow an instruction about an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.verify.attack_models import ModelKind
from pipeline.verify.editors.base import Edit, Editor
from pipeline.verify.editors.pipelines import check_schedule, rebuild


@dataclass(frozen=True, kw_only=True)
class InstructPix2Pix(Editor):
    """Starts from noise; the image enters as further latent channels, the wish as an instruction.

    InstructPix2Pix: Learning to Follow Image Editing Instructions (Brooks, Holynski and Efros, CVPR 2023,
    https://arxiv.org/abs/2211.09800), Section 3.2.1. The checkpoint's own scheduler is used, in a copy.
    """

    name: ClassVar[str] = "instruct-pix2pix"
    needs: ClassVar[ModelKind] = ModelKind.INSTRUCT
    steps: int = 100
    # Of the instruction; 1 turns both kinds of guidance off.
    guidance: float = 7.5
    # Of the image, at least 1; more keeps more of it.
    image_guidance: float = 1.5

    def __post_init__(self) -> None:
        check_schedule(self.name, self.steps)
        if self.image_guidance < 1:
            raise ValueError(f"{self.name}: image_guidance is {self.image_guidance}; choose at least 1")

    def _edit(self, given: Any, image: Tensor, edit: Edit, generator: torch.Generator, mask: Tensor) -> Tensor:
        from diffusers import StableDiffusionInstructPix2PixPipeline

        scheduler = type(given.scheduler).from_config(given.scheduler.config)
        edited: Tensor = rebuild(StableDiffusionInstructPix2PixPipeline, given, scheduler=scheduler)(
            edit.target,
            image=image,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            image_guidance_scale=self.image_guidance,
            generator=generator,
            output_type="pt",
        ).images
        return edited

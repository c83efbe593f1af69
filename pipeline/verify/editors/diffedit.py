"""DiffEdit: where two prompts disagree is where the image is edited; no mask is given."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.verify.editors.base import Edit, Editor
from pipeline.verify.editors.pipelines import check_schedule, inverse_ddim, rebuild


@dataclass(frozen=True, kw_only=True)
class DiffEdit(Editor):
    """Finds the mask by itself, inverts the image by DDIM and denoises the masked area with the target prompt.

    DiffEdit: Diffusion-based semantic image editing with mask guidance (Couairon et al., ICLR 2023,
    https://arxiv.org/abs/2210.11427), Section 3.2. The random draws are the latents and the noise of the maps.

    Differs from the paper: diffusers' pipeline, of a release that is no longer maintained, puts the kept latents
    back one noise level late; the inversion has the source prompt where the paper has none (the same for a source
    of ""), in both without guidance.
    """

    name: ClassVar[str] = "diffedit"
    # Share of the noise levels, (0, 1], that are inverted and denoised; more changes more.
    strength: float = 0.8
    # Of the whole schedule; `int(strength * steps)` of them are executed, there and back.
    steps: int = 50
    # Classifier-free guidance of the mask and of the denoising; 1 turns it off.
    guidance: float = 7.5
    # Noise maps over which the disagreement is averaged.
    maps: int = 10
    # Share of the noise levels at which the prompts are compared.
    mask_strength: float = 0.5
    # The disagreement is cut at this multiple of its mean; the mask is where it is above half of that.
    mask_cut: float = 3.0

    def __post_init__(self) -> None:
        check_schedule(self.name, self.steps, self.strength)
        check_schedule(f"{self.name}'s mask", self.steps, self.mask_strength)
        if self.maps < 1 or self.mask_cut <= 0:
            raise ValueError(f"{self.name}: {self.maps} maps cut at {self.mask_cut}; choose at least 1, above 0")

    def _edit(self, given: Any, image: Tensor, edit: Edit, generator: torch.Generator, mask: Tensor) -> Tensor:
        from diffusers import StableDiffusionDiffEditPipeline

        if _tokens(given, edit.source) == _tokens(given, edit.target):
            raise ValueError(f"{self.name}: source and target are both {edit.target!r}: there is nothing to edit")
        logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(_tells_news)
        pipeline = rebuild(StableDiffusionDiffEditPipeline, given, inverse_scheduler=inverse_ddim(given))
        common = {"num_inference_steps": self.steps, "generator": generator}
        area = pipeline.generate_mask(
            image=image,
            source_prompt=edit.source,
            target_prompt=edit.target,
            num_maps_per_mask=self.maps,
            mask_encode_strength=self.mask_strength,
            mask_thresholding_ratio=self.mask_cut,
            guidance_scale=self.guidance,
            **common,
        )
        inverted = pipeline.invert(
            edit.source, image=image, inpaint_strength=self.strength, guidance_scale=1.0, **common
        ).latents
        edited: Tensor = pipeline(
            edit.target,
            mask_image=area,
            image_latents=inverted,
            inpaint_strength=self.strength,
            guidance_scale=self.guidance,
            output_type="pt",
            **common,
        ).images
        return edited


def _tokens(given: Any, prompt: str) -> list[int]:
    """What the text encoder sees of a prompt."""
    tokens: list[int] = given.tokenizer(prompt, truncation=True, max_length=given.tokenizer.model_max_length).input_ids
    return tokens


def _tells_news(record: logging.LogRecord) -> bool:
    """False for diffusers' word that this pipeline is deprecated, once per image; known, see the class."""
    return "StableDiffusionDiffEditPipeline has been deprecated" not in record.getMessage()

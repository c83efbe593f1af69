"""LoRA (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685) under DreamBooth's loss: what most attackers use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from peft import LoraConfig
from torch import Tensor

from pipeline.verify.customizers.base import PHOTO, Customized, Customizer, PriorImages, Sampling
from pipeline.verify.customizers.training import fit, own_copy, prior_lesson, subject_lesson
from protectors.randomness import streams

_UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True, kw_only=True)
class Lora(Customizer):
    """Adds a trained product of two thin matrices to the attention layers; the weights themselves stay.

    The pipeline keeps it as peft's adapter, not merged.
    """

    name: ClassVar[str] = "lora"

    # Rank of the product; alpha is the same, so the product is added as it is.
    rank: int = 4
    train_text_encoder: bool = False
    # Class images for prior preservation; 0 trains on the photos alone.
    prior_images: int = 0
    prior_weight: float = 1.0
    identifier: str = "sks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")

    @classmethod
    def presets(cls) -> Mapping[str, Self]:
        """`literature`: diffusers' DreamBooth-LoRA recipe for SD 1.x and 2.x; `quick`: for nano-sd."""
        return {
            "literature": cls(steps=500, rate=1e-4, batch=1, sampling=Sampling(steps=100)),
            "quick": cls(steps=200, rate=2e-3, batch=4, rank=8, sampling=Sampling(steps=25, guidance=5.0)),
        }

    def _customize(self, priors: PriorImages, images: Tensor, class_word: str, *, seed: int) -> Customized:
        subject = f"{self.identifier} {class_word}"
        own = own_copy(priors.base)
        (generator,) = streams([seed], "lora/start")
        self._add(own.unet, _UNET_LAYERS, generator)
        if self.train_text_encoder:
            self._add(own.text_encoder, _TEXT_LAYERS, generator)
        lessons = [subject_lesson(own, images, [PHOTO.format(subject)] * len(images))]
        if self.prior_images:
            lessons.append(
                prior_lesson(priors, class_word, self.prior_images, self.prior_weight, seed=seed, attack=self)
            )
        fit(own, lessons, self, seed=seed)
        return Customized(pipeline=own, subject=subject)

    def _add(self, network: Any, layers: Sequence[str], generator: torch.Generator) -> None:
        network.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(layers)))
        for name, weight in network.named_parameters():
            # peft draws from torch's global generator; these draws depend on the seed alone.
            if "lora_A" in name:
                weight.data = (torch.randn(weight.shape, generator=generator) / self.rank).to(weight.device)

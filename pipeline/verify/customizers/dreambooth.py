"""DreamBooth (Ruiz et al., CVPR 2023, https://arxiv.org/abs/2208.12242): binds a subject to a rare word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor

from pipeline.verify.customizers.base import PHOTO, Customized, Customizer, PriorImages, Sampling
from pipeline.verify.customizers.training import fit, own_copy, prior_lesson, subject_lesson

_BLUR_KERNEL = 7
# The papers name the kernel only; this is the width that image libraries derive from a kernel of 7.
_BLUR_SIGMA = 1.4


@dataclass(frozen=True, kw_only=True)
class DreamBooth(Customizer):
    """Trains the whole UNet, and the text encoder if wanted, with prior preservation."""

    name: ClassVar[str] = "dreambooth"

    # Weight of the loss on class images (lambda in the paper), and how many there are.
    prior_weight: float = 1.0
    prior_images: int = 200
    train_text_encoder: bool = True
    # Train on blurred photos and their mirror images: weakens perturbations of high frequency (MetaCloak's evaluation).
    robust: bool = False
    identifier: str = "sks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_images < 1:
            raise ValueError(f"prior_images must be at least 1, not {self.prior_images}")

    @classmethod
    def presets(cls) -> Mapping[str, Self]:
        """`literature`: Anti-DreamBooth's protocol for SD 2.1-base; `robust`: the same by MetaCloak's evaluation.

        `apdm`: APDM's protocol for SD 1.5, which leaves the text encoder alone. `quick`: for nano-sd, with clean images
        in mind; `fixative models evaluate` measures how far it gets and what it costs.
        """
        literature = cls(steps=1000, rate=5e-7, batch=2, sampling=Sampling(steps=100))
        return {
            "literature": literature,
            "robust": replace(literature, robust=True),
            "apdm": replace(literature, steps=800, rate=5e-6, batch=1, train_text_encoder=False, bf16=False),
            "quick": cls(steps=200, rate=2e-4, batch=4, prior_images=32, sampling=Sampling(steps=25, guidance=5.0)),
        }

    def subject(self, class_word: str) -> str:
        """The words that the subject is bound to."""
        return f"{self.identifier} {class_word}"

    def _customize(self, priors: PriorImages, images: Tensor, class_word: str, *, seed: int) -> Customized:
        prior = prior_lesson(priors, class_word, self.prior_images, self.prior_weight, seed=seed, attack=self)
        own = own_copy(priors.base)
        own.unet.requires_grad_(True)
        own.text_encoder.requires_grad_(self.train_text_encoder)
        photos = _blurred_and_mirrored(images) if self.robust else images
        photo = subject_lesson(own, photos, [PHOTO.format(self.subject(class_word))] * len(photos))
        fit(own, [photo, prior], self, seed=seed)
        return Customized(pipeline=own, subject=self.subject(class_word))


def _blurred_and_mirrored(images: Tensor) -> Tensor:
    blurred = gaussian_blur2d(images, (_BLUR_KERNEL, _BLUR_KERNEL), (_BLUR_SIGMA, _BLUR_SIGMA))
    return torch.cat([blurred, blurred.flip(-1)])

"""Custom Diffusion (Kumari et al., CVPR 2023, https://arxiv.org/abs/2212.04488): where text meets the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.verify.customizers.base import PHOTO, Customized, Customizer, PriorImages, Sampling
from pipeline.verify.customizers.tokens import add_token, trainable_row
from pipeline.verify.customizers.training import Lesson, fit, own_copy, prior_lesson, subject_lesson
from protectors.randomness import streams

_TRAINED_LAYERS = ("attn2.to_k.", "attn2.to_v.")
# Views of a photo at random scales, and as many of its mirror image. The paper draws one anew in every update; a
# fixed set is encoded once.
_VIEWS = 8


@dataclass(frozen=True, kw_only=True)
class CustomDiffusion(Customizer):
    """Trains keys and values of cross-attention and one new word, with prior preservation."""

    name: ClassVar[str] = "custom-diffusion"

    prior_weight: float = 1.0
    prior_images: int = 200
    # Add mirror images.
    flip: bool = True
    # Photos are scaled by a factor from this range and the prompt says so, as in the paper; (1, 1) leaves them.
    scales: tuple[float, float] = (0.4, 1.4)
    word: str = "<subject>"
    # The new word starts as the first token of this rare one.
    rare_word: str = "ktn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_images < 1:
            raise ValueError(f"prior_images must be at least 1, not {self.prior_images}")
        if not 0.25 <= self.scales[0] <= self.scales[1]:
            raise ValueError(f"scales must be (low, high) with 0.25 <= low <= high, not {self.scales}")

    @classmethod
    def presets(cls) -> Mapping[str, Self]:
        """`literature`: 1e-5 for each image of the batch; `faces`: longer and slower, without augmentation.

        `quick`: for nano-sd, which knows no words for scales.
        """
        literature = cls(steps=500, rate=2e-5, batch=2, sampling=Sampling(steps=100, guidance=6.0, eta=1.0))
        return {
            "literature": literature,
            "faces": replace(literature, steps=750, rate=1e-5, flip=False, scales=(1.0, 1.0)),
            "quick": cls(
                steps=200,
                rate=2e-3,
                batch=4,
                prior_images=32,
                scales=(1.0, 1.0),
                sampling=Sampling(steps=25, guidance=5.0),
            ),
        }

    def _customize(self, priors: PriorImages, images: Tensor, class_word: str, *, seed: int) -> Customized:
        subject = f"{self.word} {class_word}"
        prior = prior_lesson(priors, class_word, self.prior_images, self.prior_weight, seed=seed, attack=self)
        own = own_copy(priors.base)
        for name, weight in own.unet.named_parameters():
            weight.requires_grad_(any(layer in name for layer in _TRAINED_LAYERS))
        token = add_token(own, self.word, like=self.rare_word)
        photos = self._photos(own, images, PHOTO.format(subject), seed)
        with trainable_row(own.text_encoder, token):
            fit(own, [photos, prior], self, seed=seed)
        return Customized(pipeline=own, subject=subject)

    def _photos(self, pipeline: Any, images: Tensor, prompt: str, seed: int) -> Lesson:
        if self.flip:
            images = torch.cat([images, images.flip(-1)])
        if self.scales == (1.0, 1.0):
            return subject_lesson(pipeline, images, [prompt] * len(images))
        (generator,) = streams([seed], "custom-diffusion/views")
        views, inside, prompts = [], [], []
        for image in images.repeat(_VIEWS, 1, 1, 1):
            ratio = self.scales[0] + (self.scales[1] - self.scales[0]) * _uniform(generator)
            view, covered = _scaled(image, ratio, generator)
            views.append(view)
            inside.append(covered)
            prompts.append(prompt + _remark(ratio, generator))
        # A latent counts if all of its pixels show the photo.
        valid = 1 - F.max_pool2d(1 - torch.stack(inside), pipeline.vae_scale_factor)
        return subject_lesson(pipeline, torch.stack(views), prompts, valid)


def _scaled(image: Tensor, ratio: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The photo `(3, S, S)` at another scale, cut or on grey at a random place, and where it is, `(1, S, S)`."""
    size = image.shape[-1]
    side = round(size * ratio)
    resized = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]
    top, left = (int(_uniform(generator) * (abs(size - side) + 1)) for _ in range(2))
    if side >= size:
        return resized[:, top : top + size, left : left + size], torch.ones(1, size, size)
    place = (left, size - side - left, top, size - side - top)
    return F.pad(resized, place, value=0.5), F.pad(torch.ones(1, side, side), place)


def _remark(ratio: float, generator: torch.Generator) -> str:
    """What the prompt says of the scale; the phrases are the paper's, the limits ours."""
    phrases = (", very small", ", far away") if ratio < 0.7 else (", zoomed in", ", close up") if ratio > 1.1 else ("",)
    return phrases[int(_uniform(generator) * len(phrases))]


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))

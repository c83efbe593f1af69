"""Textual Inversion (Gal et al., ICLR 2023, https://arxiv.org/abs/2208.01618): learns a word, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from pipeline.verify.customizers.base import PHOTO, Customized, Customizer, PriorImages, Sampling
from pipeline.verify.customizers.tokens import add_token, trainable_row
from pipeline.verify.customizers.training import fit, own_copy, subject_lesson


@dataclass(frozen=True, kw_only=True)
class TextualInversion(Customizer):
    """Trains one new row of the token embedding, started as the class word's first token.

    A row holds little: it learns much less from four photos than the other attacks, so report its gain on clean
    photos beside every number.
    """

    name: ClassVar[str] = "textual-inversion"

    word: str = "<subject>"
    # Every photo is trained under each of them.
    templates: tuple[str, ...] = (PHOTO,)

    @classmethod
    def presets(cls) -> Mapping[str, Self]:
        """`literature`: 5e-4 for each of four accumulated images, as diffusers scales it; `quick`: for nano-sd."""
        return {
            "literature": cls(
                steps=3000,
                rate=4 * 5e-4,
                batch=4,
                sampling=Sampling(steps=100),
                templates=(PHOTO, "a picture of a {}", "a close-up of a {}", "a rendering of the {}", "one {}"),
            ),
            "quick": cls(steps=300, rate=1e-2, batch=4, sampling=Sampling(steps=25, guidance=5.0)),
        }

    def _customize(self, priors: PriorImages, images: Tensor, class_word: str, *, seed: int) -> Customized:
        own = own_copy(priors.base)
        token = add_token(own, self.word, like=class_word)
        prompts = [template.format(self.word) for template in self.templates for _ in images]
        photos = subject_lesson(own, images.repeat(len(self.templates), 1, 1, 1), prompts)
        with trainable_row(own.text_encoder, token):
            fit(own, [photos], self, seed=seed)
        return Customized(pipeline=own, subject=self.word)

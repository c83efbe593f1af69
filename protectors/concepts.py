"""What a model is protected against: photos of one subject, and everything about them that never changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from protectors.constraints import LEVELS, to_8bit
from protectors.crops import crops
from protectors.diffusion import DiffusionModel
from protectors.dreambooth import Moments, class_latents

_ENCODED_TOGETHER = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Concept:
    """One subject that a model must not learn."""

    images: Tensor
    """``(N, 3, S, S)`` float32 in [0, 1], S the model's base size; cropping is the caller's."""
    class_word: str
    """What the subject is, e.g. "dog"."""
    positives: Tensor | None = None
    """Scaled latents ``(N, C, h, w)`` that stay well denoised, one per image at the same place. None takes images of
    the class that the model draws itself, none of them in the class set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What an attacker writes."""

    instance: str
    """E.g. "a photo of sks dog"."""
    general: str
    """Under class images: "a photo of dog"."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CachedConcept:
    """A concept ready for training, on the model's device: after this neither VAE nor text encoder is called.

    The images are in the order of their hashes, so that nothing depends on the order in which files were listed.
    """

    class_word: str
    words: tuple[Words, ...]
    images: Tensor
    """Rounded to 8 bit: N that were given, then crops of them, one of each, then the next one of each."""
    moments: Moments
    """Of the VAE's posterior of all these, ``(N', C, h, w)`` each."""
    positives: Tensor
    """``(N, C, h, w)``; number i goes with image i and its crops."""
    class_latents: Tensor
    """``(M, C, h, w)``."""
    pairs: tuple[tuple[str, str], ...]
    """sha256 of each image and of its positive."""


def image_digests(images: Tensor) -> list[str]:
    """sha256 of the 8-bit values of each image ``(N, 3, H, W)`` in [0, 1]: how provenance names it."""
    return [values_digest((image * LEVELS).round().to(torch.uint8)) for image in to_8bit(images.detach())]


def attacker_words(
    class_word: str, identifiers: Sequence[str], templates: Sequence[str], *, compat: bool = False
) -> tuple[Words, ...]:
    """Every template with every identifier; ``compat`` writes "a_photo_of_sks_dog", with the quotation marks."""

    def prompt(template: str, subject: str) -> str:
        # Not format(): templates may hold other braces.
        text = template.replace("{}", subject)
        return f'"{text.replace(" ", "_")}"' if compat else text

    return tuple(
        Words(instance=prompt(template, f"{identifier} {class_word}"), general=prompt(template, class_word))
        for template, identifier in product(templates, identifiers)
    )


@torch.no_grad()
def cache_concept(
    model: DiffusionModel, concept: Concept, words: tuple[Words, ...], *, class_images: int, crops_of_each: int = 0
) -> CachedConcept:
    """Checks a concept, encodes its images and prompts, and draws its class images from the model as it is.

    Args:
        model: nothing about it changes.
        concept: see there.
        words: the first one's class prompt is the one that class images are drawn under.
        class_images: how many, besides one positive for each image where the concept has none.
        crops_of_each: how many crops of each image are added.

    Raises:
        ValueError: the concept breaks one of the rules of ``Concept``.
    """
    _check(model, concept)
    images = to_8bit(concept.images.detach().to(model.device))
    names = image_digests(images)
    order = sorted(range(len(images)), key=names.__getitem__)
    images = images[order]
    every = torch.cat([images, to_8bit(crops(images, crops_of_each))])
    parts = [model.encode_moments(part) for part in torch.split(every, _ENCODED_TOGETHER)]
    mean, logvar = (torch.cat(part) for part in zip(*parts, strict=True))
    drawn = class_latents(model, words[0].general, class_images + (len(images) if concept.positives is None else 0))
    # Drawn positives are dealt out in the order of the hashes, given ones stay with their images.
    positives = drawn[class_images:] if concept.positives is None else concept.positives.to(model.device)[order]
    model.embed_prompts([text for pair in words for text in (pair.instance, pair.general)])
    return CachedConcept(
        class_word=concept.class_word,
        words=words,
        images=every,
        moments=(mean, logvar),
        positives=positives,
        class_latents=drawn[:class_images],
        pairs=tuple((names[place], values_digest(positive)) for place, positive in zip(order, positives, strict=True)),
    )


def check_images(model: DiffusionModel, images: Tensor) -> None:
    """Raises ValueError unless they are ``(N, 3, S, S)`` float32 in [0, 1], S the model's base size."""
    size = model.base_size
    if images.ndim != 4 or len(images) == 0 or images.shape[1:] != (3, size, size):
        raise ValueError(f"images are {tuple(images.shape)}; use (N, 3, {size}, {size}), the model's size")
    # One comparison catches NaN too: no comparison with it is true.
    if images.dtype != torch.float32 or not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images must be float32 in [0, 1], without NaN; scale 8-bit values by 1/255")


def _check(model: DiffusionModel, concept: Concept) -> None:
    images = concept.images
    check_images(model, images)
    if not concept.class_word.strip():
        raise ValueError("class_word is empty; name what the subject is, e.g. 'dog'")
    if concept.positives is None:
        return
    shape = (len(images), *model.latent_shape(images))
    if concept.positives.shape != shape or not concept.positives.isfinite().all():
        raise ValueError(f"positives are {tuple(concept.positives.shape)}; use finite scaled latents {shape}")


def values_digest(values: Tensor) -> str:
    """sha256 of the raw values of a tensor."""
    return hashlib.sha256(values.detach().cpu().contiguous().numpy().tobytes()).hexdigest()

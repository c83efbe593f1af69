"""What every customization attack is: photos of a subject in, a diffusion pipeline that knows the subject out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from protectors.randomness import streams

PHOTO = "a photo of a {}"
"""The template under which subjects and classes are trained and drawn."""

_SAMPLED_TOGETHER = 16
_DECODED_TOGETHER = 8
# Sets of class images that are kept: those of the attacks on one subject, at 13 MB for 200 of SD's latents.
_KEPT_PRIORS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How images are drawn from a pipeline."""

    steps: int = 50
    guidance: float = 7.5
    # Share of DDPM's noise that DDIM adds again in every step: 0 draws without, 1 as much as DDPM.
    eta: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Customized:
    """A pipeline of its own weights and the words that call the subject up."""

    pipeline: Any
    # E.g. "sks dog"; goes into templates such as "a photo of a {}".
    subject: str


@dataclass(frozen=True, kw_only=True)
class Customizer(ABC):
    """What an attacker does with a handful of photos. A subclass's fields are its hyperparameters."""

    # Short name of the registry; its random stream is named after it.
    name: ClassVar[str]

    # Updates of the optimizer.
    steps: int
    # AdamW's learning rate, constant.
    rate: float
    # Photos of the subject per update; as many class images come on top where the method keeps the prior.
    batch: int
    # How class images are drawn before training, and how the attack's pictures are meant to be drawn after it.
    sampling: Sampling
    # Train under autocast to bfloat16; weights and optimizer stay float32. Sampling is always float32: guidance
    # would multiply the rounding, which is as large as the guidance itself on nano-sd.
    bf16: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.sampling.steps < 1:
            raise ValueError(f"sampling.steps must be at least 1, not {self.sampling.steps}")

    @classmethod
    @abstractmethod
    def presets(cls) -> Mapping[str, Self]:
        """By name: at least `literature`, a paper's settings for a real checkpoint, and `quick`, for nano-sd."""

    @final
    def customize(
        self, base: Any, images: Tensor, class_word: str, *, seed: int, priors: PriorImages | None = None
    ) -> Customized:
        """Trains on the images; the same arguments give the same weights on one kind of device.

        Args:
            base: StableDiffusionPipeline, see `load_pipeline`; its networks and tokenizer are left as they were.
            images: float `(N, 3, S, S)` in [0, 1] at the model's base size S.
            class_word: what the subject is, e.g. "dog".
            seed: of order, noise, timesteps and class images.
            priors: the base's class images; give one object to all cells of a subject, and they are drawn once.

        Raises:
            ValueError: no images, or they have another size, or `priors` belong to another pipeline.
        """
        size = base.unet.config.sample_size * base.vae_scale_factor
        if len(images) == 0 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (N, 3, {size}, {size}), the model's size, not {tuple(images.shape)}")
        priors = priors or PriorImages(base)
        if priors.base is not base:
            raise ValueError("the class images are of another pipeline; make PriorImages of the one to customize")
        return self._customize(priors, images, class_word, seed=seed)

    @abstractmethod
    def _customize(self, priors: PriorImages, images: Tensor, class_word: str, *, seed: int) -> Customized:
        """The method itself, on a copy of `priors.base`."""

    def parameters(self) -> dict[str, Any]:
        """What a report records of it: name and every field."""
        return {"name": self.name, **asdict(self)}


class PriorImages:
    """Images of a class as a pipeline draws them itself: what prior preservation trains on beside the subject.

    The cells of one subject and seed must share them; they are kept as latents, so that they are drawn once and
    never decoded and encoded again.

    Args:
        base: StableDiffusionPipeline; it must not change while this object is in use.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self._kept = lru_cache(_KEPT_PRIORS)(self._draw)

    def latents(self, prompt: str, count: int, *, seed: int, sampling: Sampling) -> Tensor:
        """Scaled latents `(count, C, h, w)` on the pipeline's device; not to be written to."""
        return self._kept(prompt, count, seed, sampling)

    def _draw(self, prompt: str, count: int, seed: int, sampling: Sampling) -> Tensor:
        return sample_latents(self.base, prompt, count, seed=seed, sampling=sampling, purpose="dreambooth/prior")


def sample(pipeline: Any, prompt: str, count: int, *, seed: int, sampling: Sampling) -> Tensor:
    """Images `(count, 3, H, W)` in [0, 1] on the CPU; image i depends on `seed` and i, not on `count`."""
    latents = sample_latents(pipeline, prompt, count, seed=seed, sampling=sampling)
    with torch.no_grad():
        parts = [
            pipeline.vae.decode(part / pipeline.vae.config.scaling_factor).sample
            for part in torch.split(latents, _DECODED_TOGETHER)
        ]
    images: Tensor = (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1).cpu()
    return images


def sample_latents(
    pipeline: Any, prompt: str, count: int, *, seed: int, sampling: Sampling, purpose: str = "customize/sample"
) -> Tensor:
    """Scaled latents `(count, C, h, w)` of generated images, on the pipeline's device."""
    parts = []
    for start in range(0, count, _SAMPLED_TOGETHER):
        numbers = range(start, min(count, start + _SAMPLED_TOGETHER))
        output = pipeline(
            prompt,
            num_images_per_prompt=len(numbers),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            eta=sampling.eta,
            generator=[generator for number in numbers for generator in streams([seed], f"{purpose}/{number}")],
            output_type="latent",
        )
        parts.append(output.images)
    return torch.cat(parts)

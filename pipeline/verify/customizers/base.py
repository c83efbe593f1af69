"""What every customization attack is: photos of a subject in, a diffusion pipeline that knows the subject out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from protectors.randomness import streams

_SAMPLED_TOGETHER = 16
_DECODED_TOGETHER = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How images are drawn from a pipeline."""

    steps: int = 50
    guidance: float = 7.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Customized:
    """A pipeline of its own weights and the words that call the subject up."""

    pipeline: Any
    # E.g. "sks dog"; goes into templates such as "a photo of a {}".
    subject: str


@dataclass(frozen=True, kw_only=True)
class Customizer(ABC):
    """What an attacker does with a handful of photos. A subclass's fields are its hyperparameters."""

    # Short name of the registry.
    name: ClassVar[str]

    @final
    def customize(self, base: Any, images: Tensor, class_word: str, *, seed: int) -> Customized:
        """Trains on the images; the same arguments give the same weights on one kind of device.

        Args:
            base: StableDiffusionPipeline, see `load_pipeline`; left exactly as it was.
            images: float `(N, 3, S, S)` in [0, 1] at the model's base size S.
            class_word: what the subject is, e.g. "dog".
            seed: of order, noise, timesteps and class images.

        Raises:
            ValueError: no images, or they have another size.
        """
        size = base.unet.config.sample_size * base.vae_scale_factor
        if len(images) == 0 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (N, 3, {size}, {size}), the model's size, not {tuple(images.shape)}")
        return self._customize(base, images, class_word, seed=seed)

    @abstractmethod
    def _customize(self, base: Any, images: Tensor, class_word: str, *, seed: int) -> Customized:
        """The method itself."""

    def parameters(self) -> dict[str, Any]:
        """What a report records of it: name and every field."""
        return {"name": self.name, **asdict(self)}


def sample(pipeline: Any, prompt: str, count: int, *, seed: int, sampling: Sampling) -> Tensor:
    """Images `(count, 3, H, W)` in [0, 1]; image i depends on `seed` and i, not on `count`."""
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
            generator=[generator for number in numbers for generator in streams([seed], f"{purpose}/{number}")],
            output_type="latent",
        )
        parts.append(output.images)
    return torch.cat(parts)

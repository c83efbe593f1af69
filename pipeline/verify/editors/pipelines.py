"""New diffusers pipelines from a checkpoint's networks. The given pipeline, its scheduler included, is left alone."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor


def rebuild(pipeline_class: Any, given: Any, **own: Any) -> Any:
    """A pipeline of another class on the same networks, with a DDIM scheduler of its own, silent and unfiltered.

    Args:
        pipeline_class: of diffusers, for Stable Diffusion 1.x or 2.x.
        given: the pipeline that holds the networks.
        own: further components; `scheduler` replaces DDIM.
    """
    networks = {name: given.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet")}
    filters = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = pipeline_class(**{**networks, **filters, "scheduler": ddim(given), **own})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ddim(given: Any) -> Any:
    """A DDIM scheduler on the checkpoint's own betas and prediction type (Song et al., arXiv 2010.02502).

    Latents are not clipped, and the last step ends at the first noise level that was trained, not at none: only so
    is the inversion the exact mirror of the sampling.
    """
    from diffusers import DDIMScheduler

    return _mirrored_ddim(DDIMScheduler, given)


def inverse_ddim(given: Any) -> Any:
    """The scheduler that walks `ddim`'s steps from the image to the noise."""
    from diffusers import DDIMInverseScheduler

    return _mirrored_ddim(DDIMInverseScheduler, given)


def _mirrored_ddim(scheduler_class: Any, given: Any) -> Any:
    known = signature(scheduler_class).parameters
    config = {name: value for name, value in given.scheduler.config.items() if name in known}
    # Sampling has three spacings and inversion two.
    spacing = "trailing" if config.get("timestep_spacing") == "trailing" else "leading"
    # diffusers' pipelines set the offset to 1 in any case, but with a warning.
    fixed = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": spacing}
    return scheduler_class(**{**config, **fixed})


def encode(given: Any, image: Tensor) -> Tensor:
    """Scaled latents `(1, C, h, w)` of an image `(1, 3, H, W)` in [0, 1]: the posterior's mean, nothing random."""
    pixels = (image * 2 - 1).to(given.vae.device, given.vae.dtype)
    latents: Tensor = given.vae.encode(pixels).latent_dist.mode() * given.vae.config.scaling_factor
    return latents


def decode(given: Any, latents: Tensor) -> Tensor:
    """The image `(1, 3, H, W)`, about [0, 1], of scaled latents."""
    image: Tensor = given.vae.decode(latents / given.vae.config.scaling_factor).sample
    return image.float() / 2 + 0.5


def check_schedule(name: str, steps: int, strength: float = 1.0) -> None:
    """Refuses a number of steps of which none would be executed.

    Raises:
        ValueError: strength is not in (0, 1], or `int(strength * steps)` is 0.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"{name}: strength is {strength}; choose more than 0 and at most 1")
    if int(steps * strength) < 1:
        raise ValueError(f"{name}: of {steps} steps at strength {strength} none is executed; choose more steps")

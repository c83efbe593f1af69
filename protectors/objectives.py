"""The losses that methods share, one value per image, and the random draws they are taken at.

Sign conventions: ``denoising_loss`` and ``encoder_distance`` are plain losses, small when the model handles
the image well (or the target is near). A method says itself whether it ascends or descends. A protector's
public ``objective`` is always turned so that higher means better protected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protectors.base import Batch
from protectors.diffusion import DiffusionModel, LatentModel
from protectors.randomness import integers, normal


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """One sample per image of everything that is random in the denoising loss."""

    t: Tensor
    """Timesteps ``(B,)`` int64, uniform over the schedule or a part of it."""
    noise: Tensor
    """Diffusion noise ``(B, C, h, w)``."""
    posterior: Tensor
    """Noise of the VAE's posterior sample ``(B, C, h, w)``."""


def draw(model: DiffusionModel, images: Tensor, generators: Sequence[torch.Generator]) -> Draws:
    """The next draws of each image's own generator, on the model's device."""
    return draw_for(model, model.latent_shape(images), generators)


def draw_for(
    model: DiffusionModel,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    t_range: tuple[int, int] | None = None,
) -> Draws:
    """As ``draw``, for latents of the shape (C, h, w).

    Args:
        t_range: first and last timestep that are drawn; None takes the whole schedule.
    """
    first, last = t_range or (0, model.schedule.timesteps - 1)
    return Draws(
        t=integers(generators, first, last + 1).to(model.device),
        noise=normal(generators, shape).to(model.device),
        posterior=normal(generators, shape).to(model.device),
    )


def joined(parts: Sequence[Draws]) -> Draws:
    """The draws of all rows, one part after the other."""
    return Draws(
        t=torch.cat([part.t for part in parts]),
        noise=torch.cat([part.noise for part in parts]),
        posterior=torch.cat([part.posterior for part in parts]),
    )


def embed_prompts(model: LatentModel, batch: Batch, default: str) -> Tensor:
    """Embeddings ``(B, L, D)`` of the images' own prompts, or of the method's default for all of them."""
    return model.embed_prompts(batch.prompts or (default,) * len(batch.seeds))


def denoising_loss(model: DiffusionModel, images: Tensor, embeddings: Tensor, draws: Draws) -> Tensor:
    """L_ldm per image ``(B,)``: mean over latent elements of (prediction - target)^2."""
    latents = model.latents(model.encode_moments(images), draws.posterior)
    return latent_denoising_loss(model, latents, embeddings, draws)


def latent_denoising_loss(
    model: DiffusionModel, latents: Tensor, embeddings: Tensor, draws: Draws, *, target: Tensor | None = None
) -> Tensor:
    """L_ldm per image for latents that are already at hand; ``draws.posterior`` is not used.

    Args:
        target: what the prediction is compared with; None is what the UNet was trained to predict.
    """
    noisy = model.add_noise(latents, draws.noise, draws.t)
    target = model.target(latents, draws.noise, draws.t) if target is None else target
    error = model.predict(noisy, draws.t, embeddings) - target
    return error.square().flatten(1).mean(1)


def mean_denoising_loss(
    model: DiffusionModel, images: Tensor, embeddings: Tensor, generators: Sequence[torch.Generator], count: int
) -> Tensor:
    """Mean of L_ldm per image over the generators' next `count` draws; the images are encoded once."""
    moments = model.encode_moments(images)
    losses = []
    for _ in range(count):
        draws = draw(model, images, generators)
        losses.append(latent_denoising_loss(model, model.latents(moments, draws.posterior), embeddings, draws))
    return torch.stack(losses).mean(0)


def encoder_distance(model: DiffusionModel, images: Tensor) -> Tensor:
    """|| mu(x) ||_2 per image ``(B,)``: how far the unscaled posterior mean is from zero."""
    mean, _ = model.encode_moments(images)
    distance: Tensor = torch.linalg.vector_norm(mean.flatten(1), dim=1)
    return distance

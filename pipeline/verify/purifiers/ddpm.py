"""The forward and reverse chain of a pixel-space diffusion model: what DiffPure and GrIDPure are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Pixels in one call of the UNet: 128 tiles of 64, 8 of 256.
_PIXELS_TOGETHER = 2**19


def diffuse_and_denoise(
    pipeline: Any, tiles: Tensor, t: int, generators: Sequence[torch.Generator], *, steps: int | None = None
) -> Tensor:
    """Adds the noise of the first `t` timesteps and removes it again by ancestral sampling.

    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) n, then the reverse steps of Ho et al. 2020 (Algorithm 2) with the
    checkpoint's variance, the estimate of x_0 clipped to [-1, 1] and no noise in the last step
    (Nie et al. 2022, arXiv 2205.07460). Timesteps are counted from 1, as in the papers: diffusers' index
    of the noise level is t - 1, and t calls of the UNet lead back.

    Args:
        pipeline: DDPMPipeline; neither its weights nor its scheduler change.
        tiles: `(N, 3, S, S)` in [0, 1] on the model's device, S as the model was trained.
        t: 1 to the model's number of timesteps.
        generators: one per tile; tiles may share one, and then draw from it in turn.
        steps: fewer, evenly spread timesteps, both ends included; None takes all t.

    Returns:
        `(N, 3, S, S)` in [0, 1].

    Raises:
        ValueError: t or steps is out of range.
    """
    from diffusers import DDPMScheduler
    from diffusers.utils.torch_utils import randn_tensor

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=True)
    count, longest = t if steps is None else steps, scheduler.config.num_train_timesteps
    if not 1 <= count <= t <= longest:
        raise ValueError(f"t = {t} in {count} steps: t must be 1 to {longest}, steps 1 to t")
    timesteps = torch.linspace(t - 1, 0, count).round().long().tolist()
    scheduler.set_timesteps(timesteps=timesteps)
    draws = list(generators)
    current = tiles * 2 - 1
    noise = randn_tensor(current.shape, generator=draws, device=current.device)
    current = scheduler.add_noise(current, noise, torch.tensor([timesteps[0]]))
    together = max(1, _PIXELS_TOGETHER // (current.shape[-1] * current.shape[-2]))
    for step in timesteps:
        # Only the network sees parts: noise is drawn for all tiles at once, so that no result depends on the parts.
        prediction = torch.cat([pipeline.unet(part, step).sample for part in torch.split(current, together)])
        current = scheduler.step(prediction, step, current, generator=draws).prev_sample
    clean: Tensor = (current / 2 + 0.5).clamp(0, 1)
    return clean

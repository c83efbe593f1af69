"""nano-ddpm: what is left of a photo that it purifies, and what it takes away from a noisy one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.laboratory.figures import Figure, bootstrap_interval
from pipeline.verify.purifiers.ddpm import diffuse_and_denoise
from protectors.constraints import to_8bit
from protectors.reference.quality import psnr

MODEL = "nano-ddpm"
NOISE_LEVELS = 16.0


@torch.no_grad()
def purify(pipeline: Any, tiles: Tensor, t: int, *, seed: int) -> Tensor:
    """Diffuses tiles to timestep t and samples them back, one ancestral step per timestep (DDPM; DiffPure).

    Args:
        pipeline: a DDPMPipeline.
        tiles: `(N, 3, S, S)` in [0, 1].
        t: the timestep that noise is added for; t + 1 steps lead back.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    # Timesteps count from 1 there and from 0 here.
    return diffuse_and_denoise(pipeline, tiles, t + 1, [generator] * len(tiles))


def figures(
    pipeline: Any, tiles: Tensor, sample: str, times: Sequence[int], noisy_times: Sequence[int]
) -> list[Figure]:
    """PSNR of purified clean tiles at each of `times`, and the best gain in PSNR on tiles with Gaussian noise."""
    found = []
    for t in times:
        values = psnr(to_8bit(purify(pipeline, tiles, t, seed=t)), tiles)
        low, high = bootstrap_interval(values.tolist())
        found.append(
            Figure(
                model=MODEL,
                name=f"clean photo purified at t = {t}, PSNR dB",
                value=values.mean().item(),
                low=low,
                high=high,
                sample=sample,
                at_least=30.0 if t == 10 else None,
            )
        )
    noise = torch.randn(tiles.shape, generator=torch.Generator().manual_seed(1)) * (NOISE_LEVELS / 255)
    noisy = to_8bit((tiles + noise).clamp(0, 1))
    before = psnr(noisy, tiles)
    gains = {t: psnr(to_8bit(purify(pipeline, noisy, t, seed=t)), tiles) - before for t in noisy_times}
    best = max(gains, key=lambda t: gains[t].mean().item())
    low, high = bootstrap_interval(gains[best].tolist())
    tried = ", ".join(map(str, noisy_times))
    found.append(
        Figure(
            model=MODEL,
            name=f"{NOISE_LEVELS:g} levels of noise, gain in dB at the best of t = {tried} (t = {best})",
            value=gains[best].mean().item(),
            low=low,
            high=high,
            sample=sample,
            at_least=2.0,
        )
    )
    return found

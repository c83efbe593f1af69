"""Random draws that depend on an image's seed alone: not on its batch, its place in it, or the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

SEED_LIMIT = 2**64


def streams(seeds: Sequence[int], purpose: str) -> list[torch.Generator]:
    """One independent CPU generator per seed.

    Args:
        seeds: unsigned 64-bit numbers.
        purpose: separates draws that must not repeat each other, such as attack and evaluation.

    Raises:
        ValueError: a seed is out of range.
    """
    return [_stream(seed, purpose) for seed in seeds]


def _stream(seed: int, purpose: str) -> torch.Generator:
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed {seed} is no unsigned 64-bit number; use 0 to 2**64 - 1")
    # PyTorch's CPU generator uses the low 32 bits of its seed only (measured on 2.13), so seeds that differ
    # in the high half would draw the same numbers. The hash brings every bit down.
    digest = hashlib.sha256(f"{purpose}\0{seed}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big"))


def normal(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal draws ``(B, *shape)``, float32 on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def uniform(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Uniform draws from [-1, 1) ``(B, *shape)``, float32 on the CPU."""
    return torch.stack([torch.rand(tuple(shape), generator=generator) for generator in generators]) * 2 - 1


def integers(generators: Sequence[torch.Generator], low: int, high: int) -> Tensor:
    """One whole number of low..high-1 per generator, ``(B,)`` int64 on the CPU."""
    return torch.cat([torch.randint(low, high, (1,), generator=generator) for generator in generators])

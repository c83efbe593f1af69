"""A protector for tests of what surrounds the methods: deterministic, without a model, ill on request."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import ClassVar

import torch
from torch import Tensor

from protectors.base import Batch, ImageProtector
from protectors.config import ProtectorConfig, require
from protectors.constraints import LEVELS, to_levels
from protectors.pgd import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeConfig(ProtectorConfig):
    """What to do to which image.

    The ``*_on`` fields are markers: they act on images whose top left pixel has this red value (0 to 255),
    wherever in a batch or an archive the image is; None never acts.
    """

    # Seconds that each image takes.
    sleep_s: float = 0.0
    # Raises RuntimeError, which takes the whole batch down.
    raise_on: int | None = None
    # Returns NaN for this image: it comes back with ``failed`` set, the others are fine.
    nan_on: int | None = None
    # Ends the process by a segmentation fault: nothing in Python can catch it.
    segfault_on: int | None = None
    # Ends the process at once with status 3, without cleaning up.
    exit_on: int | None = None

    def check(self) -> None:
        ProtectorConfig.check(self)
        require(self.sleep_s >= 0, "sleep_s", self.sleep_s, "use 0 or more seconds")


class FakeProtector(ImageProtector[FakeConfig, None]):
    """Maximises nothing: adds a pattern of whole levels that depends on the seed alone.

    No paper; see https://arxiv.org/abs/2302.06588 for the kind of method that it stands in for.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``FakeConfig``.
        model: None.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W; the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is the mean absolute change in levels.

    Raises:
        RuntimeError: an image bears the marker ``raise_on``.

    Cost: one addition per pixel, in whole numbers, so that the pixels are equal on all machines.

    Differs from the paper: nothing to differ from.
    """

    name = "fake"
    version = "1"
    config_type = FakeConfig
    model_type = NoneType
    presets: ClassVar[Mapping[str, FakeConfig]] = {
        "paper": FakeConfig(),
        "fast": FakeConfig(eps_levels=4.0),
        "strong": FakeConfig(eps_levels=16.0),
    }

    @property
    def steps(self) -> int:
        return 1

    def _perturb(self, batch: Batch, progress: Progress | None) -> Tensor:
        rows = [self._one(image, seed) for image, seed in zip(batch.originals, batch.seeds, strict=True)]
        if progress is not None:
            progress(1, 1)
        return torch.stack(rows)

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        return (images - batch.originals).abs().flatten(1).mean(1) * LEVELS

    def _one(self, image: Tensor, seed: int) -> Tensor:
        time.sleep(self.config.sleep_s)
        levels = to_levels(image).long()
        marker = int(levels[0, 0, 0])
        if marker == self.config.raise_on:
            raise RuntimeError(f"the fake protector was told to fail on images marked {marker}")
        if marker == self.config.segfault_on:
            ctypes.string_at(0)
        if marker == self.config.exit_on:
            os._exit(3)
        if marker == self.config.nan_on:
            return torch.full_like(image, torch.nan)
        changed = levels + _pattern(seed, image.shape[-2:], math.floor(self.config.eps_levels))
        return changed.clamp(0, LEVELS) / LEVELS


def _pattern(seed: int, size: torch.Size, eps: int) -> Tensor:
    """Whole numbers -eps..eps, ``(H, W)``, equal for all channels so that grey stays grey."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    across, down, offset = (int.from_bytes(digest[i : i + 2], "big") for i in (0, 2, 4))
    rows, columns = torch.arange(size[0]).view(-1, 1), torch.arange(size[1])
    return (rows * down + columns * across + rows * columns + offset) % (2 * eps + 1) - eps

"""Random noise of the full budget: the null control that every protection must beat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType
from typing import ClassVar

import torch
from torch import Tensor

from protectors.base import Batch, ImageProtector
from protectors.config import ProtectorConfig
from protectors.constraints import LEVELS, project
from protectors.pgd import Progress, is_grey
from protectors.randomness import streams


class Noise(ImageProtector[ProtectorConfig, None]):
    """Maximises nothing: every value changes by a whole level drawn uniformly from -eps to eps.

    No paper: the control of equal budget for methods such as https://arxiv.org/abs/2302.06588, without which no number
    of theirs can be read. ``static`` is noise of more power, and the control that destroys images.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``ProtectorConfig``; the budget is all there is.
        model: None.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W; the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is the mean absolute change in levels.

    Raises:
        Nothing of its own.

    Cost: one draw per value.

    Differs from the paper: nothing to differ from. The channels of a grey image share their draws, so that it stays
    grey.
    """

    name = "noise"
    version = "1"
    config_type = ProtectorConfig
    model_type = NoneType
    presets: ClassVar[Mapping[str, ProtectorConfig]] = {
        "paper": ProtectorConfig(),
        "fast": ProtectorConfig(),
        "strong": ProtectorConfig(eps_levels=16.0),
    }

    @property
    def steps(self) -> int:
        return 1

    def _perturb(self, batch: Batch, progress: Progress | None) -> Tensor:
        originals, (low, high) = batch.originals, self._range
        draws = [
            torch.randint(low, high + 1, originals.shape[1:], generator=generator)
            for generator in streams(batch.seeds, self.name)
        ]
        values = torch.stack(draws).to(originals.device) / LEVELS
        values = torch.where(is_grey(originals), values[:, :1], values)
        if progress is not None:
            progress(1, 1)
        return project(self._target(originals, values), originals, self.config.eps_levels)

    @property
    def _range(self) -> tuple[int, int]:
        """First and last level that is drawn."""
        whole = math.floor(self.config.eps_levels)
        return -whole, whole

    def _target(self, originals: Tensor, values: Tensor) -> Tensor:
        """Where the images are taken, as far as the budget allows."""
        return originals + values

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        return (images - batch.originals).abs().flatten(1).mean(1) * LEVELS

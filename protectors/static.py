"""A picture of pure noise, as near as the budget allows: the control that destroys images at the full budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from protectors.config import ProtectorConfig
from protectors.constraints import LEVELS
from protectors.noise import Noise


class Static(Noise):
    """Maximises nothing: every value moves towards one drawn uniformly from 0 to 255, as far as the budget allows.

    No paper; see https://arxiv.org/abs/2302.06588 for the kind of method that it is a control of. At 8 levels it is
    about a random sign per value, noise of the greatest power in the budget. At 255 levels the image is gone: an
    attack that does not feel that measures nothing.

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

    name = "static"
    version = "1"
    presets: ClassVar[Mapping[str, ProtectorConfig]] = {
        "paper": ProtectorConfig(eps_levels=255.0),
        "fast": ProtectorConfig(),
        "strong": ProtectorConfig(eps_levels=255.0),
    }

    @property
    def _range(self) -> tuple[int, int]:
        return 0, LEVELS

    def _target(self, originals: Tensor, values: Tensor) -> Tensor:
        return values

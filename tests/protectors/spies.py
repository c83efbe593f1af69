"""Looks at what a method hands on."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from protectors.base import ImageProtector
from protectors.pgd import Loss, PgdPlan


def attack_loss(
    protector: ImageProtector[Any, Any], images: Tensor, patch: pytest.MonkeyPatch, masks: Tensor | None = None
) -> Loss:
    """The loss that a method which climbs from the original hands to the loop; its draws are those of seeds 5 and 6."""
    seen: list[Loss] = []

    def spy(loss: Loss, originals: Tensor, plan: PgdPlan, **others: Any) -> Tensor:
        assert plan.ascend
        assert others["start"] is None
        seen.append(loss)
        return originals

    patch.setattr(f"{type(protector).__module__}.pgd", spy)
    protector.protect(images, masks=masks, seeds=[5, 6])
    return seen[0]

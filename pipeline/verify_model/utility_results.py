"""What protection costs: denoising of photos that no training saw, and what is drawn of other things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.verify.bootstrap import Floats, Interval, ratio
from pipeline.verify.metrics.distribution import FEWEST, SetDistance, kid
from pipeline.verify_model.figures import intervals
from pipeline.verify_model.models import Protected
from pipeline.verify_model.plan import VerificationPlan
from pipeline.verify_model.store import Results
from pipeline.verify_model.tasks import Denoising, Drawing

LOSS_BAR = 1.05
"""The held-out denoising loss may rise to this many times that of the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossResult:
    """Held-out denoising loss."""

    base: float
    protected: float
    # protected / base
    ratio: Interval
    unit: str
    units: int
    photos: int

    @property
    def met(self) -> bool:
        """Whether it rises no more than it may."""
        return self.ratio.value <= LOSS_BAR


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnResult:
    """What is drawn of unrelated prompts."""

    # Mean cosine of pairs from equal noise, base and protected; and of base and base from other noise.
    cosine: Interval
    control: Interval
    unit: str
    units: int
    # Images of one model.
    images: int
    # Of each model to the base from other noise, and of the base itself to that; None where images are too few.
    kid: Sequence[SetDistance] | None
    kid_control: SetDistance | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UtilityResult:
    """Of the models of one method."""

    label: str
    models: Sequence[Protected]
    # None: not asked for, or failed.
    loss: LossResult | None
    drawn: DrawnResult | None
    errors: Sequence[str]


def utility_of(plan: VerificationPlan, results: Results, failed: Mapping[str, str], label: str) -> UtilityResult:
    """Reads back what is stored of the models of one method.

    Raises:
        NotFound: a result that has not failed is missing.
    """
    own = [utility for utility in plan.utility if utility.protected.label == label]
    losses, drawings, errors = [], [], []
    for utility in own:
        folder = utility.protected.model.folder
        errors += [f"{folder}: {task.label}: {failed[task.key]}" for task in utility.tasks if task.key in failed]
        if utility.loss is not None and _sound(utility.loss, failed):
            losses.append(np.stack([results.values(task.key).mean(axis=1) for task in utility.loss], axis=1))
        if utility.drawn is not None and _sound(utility.drawn, failed):
            drawings.append([results.values(task.key) for task in utility.drawn])
    return UtilityResult(
        label=label,
        models=[utility.protected for utility in own],
        loss=loss_result(losses) if losses else None,
        drawn=drawn_result(drawings) if drawings else None,
        errors=errors,
    )


def _sound(tasks: Sequence[Denoising | Drawing], failed: Mapping[str, str]) -> bool:
    return not any(task.key in failed for task in tasks)


def loss_result(losses: Sequence[Floats]) -> LossResult:
    """From `(photos, 2)` per model: the base's loss and the protected model's, mean over timesteps."""
    figures, unit, units = intervals(losses, _loss_ratio, alone="photos", several="models")
    means = np.mean([values.mean(axis=0) for values in losses], axis=0)
    return LossResult(
        base=float(means[0]),
        protected=float(means[1]),
        ratio=figures["ratio"],
        unit=unit,
        units=units,
        photos=len(losses[0]),
    )


def _loss_ratio(values: Floats) -> dict[str, Floats]:
    means = values.mean(axis=1)
    return {"ratio": ratio(means[:, 1], means[:, 0])}


def drawn_result(drawings: Sequence[Sequence[Floats]]) -> DrawnResult:
    """From three sets of embeddings `(images, D)` per model: base, base from other noise, protected."""
    cosines = [
        np.stack([(base * protected).sum(axis=1), (base * other).sum(axis=1)], axis=1)
        for base, other, protected in drawings
    ]
    figures, unit, units = intervals(cosines, _cosines, alone="pictures", several="models")
    base, other, _ = (torch.from_numpy(values) for values in drawings[0])
    enough = len(base) >= FEWEST
    return DrawnResult(
        cosine=figures["cosine"],
        control=figures["control"],
        unit=unit,
        units=units,
        images=len(base),
        kid=[kid(torch.from_numpy(side[2]), other) for side in drawings] if enough else None,
        kid_control=kid(base, other) if enough else None,
    )


def _cosines(values: Floats) -> dict[str, Floats]:
    means = values.mean(axis=1)
    return {"cosine": means[:, 0], "control": means[:, 1]}

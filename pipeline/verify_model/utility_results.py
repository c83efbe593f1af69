"""What protection costs: denoising of photos that no training saw, and what is drawn of other things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.image.kid import poly_mmd

from pipeline.verify.bootstrap import Floats, Interval, ratio
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
    # Of one model.
    images: int
    prompts: int
    # Kernel distance of the protected model, and of the base, to the base from other noise: mean over prompts. None
    # where a prompt has one image.
    kid: Interval | None
    kid_control: Interval | None
    kid_unit: str
    kid_units: int


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
        drawn=drawn_result(drawings, plan.settings.drawn) if drawings else None,
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


def drawn_result(drawings: Sequence[Sequence[Floats]], count: int) -> DrawnResult:
    """From three sets of embeddings `(prompts * count, D)` per model: base, base from other noise, protected.

    Args:
        drawings: prompt by prompt.
        count: images of each prompt.
    """
    cosines = [
        np.stack([(base * protected).sum(axis=1), (base * other).sum(axis=1)], axis=1)
        for base, other, protected in drawings
    ]
    figures, unit, units = intervals(cosines, _with_control, alone="pictures", several="models")
    images = len(cosines[0])
    kid: dict[str, Interval] = {}
    kid_unit, kid_units = "", 0
    if count > 1:
        distances = [
            np.stack([_distances(protected, other, count), _distances(base, other, count)], axis=1)
            for base, other, protected in drawings
        ]
        kid, kid_unit, kid_units = intervals(distances, _with_control, alone="prompts", several="models")
    return DrawnResult(
        cosine=figures["value"],
        control=figures["control"],
        unit=unit,
        units=units,
        images=images,
        prompts=images // count,
        kid=kid.get("value"),
        kid_control=kid.get("control"),
        kid_unit=kid_unit,
        kid_units=kid_units,
    )


def _distances(left: Floats, right: Floats, count: int) -> Floats:
    """Unbiased squared MMD under (x.y + 1)^3 of every prompt's images, `(prompts,)`.

    Prompt by prompt, because only the images of one are independent draws: in a set of equally many images of each,
    two images of one side share their prompt less often than an image of either side, and a distance of whole sets
    would lie below zero for equal models.
    """
    sides = (torch.split(torch.from_numpy(side), count) for side in (left, right))
    values = [float(poly_mmd(one, other, degree=3, gamma=1.0, coef=1.0)) for one, other in zip(*sides, strict=True)]
    return np.array(values)


def _with_control(values: Floats) -> dict[str, Floats]:
    means = values.mean(axis=1)
    return {"value": means[:, 0], "control": means[:, 1]}

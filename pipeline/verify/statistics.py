"""Numbers with their uncertainty: how much of the protection survives, from paired measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.verify.scores import NO_PURIFIER

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """How much of the objective's gain is left after a purifier, over a sample.

    ``share`` is the summed gain after purification over the summed gain before, where a gain is the objective
    of the protected image minus that of the clean image treated the same way. 1 means nothing was lost, 0 means
    the protection is gone; None where there was no gain to lose.
    """

    purifier: str
    share: float | None
    # Percentile bootstrap over images; None with fewer than two.
    low: float | None
    high: float | None
    images: int


def survival(objectives: Sequence[Mapping[str, Sequence[float]]], *, seed: int = 0) -> list[Survival]:
    """The survival of every purifier.

    Args:
        objectives: One mapping per image: purifier to objective of (clean, protected).
        seed: Of the bootstrap; the same seed gives the same interval.
    """
    if not objectives:
        return []
    gains = {name: np.array([image[name][1] - image[name][0] for image in objectives]) for name in objectives[0]}
    before = gains[NO_PURIFIER]
    totals = _resampled_sums(np.stack(list(gains.values())), seed)
    base = totals[:, list(gains).index(NO_PURIFIER)]
    return [
        _survival(name, gain, before, totals[base > 0, i] / base[base > 0])
        for i, (name, gain) in enumerate(gains.items())
    ]


def _resampled_sums(gains: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float64]:
    """Sums of every row over bootstrap resamples of its columns, ``(RESAMPLES, rows)``; one resample in memory."""
    random = np.random.default_rng(seed)
    images = gains.shape[1]
    return np.stack([gains[:, random.integers(0, images, images)].sum(axis=1) for _ in range(RESAMPLES)])


def _survival(
    name: str, gain: npt.NDArray[np.float64], before: npt.NDArray[np.float64], shares: npt.NDArray[np.float64]
) -> Survival:
    share = float(gain.sum() / before.sum()) if before.sum() > 0 else None
    low = high = None
    if share is not None and len(gain) > 1 and len(shares):
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = (float(value) for value in np.percentile(shares, [tail, 100 - tail]))
    return Survival(purifier=name, share=share, low=low, high=high, images=len(gain))

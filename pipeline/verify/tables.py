"""What a four-cell comparison found, in plain values: a report prints what is in here and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

from pipeline.verify.bootstrap import Interval

Better = Literal["down", "up"]
"""Whether lower or higher scores mean better protection."""

FEW_UNITS = 10
"""Below, no claim is made, and all unit values and the exact sign-flip p-value stand beside the intervals."""


class State(StrEnum):
    """Whether a row or table may be read; the four are never mixed."""

    MEASURED = "measured"
    INVALID = "invalid"
    NOT_RUN = "not run"
    ERROR = "error"


class Verdict(StrEnum):
    """All that a report may say of a residual."""

    SHOWN = "residual protection shown"
    NONE = "no material protection"
    UNRESOLVED = "not resolved at this sample size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of one metric, fixed before the run."""

    metric: str
    better: Better = "down"
    # Smallest residual that counts as protection, in the metric's unit; the default is for cosines.
    delta: float = 0.05
    # The headline; its worst case is not corrected for the other claims.
    primary: bool = False
    # The attack must reach this share of the way from floor to ceiling on clean images ...
    attack_share: float = 0.5
    # ... and a purifier must keep this share of what the attack gains on them.
    content_share: float = 0.5
    # Largest share of failed scores.
    error_share: float = 0.005

    @property
    def sign(self) -> int:
        """Turns a score so that higher means that the attacker wins."""
        return 1 if self.better == "down" else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One condition under which numbers mean something; `passed` is None where it could not be checked."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One purifier. Every number is None unless all four cells were measured."""

    purifier: str
    state: State
    # Why the row is not "measured".
    reason: str = ""
    clean: float | None = None  # B
    protected: float | None = None  # D
    residual: Interval | None = None  # B - D
    damage: Interval | None = None  # A - B, the purifier's own
    lost: Interval | None = None  # (A - C) - (B - D)
    # (B - D) / (A - C); None unless the lower limit of A - C is above zero.
    retention: Interval | None = None
    # (B - D) / (B - F), the share of the attacker's gain that is prevented; None unless B - F is surely above zero.
    effect: Interval | None = None
    # Standard deviation of B - D over training seeds, pooled within units; None with one seed.
    seed_deviation: float | None = None
    # Exact two-sided p-value of B - D = 0 by sign flips; with fewer than ten units only.
    sign_flip_p: float | None = None
    # One-sided p-value of B - D <= delta by sign flips, and after Holm over all rows of its family.
    claim_p: float | None = None
    claim_p_holm: float | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What holds over all purifiers that are "measured"."""

    protection: Interval  # A - C
    attack_gain: Interval | None  # A - F
    worst_mean: Interval  # min over P of the mean of B - D, taken anew in every resample; the headline
    worst_purifier: str
    worst_unit: Interval  # mean over units of min over P of B - D; below zero on noise alone
    worst_unit_null: Interval | None  # the same minimum over placebos; None where none were made
    worst_effect: Interval | None  # min over P of (B - D) / (B - F)
    attacker_loss: Interval  # A - max over P of D: what an attacker loses who chooses the best pipeline
    best_pipeline: str
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One attack and one metric: every number of the report and what it rests on."""

    attack: str
    question: Question
    state: State
    gates: list[Gate]
    rows: list[Row]
    counts: dict[str, int]
    # Mean over units of A, C, F and R as measured; None where not measured.
    cells: dict[str, float | None] = field(default_factory=dict)
    units: int = 0
    # Units without a draw that succeeded in all cells.
    dropped: list[str] = field(default_factory=list)
    # Fewest and most training seeds per unit.
    seeds: tuple[int, int] = (0, 0)
    bootstrap: dict[str, Any] = field(default_factory=dict)
    # B - D as protection by purifier and unit.
    unit_residuals: dict[str, dict[str, float]] = field(default_factory=dict)
    summary: Summary | None = None
    # What is read beside the metric, by cell: plain means without a verdict.
    figures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def publishable(self) -> bool:
        """Whether claims may leave the house: valid, at least ten units and three training seeds in each."""
        return self.state is State.MEASURED and self.units >= FEW_UNITS and self.seeds[0] >= 3

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"publishable": self.publishable}

"""The arithmetic of the four cells: contrasts, shares and worst cases, each with its bootstrap interval.

Values are turned so that higher means that the attacker wins. "none" is a purifier like the others, with B = A and
D = C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.verify.bootstrap import Floats, Interval, Plan, figures_with_intervals, ratio, sign_flip_p
from pipeline.verify.scores import NO_PURIFIER, Arranged, Cell
from pipeline.verify.tables import FEW_UNITS, Question, Row, State, Summary


def effect(clean: Floats, protected: Floats, floor: Floats) -> Floats:
    """The share of the attacker's gain that is prevented, (B - D) / (B - F); not a number where nothing is gained."""
    return ratio(clean - protected, clean - floor)


class Contrasts:
    """All figures of one table.

    Args:
        arranged: the values.
        purifiers: every measured one, with "none".
        question: with the share of the attack's gain that a purifier must keep on clean images.
        plan: of the bootstrap.
    """

    def __init__(self, arranged: Arranged, purifiers: Sequence[str], question: Question, plan: Plan) -> None:
        self._question, self._purifiers = question, list(purifiers)
        self._places, self._sample, self._units = arranged.places, arranged.sample, arranged.units
        self._has_floor = (Cell.FLOOR, NO_PURIFIER) in self._places
        # A purifier that ruins clean images too is no success of the protection: it is in no worst case.
        self._counted = [name for name in purifiers if self._keeps_content(name)]
        self._has_placebo = all((Cell.PLACEBO, name) in self._places for name in self._counted)
        self._figures = figures_with_intervals(self._sample, self._statistic, plan)

    def mean(self, cell: Cell, purifier: str = NO_PURIFIER) -> float | None:
        """Mean over units, turned; None where the cell was not measured in every unit."""
        return self._mean(cell, purifier) if (cell, purifier) in self._places else None

    def row(self, name: str) -> Row:
        """The row of one measured purifier."""
        residuals = self._residuals(name)
        sign = self._question.sign
        kept = name in self._counted
        return Row(
            purifier=name,
            state=State.MEASURED if kept else State.INVALID,
            reason="" if kept else f"keeps less than {self._question.content_share:.0%} of the gain on clean images",
            clean=sign * self._mean(Cell.PURIFIED, name),
            protected=sign * self._mean(Cell.PURIFIED_PROTECTED, name),
            residual=self._figures[f"residual/{name}"],
            damage=self._figures[f"damage/{name}"],
            lost=self._figures[f"lost/{name}"],
            retention=self._share(f"retention/{name}", f"residual/{NO_PURIFIER}"),
            effect=self._share(f"effect/{name}", f"headroom/{name}"),
            seed_deviation=self._seed_deviation(name),
            sign_flip_p=sign_flip_p(residuals) if 1 < len(residuals) < FEW_UNITS else None,
            claim_p=sign_flip_p(residuals - self._question.delta, one_sided=True) if len(residuals) > 1 else None,
        )

    def summary(self) -> Summary:
        """What holds over all purifiers."""
        worst = min(self._counted, key=lambda name: self._figures[f"residual/{name}"].value)
        best = max(self._purifiers, key=lambda name: self._mean(Cell.PURIFIED_PROTECTED, name))
        effects = [self._share(f"effect/{name}", f"headroom/{name}") for name in self._counted]
        return Summary(
            protection=self._figures[f"residual/{NO_PURIFIER}"],
            attack_gain=self._figures.get(f"headroom/{NO_PURIFIER}"),
            worst_mean=self._figures["worst mean"],
            worst_purifier=worst,
            worst_unit=self._figures["worst unit"],
            worst_unit_null=self._figures.get("worst unit null"),
            worst_effect=self._figures["worst effect"] if None not in effects else None,
            attacker_loss=self._figures["attacker's loss"],
            best_pipeline=best,
        )

    def unit_residuals(self) -> dict[str, dict[str, float]]:
        """B - D by purifier and unit."""
        return {name: dict(zip(self._units, self._residuals(name).tolist(), strict=True)) for name in self._purifiers}

    def _mean(self, cell: Cell, name: str) -> float:
        return float(self._sample.means[:, self._places[cell, name]].mean())

    def _keeps_content(self, name: str) -> bool:
        if name == NO_PURIFIER or not self._has_floor:
            return True
        attack, floor = self._mean(Cell.CLEAN, NO_PURIFIER), self._mean(Cell.FLOOR, NO_PURIFIER)
        return self._mean(Cell.PURIFIED, name) >= floor + self._question.content_share * (attack - floor)

    def _residuals(self, name: str) -> Floats:
        means = self._sample.means
        difference: Floats = means[:, self._places[Cell.PURIFIED, name]]
        return difference - means[:, self._places[Cell.PURIFIED_PROTECTED, name]]

    def _seed_deviation(self, name: str) -> float | None:
        sides = (self._places[Cell.PURIFIED, name], self._places[Cell.PURIFIED_PROTECTED, name])
        units = zip(self._sample.padded, self._sample.seeds, strict=True)
        spreads = [np.var(unit[:n, sides[0]] - unit[:n, sides[1]], ddof=1) for unit, n in units if n > 1]
        return math.sqrt(float(np.mean(spreads))) if spreads else None

    def _share(self, name: str, denominator: str) -> Interval | None:
        """A share exists where its denominator is surely above zero."""
        if denominator not in self._figures:
            return None
        low = self._figures[denominator].low
        return self._figures[name] if low is not None and low > 0 else None

    def _statistic(self, values: Floats) -> dict[str, Floats]:
        """All figures of resamples `(R, units, columns)`."""
        means = values.mean(axis=1)

        def mean(cell: Cell, name: str) -> Floats:
            column: Floats = means[:, self._places[cell, name]]
            return column

        attack, protected = mean(Cell.CLEAN, NO_PURIFIER), mean(Cell.PROTECTED, NO_PURIFIER)
        figures: dict[str, Floats] = {}
        for name in self._purifiers:
            clean, left = mean(Cell.PURIFIED, name), mean(Cell.PURIFIED_PROTECTED, name)
            figures[f"residual/{name}"] = clean - left
            figures[f"damage/{name}"] = attack - clean
            figures[f"lost/{name}"] = (attack - protected) - (clean - left)
            figures[f"retention/{name}"] = ratio(clean - left, attack - protected)
            if self._has_floor:
                figures[f"headroom/{name}"] = clean - mean(Cell.FLOOR, NO_PURIFIER)
                figures[f"effect/{name}"] = effect(clean, left, mean(Cell.FLOOR, NO_PURIFIER))
        figures["worst mean"] = np.min([figures[f"residual/{name}"] for name in self._counted], axis=0)
        figures["worst unit"] = self._worst_unit(values, Cell.PURIFIED_PROTECTED)
        figures["attacker's loss"] = attack - np.max(
            [mean(Cell.PURIFIED_PROTECTED, name) for name in self._purifiers], axis=0
        )
        if self._has_floor:
            figures["worst effect"] = np.min([figures[f"effect/{name}"] for name in self._counted], axis=0)
        if self._has_placebo:
            figures["worst unit null"] = self._worst_unit(values, Cell.PLACEBO)
        return figures

    def _worst_unit(self, values: Floats, other: Cell) -> Floats:
        pairs = [(self._places[Cell.PURIFIED, name], self._places[other, name]) for name in self._counted]
        worst: Floats = np.min([values[..., left] - values[..., right] for left, right in pairs], axis=0)
        mean: Floats = worst.mean(axis=1)
        return mean

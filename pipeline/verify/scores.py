"""Scores of single images, and how they become one value per unit, seed and cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from pipeline.verify.bootstrap import Floats, Sample

NO_PURIFIER = "none"


class Cell(StrEnum):
    """What the attacker's images were made from."""

    CLEAN = "A"
    PURIFIED = "B"  # clean, then purified
    PROTECTED = "C"
    PURIFIED_PROTECTED = "D"  # protected, then purified
    FLOOR = "F"  # the attacker's model before it saw the subject
    CEILING = "R"  # held-out real photos against real photos
    PLACEBO = "B2"  # as B with other seeds: what a minimum over purifiers makes of noise alone


_OF_PURIFIERS = (Cell.PURIFIED, Cell.PURIFIED_PROTECTED, Cell.PLACEBO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One number about one generated or edited image; either a value or an error."""

    attack: str
    metric: str
    # What is independent of the others: the subject in customization, the image in editing.
    unit: str
    cell: Cell
    # B, D and B2: the purifier; else "none". B2 of "none" is A with other seeds.
    purifier: str = NO_PURIFIER
    # Equal image, prompt and seed name the same draw in every cell.
    image: str
    prompt: str = ""
    # Of the attacker's training.
    seed: int = 0
    value: float | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.error is None):
            raise ValueError(f"{self}: give a value or an error, and not both")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self}: not finite; that is an error, not a value")
        purified = self.purifier != NO_PURIFIER
        if purified != (self.cell in _OF_PURIFIERS) and self.cell is not Cell.PLACEBO:
            raise ValueError(f"{self}: cells B and D name their purifier, the others none")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


Draw = tuple[str, str, str, int]
"""Unit, image, prompt and seed: what must be the same in all cells."""
Column = tuple[Cell, str]
"""Cell and purifier."""


class Grid:
    """The scores of one attack and one metric, by cell and draw; None is an error.

    Raises:
        ValueError: scores of several attacks or metrics, or two of the same draw.
    """

    def __init__(self, scores: Iterable[Score]) -> None:
        self.columns: dict[Column, dict[Draw, float | None]] = {}
        names = set()
        for score in scores:
            names.add((score.attack, score.metric))
            draws = self.columns.setdefault((score.cell, score.purifier), {})
            draw = (score.unit, score.image, score.prompt, score.seed)
            if draw in draws:
                raise ValueError(f"cell {score.cell} of {score.purifier!r} has two scores of {draw}")
            draws[draw] = score.value
        if len(names) != 1:
            raise ValueError(f"a grid holds one attack and one metric, not {sorted(names)}")
        ((self.attack, self.metric),) = names

    @property
    def purifiers(self) -> list[str]:
        """Those with scores, "none" first."""
        return [NO_PURIFIER, *sorted({name for _, name in self.columns} - {NO_PURIFIER})]

    @property
    def counts(self) -> dict[str, int]:
        """Scores done and failed."""
        values = [value for draws in self.columns.values() for value in draws.values()]
        failed = sum(value is None for value in values)
        return {"done": len(values) - failed, "error": failed}

    def pair(self, purifier: str) -> tuple[dict[Draw, float | None], dict[Draw, float | None]]:
        """The clean and the protected side under this purifier; no purifier is one that changes nothing."""
        plain = purifier == NO_PURIFIER
        sides = (Cell.CLEAN, Cell.PROTECTED) if plain else (Cell.PURIFIED, Cell.PURIFIED_PROTECTED)
        clean, protected = (self.columns.get((cell, purifier), {}) for cell in sides)
        return clean, protected

    def mismatch(self, purifier: str) -> str | None:
        """Why the four cells cannot be compared: they must hold the same draws. None if they do."""
        reference = self.columns.get((Cell.CLEAN, NO_PURIFIER), {}).keys()
        sides = [self.pair(NO_PURIFIER)[1], *self.pair(purifier)]
        if not reference:
            return "no scores of clean images"
        missing = [draw for side in sides for draw in reference ^ side.keys()]
        return f"the cells do not share {len(set(missing))} draws, e.g. {min(missing)}" if missing else None

    def error_share(self, purifier: str) -> float:
        """Share of failed scores on both sides under this purifier; 0 without any score."""
        values = [value for side in self.pair(purifier) for value in side.values()]
        return sum(value is None for value in values) / max(1, len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Arranged:
    """One value per unit, seed and cell."""

    units: list[str]
    # Where a cell stands in the sample's columns; B and D of "none" are A and C.
    places: Mapping[Column, int]
    sample: Sample
    # Units without a draw that succeeded in all cells.
    dropped: list[str]


def arrange(grid: Grid, purifiers: Sequence[str], *, sign: int) -> Arranged | None:
    """Averages over images and prompts inside unit and seed.

    A draw that failed in one cell is left out of all, so that cells stay paired. Floor, ceiling and placebo have no
    draws in common with the others: one value per unit, and only where every unit has one.

    Args:
        grid: the scores.
        purifiers: those whose cells hold the same draws as A and C; with "none".
        sign: 1, or -1 for metrics where the attacker wins with lower values.

    Returns:
        The values times `sign`, so that higher always means that the attacker wins; None without a complete draw.
    """
    sides = [side for name in purifiers for side in grid.pair(name)]
    sound = [draw for draw in sorted(sides[0]) if all(side[draw] is not None for side in sides)]
    if not sound:
        return None
    by_unit: dict[str, dict[int, list[list[float]]]] = {}
    for draw in sound:
        row = [sign * value for side in sides if (value := side[draw]) is not None]
        by_unit.setdefault(draw[0], {}).setdefault(draw[3], []).append(row)
    units = list(by_unit)
    seeds = [np.array([np.mean(rows, axis=0) for _, rows in sorted(by_unit[unit].items())]) for unit in units]
    places: dict[Column, int] = {}
    for number, name in enumerate(purifiers):
        places[Cell.PURIFIED, name], places[Cell.PURIFIED_PROTECTED, name] = 2 * number, 2 * number + 1
    places[Cell.CLEAN, NO_PURIFIER] = places[Cell.PURIFIED, NO_PURIFIER]
    places[Cell.PROTECTED, NO_PURIFIER] = places[Cell.PURIFIED_PROTECTED, NO_PURIFIER]
    unpaired = [column for column in grid.columns if column[0] in (Cell.FLOOR, Cell.CEILING, Cell.PLACEBO)]
    for column in unpaired:
        means = _unit_means(grid.columns[column], units)
        if means is not None:
            places[column] = seeds[0].shape[1]
            seeds = [np.c_[unit, np.full(len(unit), sign * mean)] for unit, mean in zip(seeds, means, strict=True)]
    dropped = sorted({draw[0] for draw in sides[0]} - set(units))
    return Arranged(units=units, places=places, sample=Sample(seeds), dropped=dropped)


def _unit_means(draws: Mapping[Draw, float | None], units: Sequence[str]) -> Floats | None:
    found: dict[str, list[float]] = {unit: [] for unit in units}
    for (unit, *_), value in draws.items():
        if value is not None and unit in found:
            found[unit].append(value)
    return np.array([np.mean(values) for values in found.values()]) if all(found.values()) else None

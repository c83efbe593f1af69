"""Pictures of a verification: what is prevented and what is kept, and what models draw."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from pipeline.errors import NotFound
from pipeline.verify.scores import Cell
from pipeline.verify.tables import State
from pipeline.verify.trial import LABELS, Pixels
from pipeline.verify_model.results import KEPT_BAR, PREVENTED_BAR, Findings, RowResult
from pipeline.verify_model.store import Results
from pipeline.verify_model.tasks import Case, Kind

_SHOWN = 3  # pictures of each kind
_SIDE, _STRIP, _GAP = 112, 18, 10
_LIMITS = (-1.0, 2.0)  # beyond, a share says no more


def plot(found: Findings, file: Path) -> None:
    """Draws the share of every row with its interval: prevented above, kept below, each with its bar."""
    kinds = [row.kind is Kind.CONCEPT for row in found.plan.rows]
    panels = [concept for concept in (True, False) if concept in kinds]
    height = 1.2 + 0.32 * len(found.rows) + 0.5 * len(panels)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[max(1, kinds.count(one)) for one in panels])
    for place, concept in enumerate(panels):
        rows = [row for row in found.rows if (row.row.kind is Kind.CONCEPT) is concept]
        _panel(axes[place][0], rows, found.plan.labels)
        bar, what = (PREVENTED_BAR, "prevented") if concept else (KEPT_BAR, "kept")
        axes[place][0].axvline(bar, color="0.3", linestyle="--", linewidth=0.9)
        axes[place][0].set_xlabel(f"{what}, bar {bar:g}, 95 % interval")
    figure.savefig(file, dpi=140)


def _panel(axes: Axes, rows: Sequence[RowResult], labels: Sequence[str]) -> None:
    axes.axvline(0, color="0.7", linewidth=0.8)
    ticks = []
    for place, row in enumerate(rows):
        ticks.append(f"{row.row.title.replace(', ', ' / ')}\n{row.label}")
        colour = f"C{labels.index(row.label) % 10}"
        if row.share is None:
            axes.text(
                0.02, place, "measures nothing" if row.state is State.INVALID else row.state, fontsize=7, va="center"
            )
            continue
        # One without a limit goes to the edge.
        low, high = row.share.low, row.share.high
        ends = (_LIMITS[0] if low is None else low, _LIMITS[1] if high is None else high)
        axes.plot(ends, [place, place], color=colour, linewidth=1.6)
        value = min(max(row.share.value, _LIMITS[0]), _LIMITS[1])
        marker = "o" if value == row.share.value else "<" if row.share.value < value else ">"
        axes.plot([value], [place], marker=marker, color=colour, clip_on=False)
    axes.set_yticks(range(len(rows)), ticks, fontsize=7)
    axes.invert_yaxis()
    left, right = axes.get_xlim()
    axes.set_xlim(max(left, _LIMITS[0]), min(max(right, 1.05), _LIMITS[1]))


def sheet(found: Findings, results: Results, file: Path) -> None:
    """Draws, for each protected model and concept, the photos of the first row, and what is drawn before and after."""
    plan = found.plan
    cases = [case for case in plan.cases if case.row is plan.rows[0] and case.seed == plan.settings.seed]
    width = 4 * (_SHOWN * _SIDE + _GAP) + _GAP
    drawn = Image.new("RGB", (width, len(cases) * (2 * _STRIP + _SIDE + _GAP)), "white")
    pen = ImageDraw.Draw(drawn)
    for number, case in enumerate(cases):
        top = number * (2 * _STRIP + _SIDE + _GAP)
        title = (
            f"{case.protected.label}: {case.subject.name}, {case.row.title}, model {case.protected.model.digest[:12]}"
        )
        pen.text((_GAP, top + 3), title, fill="black", font_size=12)
        for place, (label, strip) in enumerate(_strips(case, results)):
            left = _GAP + place * (_SHOWN * _SIDE + _GAP)
            pen.text((left, top + _STRIP + 3), label, fill="black", font_size=11)
            for column, pixels in enumerate(strip):
                picture = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
                drawn.paste(picture, (left + column * _SIDE, top + 2 * _STRIP))
    drawn.save(file)


def _strips(case: Case, results: Results) -> list[tuple[str, list[Pixels]]]:
    """Titled pictures of one case; none where a trial has failed."""
    after, before = LABELS[Cell.CLEAN][1], LABELS[Cell.FLOOR][1]
    return [
        ("photos that the attacker has", case.base.train[:_SHOWN]),
        ("base, before", _pictures(results, case.floor.key, before)),
        ("base, customized", _pictures(results, case.base.key, after)),
        ("protected, customized", _pictures(results, case.attacked.key, after)),
    ]


def _pictures(results: Results, key: str, label: str) -> list[Pixels]:
    try:
        data = results.picture(key, label)
    except NotFound:
        return []
    strip = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    side = strip.shape[0]
    return [strip[:, left : left + side] for left in range(0, strip.shape[1], side)][:_SHOWN]

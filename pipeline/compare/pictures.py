"""Pictures of a comparison: effect against visibility, and what protection and attack look like."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from PIL import Image, ImageDraw

from pipeline.compare.plan import Comparison, PlannedCustomization, PlannedTrial, Protection
from pipeline.compare.results import Findings, worst_effect
from pipeline.compare.store import Results
from pipeline.errors import NotFound
from pipeline.verify.difference import AMPLIFIED, difference
from pipeline.verify.scores import Cell
from pipeline.verify.tables import State
from pipeline.verify.trial import LABELS, Pixels

_CELL, _LABEL, _TITLE, _GAP = 144, 120, 34, 4


def plot(found: Findings, file: Path) -> None:
    """Draws the worst-case effect of every method over its mean CIEDE2000, one panel per attack."""
    comparison = found.comparison
    figure = Figure(figsize=(6.4 * len(comparison.attacks), 4.6), layout="constrained")
    for place, attack in enumerate(comparison.attacks):
        axes = figure.add_subplot(1, len(comparison.attacks), place + 1)
        axes.axhline(0, color="0.6", linewidth=0.8)
        hollow = ""
        for row in found.rows:
            table = row.tables.get(attack.label)
            effect = None if table is None else worst_effect(table)
            if row.fidelity is None or table is None or effect is None:
                continue
            x, y = row.fidelity.ciede2000, effect.value
            if effect.low is not None and effect.high is not None:
                axes.plot([x, x], [effect.low, effect.high], color="0.5", linewidth=1.2)
            (point,) = axes.plot([x], [y], marker="o", linestyle="none")
            if table.state is not State.MEASURED:
                point.set_markerfacecolor("none")
                hollow = " (hollow: not to be read as a claim)"
            axes.annotate(row.method.label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")  # noise that destroys the photos is ten times as visible as the rest
        for place_labels in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            place_labels(ScalarFormatter())
        axes.margins(x=0.15)
        axes.set_title(attack.label + hollow)
        axes.set_xlabel("visibility: mean CIEDE2000 to the original")
        axes.set_ylabel("worst-case effect: share of the gain prevented")
    figure.savefig(file, dpi=140)


def sheet(found: Findings, results: Results, file: Path) -> None:
    """Draws, for the first subject and each method: original, protected, difference, and what attacks make of them.

    Raises:
        ValueError: every method has failed.
    """
    comparison, subject = found.comparison, found.comparison.subjects[0]
    protections = [item for item in comparison.protections() if item.subject.name == subject.name]
    failed = {row.method.label for row in found.rows if row.failed is not None}
    lines = [
        (item.method.label, _line(comparison, results, item)) for item in protections if item.method.label not in failed
    ]
    if not lines:
        raise ValueError("every method has failed: there is nothing to draw")
    columns = [title for title, _ in lines[0][1]]
    size = (_LABEL + len(columns) * (_CELL + _GAP), _TITLE + len(lines) * (_CELL + _GAP))
    drawn = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(drawn)
    for place, title in enumerate(columns):
        pen.multiline_text((_LABEL + place * (_CELL + _GAP), 4), _wrapped(title), fill="black", font_size=10)
    for number, (label, pictures) in enumerate(lines):
        top = _TITLE + number * (_CELL + _GAP)
        pen.multiline_text((4, top + _CELL // 2 - 8), _wrapped(label, 18), fill="black", font_size=11)
        for place, (_, pixels) in enumerate(pictures):
            if pixels is not None:
                picture = Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.LANCZOS)
                drawn.paste(picture, (_LABEL + place * (_CELL + _GAP), top))
    drawn.save(file)


def _line(comparison: Comparison, results: Results, item: Protection) -> list[tuple[str, Pixels | None]]:
    """Titled pictures of one method; None where an attack has left none."""
    original, protected = item.subject.train[0], results.protected(item.key).photos[0]
    found: list[tuple[str, Pixels | None]] = [
        ("original", original),
        ("protected", protected),
        (f"difference x{AMPLIFIED}", difference(original, protected)),
    ]
    for trial in comparison.trials([item]):
        for label in _labels(trial, item, comparison.settings.purifiers):
            title = f"{trial.attack.label}: {label}" if isinstance(trial, PlannedCustomization) else label
            found.append((title, _first(results, trial.key, label, comparison.side)))
    return found


def _labels(trial: PlannedTrial, item: Protection, purifiers: Sequence[str]) -> list[str]:
    """Which pictures of a trial are worth a look."""
    if isinstance(trial, PlannedCustomization):
        shown = trial.subject.name == item.subject.name and trial.cell is not Cell.FLOOR
        return [LABELS[trial.cell][1].format(trial.purifier)] if shown else []
    name = trial.attack.name
    plain = [f"original edited by {name}", f"protected edited by {name}"]
    return [*plain, *(f"protected, after {other}, edited by {name}" for other in purifiers)] if trial.photo == 0 else []


def _first(results: Results, key: str, label: str, side: int) -> Pixels | None:
    """The first of the pictures that a trial left side by side; None where it failed and left none."""
    try:
        data = results.picture(key, label)
    except NotFound:
        return None
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[:, :side]


def _wrapped(text: str, width: int = 26) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)

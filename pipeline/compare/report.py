"""Writes what a comparison found: every number as JSON, the effects as CSV, and a table to be read."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from pipeline.compare.plan import AttackSpec
from pipeline.compare.results import WORST, Fidelity, Findings, MethodResult
from pipeline.job import code_version
from pipeline.verify.attack_models import ModelKind
from pipeline.verify.bootstrap import Interval
from pipeline.verify.report import LIBRARIES
from pipeline.verify.scores import NO_PURIFIER
from pipeline.verify.tables import Row, State, Table

SCHEMA_VERSION = 1
MEASURE = (
    "effect = (B - D) / (B - F): the share of what the attack gains on clean photos that it does not gain on "
    "protected ones, both after the purifier; B clean, D protected, F before the attack saw the subject; means over "
    "subjects, bootstrap over subjects; worst = the smallest over none and all purifiers that leave clean photos of use"
)


def document(found: Findings) -> dict[str, Any]:
    """Everything that decided the numbers, and the numbers."""
    comparison = found.comparison
    settings, models = asdict(comparison.settings), comparison.models
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "measure": MEASURE,
        "settings": settings | {"photos": str(settings["photos"])},
        "models": {str(kind): {"name": name, "digest": comparison.digests[kind]} for kind, name in models.items()},
        "side": comparison.side,
        "subjects": {subject.name: comparison.photos[subject.name] for subject in comparison.subjects},
        "against": found.against,
        "methods": [_method(row) for row in found.rows],
    }


def _method(row: MethodResult) -> dict[str, Any]:
    return {
        "label": row.method.label,
        "preset": row.method.spec.preset,
        **row.method.identity(),
        "failed": row.failed,
        "fidelity": None if row.fidelity is None else asdict(row.fidelity),
        "photos": {subject: {**item.fidelity, "seconds": item.seconds} for subject, item in row.protected.items()},
        "tables": {label: table.to_dict() for label, table in row.tables.items()},
        "differences": {
            label: {name: asdict(interval) for name, interval in found.items()}
            for label, found in row.differences.items()
        },
    }


def flat(found: Findings) -> str:
    """CSV: one line per method, attack and purifier, the worst case among them; failed methods have one line."""
    names = ["method", "attack", "purifier", "n", "value", "low", "high", "clean", "protected", "state", "reason"]
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    for row in found.rows:
        if row.failed is not None:
            writer.writerow({"method": row.method.label, "state": State.ERROR, "reason": row.failed})
        for label, table in row.tables.items():
            for line in [*(_purified(table, item) for item in table.rows), _worst(table)]:
                writer.writerow({"method": row.method.label, "attack": label, "n": table.units, **line})
    return file.getvalue()


def _purified(table: Table, row: Row) -> dict[str, Any]:
    return {
        "purifier": row.purifier,
        **_limits(row.effect),
        "clean": row.clean,
        "protected": row.protected,
        "state": row.state if row.state is not State.MEASURED else table.state,
        "reason": row.reason or why_invalid(table),
    }


def _worst(table: Table) -> dict[str, Any]:
    effect = None if table.summary is None else table.summary.worst_effect
    return {"purifier": WORST, **_limits(effect), "state": table.state, "reason": why_invalid(table)}


def _limits(interval: Interval | None) -> dict[str, float | None]:
    return {} if interval is None else {"value": interval.value, "low": interval.low, "high": interval.high}


def why_invalid(table: Table) -> str:
    """The gates that a table has failed; "" where its numbers may be read."""
    return "; ".join(f"{gate.name}: {gate.detail}" for gate in table.gates if gate.passed is False)


def header(found: Findings) -> list[str]:
    """Columns of the table of one attack."""
    purified = [NO_PURIFIER, *found.comparison.settings.purifiers]
    columns = ["method", "l_inf", "PSNR dB", "SSIM", "CIEDE2000", "time", *purified, WORST]
    return columns if found.against is None else [*columns, f"{WORST}, less that of {found.against}"]


def lines(found: Findings, attack: AttackSpec) -> list[list[str]]:
    """Cells of the table of one attack, one line per method."""
    empty = [""] * (len(header(found)) - 2)
    return [
        [row.method.label, *empty, f"failed: {row.failed}"]
        if row.fidelity is None
        else [row.method.label, *_visibility(row.fidelity), *_effects(found, row, attack)]
        for row in found.rows
    ]


def _visibility(fidelity: Fidelity) -> list[str]:
    return [
        str(fidelity.linf_levels),
        f"{fidelity.psnr:.1f}",
        "" if fidelity.ssim is None else f"{fidelity.ssim:.3f}",
        f"{fidelity.ciede2000:.2f}",
        "" if fidelity.time_ratio is None else f"x{fidelity.time_ratio:.3g}",
    ]


def _effects(found: Findings, row: MethodResult, attack: AttackSpec) -> list[str]:
    table = row.tables[attack.label]
    by_purifier = {item.purifier: item for item in table.rows}
    cells = []
    for name in (NO_PURIFIER, *found.comparison.settings.purifiers):
        item = by_purifier[name]
        cells.append(written(item.effect) + ("" if item.state is State.MEASURED else " *"))
    cells.append(written(None if table.summary is None else table.summary.worst_effect))
    if found.against is not None:
        cells.append(written(row.differences.get(attack.label, {}).get(WORST)))
    return cells


def written(interval: Interval | None) -> str:
    """A figure with its interval, "-" where there is none."""
    if interval is None:
        return "-"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def notes(found: Findings, attack: AttackSpec) -> list[str]:
    """What a reader must know beside the table of one attack."""
    tables = {row.method.label: row.tables[attack.label] for row in found.rows if attack.label in row.tables}
    said: dict[str, list[str]] = {}
    for label, table in tables.items():
        for item in table.rows:
            if item.state is not State.MEASURED:
                said.setdefault(f"* {item.purifier} is in no worst case: {item.reason}", []).append(label)
        if reason := why_invalid(table):
            said.setdefault(f"not to be read as a claim: {reason}", []).append(label)
    return [text if len(labels) == len(tables) else f"{text} ({', '.join(labels)})" for text, labels in said.items()]


def markdown(found: Findings) -> str:
    """The tables as Markdown, one per attack."""
    comparison = found.comparison
    settings, attacker = comparison.settings, comparison.models[ModelKind.LATENT]
    text = [
        f"{len(comparison.subjects)} subjects of at most {settings.train} protected photos, {comparison.side} pixels; "
        f"attacked with `{attacker}`. Numbers under none, a purifier or worst are effects: the share of the attack's "
        "gain that is prevented, with 95 % interval over subjects; worst is the smallest of them. Processor time "
        "is relative to the first method."
    ]
    for attack in comparison.attacks:
        columns = header(found)
        text += ["", f"### {attack.label}", ""]
        text += [_markdown_line(columns), _markdown_line(["---"] * len(columns))]
        text += [_markdown_line(line) for line in lines(found, attack)]
        text += ["", *(f"- {note}" for note in notes(found, attack))]
    return "\n".join(text).rstrip() + "\n"


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

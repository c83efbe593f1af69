"""Writes what a comparison found: every number as JSON, the effects as CSV, and a table to be read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from pipeline.compare.plan import AttackSpec
from pipeline.compare.results import WORST, Fidelity, Findings, MethodResult, why_no_worst, worst_effect
from pipeline.job import code_version
from pipeline.verify.bootstrap import Interval
from pipeline.verify.cells import ATTACK_GATE
from pipeline.verify.purifiers import PURIFIERS
from pipeline.verify.report import LIBRARIES
from pipeline.verify.scores import NO_PURIFIER, Cell
from pipeline.verify.tables import FEW_UNITS, Row, State, Table
from protectors.reference import NANO_EMBED

SCHEMA_VERSION = 2
_EFFECT = "effect = (B - D) / (B - F); "
_MEANS = (
    "; B and D after the purifier; means over subjects, bootstrap over subjects; worst = the smallest over none and "
    "all purifiers that leave clean photos of use"
)


def measure(found: Findings, attack: AttackSpec) -> str:
    """What an effect is under this attack."""
    if attack.preset is not None:
        return (
            f"{_EFFECT}the share of what the attack gains on clean photos that it does not gain on protected ones; "
            "B likeness to the subject of what a model draws that was customized on clean photos, D on protected ones, "
            f"F before it saw the subject{_MEANS}"
        )
    return (
        f"{_EFFECT}the share of the edit that protection hinders beyond noise of {found.comparison.control_levels} "
        "levels, the same noise for all methods; B likeness to the edit of the clean photo of the edit of the photo "
        f"with noise, D of the protected photo, F of the clean photo with other draws{_MEANS}"
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
        "environment": comparison.environment,
        "settings": settings | {"photos": str(settings["photos"])},
        "models": {str(kind): {"name": name, "digest": comparison.digests[kind]} for kind, name in models.items()},
        "side": comparison.side,
        "embedder": {"name": NANO_EMBED, "digest": comparison.embedder},
        "attacks": {
            attack.label: {"parameters": comparison.parameters(attack), "measure": measure(found, attack)}
            for attack in comparison.attacks
        },
        "purifiers": {name: PURIFIERS[name].parameters() for name in comparison.settings.purifiers},
        "subjects": {subject.name: comparison.photos[subject.name] for subject in comparison.subjects},
        "against": found.against,
        "warnings": warnings(found),
        "failed_trials": list(found.failed_trials),
        "methods": [_method(row) for row in found.rows],
    }


def _method(row: MethodResult) -> dict[str, Any]:
    return {
        "label": row.method.label,
        "preset": row.method.spec.preset,
        **row.method.identity(),
        "checkpoint": row.method.model,
        "side": row.method.side,
        "failed": row.failed,
        "fidelity": None if row.fidelity is None else asdict(row.fidelity),
        "photos": {subject: {**item.fidelity, "seconds": item.seconds} for subject, item in row.protected.items()},
        "tables": {label: table.to_dict() for label, table in row.tables.items()},
        "differences": {label: asdict(found) for label, found in row.differences.items()},
    }


def warnings(found: Findings) -> list[str]:
    """What makes all tables of the comparison say less than they seem to."""
    side = found.comparison.side
    other = [row.method for row in found.rows if row.method.side not in (None, side)]
    return [
        f"{method.label} was optimized at {method.side} pixels against {method.model}, and the attacker works at {side}"
        for method in other
    ]


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
    reasons = filter(None, (why_no_worst(table), why_invalid(table)))
    return {"purifier": WORST, **_limits(worst_effect(table)), "state": table.state, "reason": "; ".join(reasons)}


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
    cells.append(" ".join(filter(None, (written(worst_effect(table)), _mark(table)))))
    if found.against is not None:
        held = row.differences.get(attack.label)
        cells.append(written(None if held is None else held.intervals.get(WORST)))
    return cells


def _mark(table: Table) -> str:
    """Beside numbers that are no claim; "" where they may be one."""
    failed = [gate.name for gate in table.gates if gate.passed is False]
    return "(attack too weak)" if ATTACK_GATE in failed else "(not valid)" if failed else ""


def written(interval: Interval | None, *, digits: int = 2) -> str:
    """A figure with its interval, "-" where there is none."""
    if interval is None:
        return "-"
    form = f"z.{digits}f"
    if interval.low is None or interval.high is None:
        return format(interval.value, form)
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def notes(found: Findings, attack: AttackSpec) -> list[str]:
    """What a reader must know beside the table of one attack."""
    tables = {row.method.label: row.tables[attack.label] for row in found.rows if attack.label in row.tables}
    said: dict[str, list[str]] = {}
    for row in found.rows:
        for text in _notes(row, attack) if row.failed is None else []:
            said.setdefault(text, []).append(row.method.label)
    return [text if len(labels) == len(tables) else f"{text} ({', '.join(labels)})" for text, labels in said.items()]


def _notes(row: MethodResult, attack: AttackSpec) -> Iterator[str]:
    table = row.tables[attack.label]
    for item in table.rows:
        if item.state is not State.MEASURED:
            yield f"* {item.purifier}: {item.reason}"
        elif item.effect is None:
            yield f"no effect after {item.purifier}: {_why_no_effect(table)}"
    if reason := why_no_worst(table):
        yield f"no worst case: {reason}"
    if reason := why_invalid(table):
        yield f"not to be read as a claim: {reason}"
    for gate in table.gates:
        if gate.passed is None:
            yield f"not checked: {gate.name}: {gate.detail}"
    if table.units < FEW_UNITS:
        yield f"with fewer than {FEW_UNITS} subjects nothing is claimed"
    held = row.differences.get(attack.label)
    if held is not None and held.reason:
        yield f"no difference of worst cases: {held.reason}"


def _why_no_effect(table: Table) -> str:
    if table.cells.get(Cell.FLOOR) is None:
        return "no floor measured"
    if table.units == 1:
        return "one subject has no interval"
    return "what the attack gains on clean photos is not surely above zero"


def markdown(found: Findings) -> str:
    """The tables as Markdown, one per attack."""
    comparison = found.comparison
    text = [
        f"{len(comparison.subjects)} subjects of at most {comparison.settings.train} protected photos, "
        f"{comparison.side} pixels. Numbers under none, a purifier or worst are effects, with 95 % interval over "
        "subjects; worst is the smallest of them. Processor time is relative to the first method.",
        "",
        *_checkpoints(found),
        *(f"- Mind: {warning}." for warning in warnings(found)),
    ]
    for attack in comparison.attacks:
        columns = header(found)
        text += ["", f"### {attack.label}", "", f"{measure(found, attack)}.", ""]
        text += [_markdown_line(columns), _markdown_line(["---"] * len(columns))]
        text += [_markdown_line(line) for line in lines(found, attack)]
        text += ["", *(f"- {note}" for note in notes(found, attack))]
    return "\n".join(text).rstrip() + "\n"


def _checkpoints(found: Findings) -> list[str]:
    """Who works with which model."""
    comparison = found.comparison
    lines = [
        f"- The attacker has `{name}` ({kind}, sha256 {comparison.digests[kind][:12]})"
        for kind, name in comparison.models.items()
    ]
    users: dict[tuple[str, str, int | None], list[str]] = {}
    for row in found.rows:
        if row.method.side is not None:
            users.setdefault((row.method.model, row.method.digest, row.method.side), []).append(row.method.label)
    return lines + [
        f"- Optimized against `{model}` (sha256 {digest[:12]}, {side} pixels): {', '.join(labels)}"
        for (model, digest, side), labels in users.items()
    ]


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

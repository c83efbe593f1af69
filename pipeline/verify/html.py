"""The report of a verification for people: one HTML file that needs no network, no scripts and no other file.

Every number comes from ``verification.json``; what that does not hold is shown as missing. All text is escaped, and
the page's own policy forbids scripts and every request.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from jinja2 import ChainableUndefined, Environment, PackageLoader, Undefined
from markupsafe import Markup

from pipeline.verify import wording
from pipeline.verify.plots import Span, Tone, interval_plot
from pipeline.verify.scores import NO_PURIFIER
from pipeline.verify.tables import State

MOST_SHARDS = 200
"""A page with more is slow, and nobody reads it; the others are in ``verification.json``."""

_SEVERITY = {"fail": 0, "flag": 1, "pass": 3}
_UNDECIDED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """Pictures of one sampled asset or group, from left to right."""

    # Asset id or name of the group.
    title: str
    # What tables count it by; asset ids may repeat across shards.
    unit: str
    shard_id: str
    # Asset id that ``fixative inspect`` shows the row of; empty where several rows are behind the pictures.
    row: str
    # PNG by label: "original", "protected", "difference x8", "drawn from protected", ...
    pictures: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """A shard as the page lists it."""

    id: str
    facts: Mapping[str, Any]
    decision: Mapping[str, Any] | None
    worst: Mapping[str, Any] | None

    @property
    def order(self) -> tuple[int, float, str]:
        """The worst first; what was not measured before what was."""
        outcome = None if self.decision is None else str(self.decision["outcome"])
        share = float("-inf") if self.worst is None else float(self.worst["share"])
        return _SEVERITY.get(outcome or "", _UNDECIDED), share, self.id


def render(document: Mapping[str, Any], strips: Sequence[Strip]) -> str:
    """Renders a stored verification.

    Args:
        document: What ``verification.json`` holds. Only the parts that are there are shown.
        strips: Pictures of sampled assets; they are put into the page. They show originals: such a page does not lie
            beside the archive, so it names manifests and does not link to them.

    Returns:
        A whole HTML page; without strips one for ``reports/<run_id>/`` of the destination.
    """
    document = {name: value for name, value in document.items() if value is not None}
    shards = [_shard(name, facts) for name, facts in (document.get("shards") or {}).items()]
    shown = sorted(shards, key=lambda shard: shard.order)[:MOST_SHARDS]
    return _ENVIRONMENT.get_template("report.html").render(
        document=document,
        headlines=wording.headlines(document),
        warnings=wording.warnings(document),
        no_customization=wording.no_customization(document),
        sections={name: _tables(document.get(name) or ()) for name in ("customization", "editing")},
        survival_plot=_survival_plot(document.get("survival") or ()),
        strips=[(strip, _command(document, strip), _uris(strip)) for strip in strips],
        pictured={strip.unit: f"#picture-{place}" for place, strip in enumerate(strips)},
        shards=shown,
        shards_left_out=len(shards) - len(shown),
        shard_link=_links({shard.id for shard in shown}),
        beside_archive=not strips,
    )  # fmt: skip


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.verify"),
        autoescape=True,
        undefined=ChainableUndefined,  # parts of the document may be missing
        finalize=lambda value: wording.MISSING if value is None or isinstance(value, Undefined) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": wording.number,
        "interval": wording.interval,
        "treatment": wording.treatment,
        "counted": wording.counted,
        "tone": wording.verdict_tone,
        "json": lambda value: json.dumps(value, ensure_ascii=False, default=str),
    }
    environment.tests["reaching"] = wording.reaches
    return environment


_ENVIRONMENT = _environment()


def _shard(name: str, facts: Mapping[str, Any]) -> _Shard:
    decisions = facts.get("gate") or [None]
    return _Shard(id=name, facts=facts, decision=decisions[-1], worst=wording.worst_survival(facts.get("survival")))


def _links(shown: set[str]) -> Callable[[str], str]:
    """Where a shard stands on this page; empty if it is not shown."""
    return lambda shard_id: f"#shard-{quote(shard_id, safe='')}" if shard_id in shown else ""


def _command(document: Mapping[str, Any], strip: Strip) -> str:
    """What shows the row behind a strip; empty if there is no one row or no destination."""
    destination = document.get("destination")
    return shlex.join(["fixative", "inspect", str(destination), strip.row]) if destination and strip.row else ""


def _uris(strip: Strip) -> list[tuple[str, str]]:
    return [
        (label, "data:image/png;base64," + base64.b64encode(data).decode()) for label, data in strip.pictures.items()
    ]


def _tables(tables: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Markup]]:
    """Every table with its plot, the primary metric first."""
    ordered = sorted(tables, key=lambda table: not table["question"].get("primary"))
    return [(table, _table_plot(table)) for table in ordered]


def _table_plot(table: Mapping[str, Any]) -> Markup:
    question, summary = table["question"], table.get("summary")
    valid = table.get("state") == State.MEASURED
    spans = [_row_span(row, valid=valid) for row in table["rows"]]
    if summary is not None:
        tone = wording.verdict_tone(summary.get("verdict"), table.get("state"))
        spans.append(_span(summary["worst_mean"], label="worst case", tone=tone))
    axis = f"residual protection B - D, {question['metric']}"
    return Markup(
        interval_plot(spans, [0, question["delta"]], axis=axis, title=f"{table['attack']}: {axis}, by purifier")
    )


def _row_span(row: Mapping[str, Any], *, valid: bool) -> Span:
    label, state = wording.treatment(row["purifier"]), row["state"]
    if row.get("residual") is None:
        return Span(label=label, note=state, value=None, low=None, high=None, tone=Tone.VOID)
    tone = wording.verdict_tone(row.get("verdict"), state if valid else State.INVALID)
    return _span(row["residual"], label=label, tone=tone, prefix="" if state == State.MEASURED else f"{state}: ")


def _span(found: Mapping[str, Any], *, label: str, tone: Tone, value: str = "value", prefix: str = "") -> Span:
    note = prefix + wording.interval(found, value)
    return Span(label=label, note=note, value=found[value], low=found["low"], high=found["high"], tone=tone)


def _survival_plot(entries: Sequence[Mapping[str, Any]]) -> Markup | None:
    spans = [
        _span(item, label=wording.treatment(item["purifier"]), tone=Tone.OPEN, value="share")
        for item in entries
        if item["purifier"] != NO_PURIFIER
    ]
    if not spans:
        return None
    axis = "share of the objective's gain"
    return Markup(interval_plot(spans, [0, 1], axis=axis, title=f"{axis} that is left, by purifier"))

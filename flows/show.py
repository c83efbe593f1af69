"""How the command prints things."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.verify_table import verdicts
from pipeline.errors import UserError
from pipeline.lineage import lineage_target
from pipeline.storage import join_url
from protectors.loading import model_source
from protectors.registry import UnknownProtector, protector_class, protector_names

if TYPE_CHECKING:
    from flows.estimate import Estimate
    from flows.protect import Outcome
    from flows.verify import Verified
    from pipeline.inspection import Status
    from pipeline.job import Job
    from pipeline.plan import Plan

UNLIMITED = 10_000  # columns, where no terminal cuts lines off


def terminal() -> Console:
    """A console whose tables are whole where nobody's window is their limit: in a file or a pipe."""
    console = Console()
    if not console.is_terminal:
        console.width = UNLIMITED
    return console


def plan(console: Console, job: Job, found: Plan, cost: Estimate) -> None:
    """What a run would do."""
    table = Table(title=f"Plan: {job.config.source} -> {job.config.destination}")
    for name in ("shard", "kind", "source", "assets", "units", "MB"):
        table.add_column(name, justify="right" if name in ("assets", "units", "MB") else "left")
    for shard in found.shards[:50]:
        size = f"{shard.size / 1e6:.1f}"
        table.add_row(shard.shard_id, shard.kind, escape(shard.key), str(shard.rows), str(shard.units), size)
    console.print(table)
    if len(found.shards) > 50:
        console.print(f"... and {len(found.shards) - 50} more shards")
    units = sum(shard.units for shard in found.shards)
    console.print(
        f"{len(found.shards)} shards, {units} units, {found.rows} assets; {cost.open_assets} still to protect"
    )
    console.print(f"source: {found.changes}", highlight=False)
    _left_out(console, found)
    console.print(f"method {job.config.job.method.name} {job.ladder[0]}, model {job.model_digest[:12]}")
    rights = {name: value for name, value in job.fields["provenance"].items() if value is not None}
    signer = rights.pop("signer", None)
    console.print(f"rights where an image states none {rights}; signed by {signer['subject'] if signer else 'nobody'}")
    console.print(cost.text, highlight=False)
    if (target := lineage_target(job.config)) is not None:
        console.print(f"lineage events go to {target}", highlight=False, markup=False)


def _left_out(console: Console, found: Plan) -> None:
    if found.ignored:
        names = ", ".join(found.ignored[:3])
        console.print(f"ignored, no images, Parquet files or tars: {len(found.ignored)} ({escape(names)})")
    for _, reason in found.unreadable:
        console.print(f"cannot be read: {reason}", style="red", highlight=False, soft_wrap=True, markup=False)


def outcome(console: Console, result: Outcome) -> None:
    """What a run came to."""
    from flows.artifacts import summary

    rows = summary(result)
    if rows:
        table = Table(title="Committed shards")
        for name in rows[0]:
            table.add_column(name, justify="left" if name in ("shard", "source") else "right")
        for row in rows:
            table.add_row(*("-" if value is None else escape(str(value)) for value in row.values()))
        console.print(table)
    for item in result.survival:
        if item.purifier != "none" and item.share is not None:
            interval = "" if item.low is None else f" (95 % interval {item.low:.2f} to {item.high:.2f})"
            console.print(
                f"after {item.purifier}: {item.share:.2f} of the objective's gain is left{interval}, "
                f"{item.images} images checked",
                highlight=False,
            )
    tally = result.tally
    console.print(
        f"this run: {tally.units} units, {tally.protected} protected, {tally.quarantined} quarantined; "
        f"{tally.resumed} were done before",
        highlight=False,
    )
    _left_out(console, result.plan)
    for problem in result.problems:
        console.print(f"not complete: {problem}", style="red", highlight=False, soft_wrap=True, markup=False)
    if result.report_key is not None:
        report = join_url(result.job.destination().url, result.report_key)
        console.print(f"report: {report}", highlight=False, soft_wrap=True, markup=False)


def verified(console: Console, result: Verified) -> None:
    """What a verification measured, and where its report lies."""
    rows = verdicts(result.document)
    if rows:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*("" if value is None else str(value) for value in row.values()))
        console.print(table)
    else:
        console.print("Nothing was measured: no shard has enough images for a group.")
    console.print(f"report: {result.campaign.destination().url}/{result.report_key}", highlight=False)
    if result.page is not None:
        console.print(f"with pictures: {result.page}", highlight=False)


def status(console: Console, found: Status) -> None:
    """How far a destination is."""
    fields = found.binding["fields"]
    console.print(f"{found.url}: {'finished' if found.finished else 'not finished'}", highlight=False)
    method = fields["method"]
    console.print(f"method {method['name']} {method['version']} {method['config']}, model {fields['model'][:12]}")
    table = Table()
    for name in ("shard", "assets", "state", "protected", "quarantined", "newer", "gone", "units"):
        table.add_column(name)
    for entry in found.shards:
        manifest, shard = entry.manifest, entry.shard
        about = (shard.shard_id, str(shard.rows), entry.state)
        if manifest is None:
            table.add_row(*about, "", "", "", "", f"{entry.parts}/{shard.units}")
        else:
            counts = (manifest.rows_ok, manifest.rows_quarantined, entry.newer, entry.gone)
            table.add_row(*about, *map(str, counts), f"{shard.units}/{shard.units}")
    console.print(table)
    if newer := sum(entry.newer for entry in found.shards):
        console.print(f"newer: source objects with a newer version in another shard, which `export` takes: {newer}")
    if gone := sum(entry.gone for entry in found.shards):
        console.print(f"gone: source objects that left the source; what was made of them stays published: {gone}")
    if found.reasons:
        console.print("quarantined: " + ", ".join(f"{count} {name}" for name, count in found.reasons.most_common()))
    for row in found.examples:
        console.print(f"  {row['asset_id']}: {row['stage']}: {row['message']}", highlight=False, markup=False)


def inspection(console: Console, results: list[dict[str, Any]]) -> None:
    """Rows of ``fixative inspect``."""
    for row in results:
        table = Table(show_header=False)
        for name, value in row.items():
            if isinstance(value, dict):
                for key, text in value.items():
                    table.add_row(f"{name}: {key}", escape(str(text)))
            elif value is not None:
                table.add_row(name, escape(str(value)))
        console.print(table)
    if any(row.get("status") != "quarantined" for row in results):
        console.print("every hash was computed again from the stored bytes and agrees", style="green")
    if any("content_credentials" in row or row.get("signed") for row in results):
        console.print("every signature holds, and its manifest says what row and XMP say", style="green")


def methods(console: Console) -> None:
    """The registered methods, a line each."""
    table = Table("method", "model", "presets", "what it does", title="Protection methods")
    for name in protector_names():
        chosen = protector_class(name)
        model = model_source(chosen).kind if chosen.needs_model() else "none"
        summary = (chosen.__doc__ or "").strip().splitlines()[0]
        table.add_row(name, model, ", ".join(chosen.presets), escape(summary))
    console.print(table)
    console.print(
        "fixative methods NAME shows the settings of its presets; fixative compare measures several side by side"
    )


def method(console: Console, name: str) -> None:
    """One method: what it is, and its presets side by side.

    Raises:
        UserError: there is none of this name.
    """
    try:
        chosen = protector_class(name)
    except UnknownProtector as error:
        raise UserError(str(error)) from error
    console.print(inspect.cleandoc(chosen.__doc__ or ""), markup=False, highlight=False)
    table = Table("setting", *chosen.presets, title=f"Presets of {name}, version {chosen.version}")
    values = [asdict(config) for config in chosen.presets.values()]
    for field in values[0]:
        table.add_row(field, *(str(preset[field]) for preset in values))
    console.print(table)


def demo(console: Console, result: Outcome, archive: Path, sheet: Path) -> None:
    """Where the demo's results lie."""
    destination = result.job.destination().url
    lines = ["", f"archive:       {archive}"]
    for manifest in result.manifests:
        if manifest.data is not None:
            lines.append(f"shard:         {join_url(destination, manifest.data['key'])}")
    lines += [
        f"report:        {join_url(destination, result.report_key or '')}",
        f"contact sheet: {sheet}",
        f"next:          fixative status {destination}; fixative inspect {destination}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

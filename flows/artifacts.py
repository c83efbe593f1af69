"""What a run leaves on its page in Prefect: summary, verdict, pictures, and where the results lie.

Prefect keeps artifacts in its own database, which may be a hosted one. It gets counts, names of shards, and small
pictures that follow from protected images; never an original, nor anything that an original could be had back from.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate

from flows.progress import observer
from pipeline.config import JobConfig
from pipeline.decode import decode, model_view
from pipeline.errors import PipelineError
from pipeline.job import Job, destination_store
from pipeline.manifest import SUCCESS_KEY, Manifest, read_commits, rows_of
from pipeline.plan import Shard, load_index, unit_ids
from pipeline.readers import read_units
from pipeline.storage import join_url
from pipeline.verify.difference import AMPLIFIED, difference
from pipeline.verify.scores import NO_PURIFIER

if TYPE_CHECKING:
    from flows.protect import Outcome

Pixels = npt.NDArray[np.uint8]

SHARDS = 50  # rows of the summary; the report has all
THUMBNAIL = 128  # pixels of height: it lies in a database


def publish_artifacts(outcome: Outcome) -> None:
    """Creates the artifacts of a run that has come to its end, complete or not."""
    destination = outcome.job.destination().url
    create_markdown_artifact(key="protect-summary", markdown=summary_text(outcome), description=destination)
    create_markdown_artifact(key="protect-verdict", markdown=verdict_text(outcome), description=destination)
    if outcome.report_key is not None:
        report = join_url(destination, outcome.report_key.rpartition("/")[0], "report.html")
        create_link_artifact(key="protect-report", link=report, link_text=report, description="Report of the checks")
    success = join_url(destination, SUCCESS_KEY)
    create_link_artifact(key="protect-destination", link=destination, link_text=destination,
                         description=f"Results; readers start at {success}")  # fmt: skip
    _publish_pictures(outcome)


def summary(outcome: Outcome) -> list[dict[str, Any]]:
    """One row per committed shard of the plan, as the command shows it."""
    return [_row(manifest) for manifest in outcome.manifests]


def _row(manifest: Manifest) -> dict[str, Any]:
    return {
        "shard": manifest.shard_id,
        "source": manifest.source["key"] + (" ..." if manifest.source["kind"] == "files" else ""),
        "assets": manifest.rows_in,
        "protected": manifest.rows_ok,
        "quarantined": manifest.rows_quarantined,
        "checked": manifest.verify["sampled"],
        "left after the worst purifier": _worst(manifest.verify["survival"]),
        "gate": " > ".join(f"{item['preset']} {item['outcome']}" for item in manifest.verify["gate"]),
    }


def _short(manifest: Manifest) -> dict[str, Any]:
    """The row as narrow as Prefect's page."""
    row = _row(manifest)
    row["left"] = row.pop("left after the worst purifier")
    return row


def _worst(survival: Sequence[dict[str, Any]]) -> float | None:
    shares = [item["share"] for item in survival if item["purifier"] != NO_PURIFIER and item["share"] is not None]
    return round(min(shares), 3) if shares else None


def summary_text(outcome: Outcome) -> str:
    """What the source held, what this run did, and the shards it committed."""
    changes, tally, ours = outcome.plan.changes, outcome.tally, _of_this_run(outcome)
    job = outcome.job
    counts = {"new": changes.new, "changed": changes.changed, "unchanged": changes.unchanged, "gone": changes.gone}
    lines = [
        f"**{tally.protected} protected, {tally.quarantined} quarantined**, {tally.resumed} assets were done before "
        f"(method {job.config.job.method.name}, run {job.run_id}).",
        "",
        "Objects of the source (image files, Parquet files, tars) when the run began:",
        "",
        _table([counts]),
        "",
    ]
    if changes.gone:
        lines += [f"What is gone from the source stays published; `{SUCCESS_KEY}` lists it under `gone`.", ""]
    if ours:
        lines += [
            f"Shards committed by this run: {len(ours)}{_cut(len(ours))}. Left: share of the objective's gain after "
            "the worst purifier.",
            "",
        ]
        lines += [_table([_short(manifest) for manifest in ours[:SHARDS]]), ""]
    else:
        lines += ["This run committed no shard.", ""]
    return "\n".join(lines)


def verdict_text(outcome: Outcome) -> str:
    """Whether everything is accounted for, what the gate said, and how much of the protection purifiers leave."""
    if outcome.problems:
        lines = ["**Not complete.** What is done stays; the next run goes on.", ""]
        lines += [f"- {_plain(problem)}" for problem in outcome.problems[:SHARDS]]
        lines += [_cut(len(outcome.problems))] if len(outcome.problems) > SHARDS else []
    else:
        lines = ["**Complete.** Every asset of the source is protected, or quarantined with its reason."]
    gates = Counter(manifest.verify["gate"][-1]["outcome"] for manifest in outcome.manifests if manifest.verify["gate"])
    if gates:
        lines += ["", "Gate: " + ", ".join(f"{count} shards {name}" for name, count in sorted(gates.items())) + "."]
    rows = [
        {
            "purifier": item.purifier,
            "gain left": item.share if item.share is None else round(item.share, 2),
            "95 % interval": "" if item.low is None else f"{item.low:.2f} to {item.high:.2f}",
            "images": item.images,
        }
        for item in outcome.survival
        if item.purifier != NO_PURIFIER
    ]
    if rows:
        lines += ["", "Share of the objective's gain that is left on stored images, over all committed shards:", ""]
        lines += [_table(rows)]
    return "\n".join(lines)


def _of_this_run(outcome: Outcome) -> list[Manifest]:
    return [manifest for manifest in outcome.manifests if manifest.run_id == outcome.job.run_id]


def _cut(count: int) -> str:
    return f" ({SHARDS} are shown, the report has all)" if count > SHARDS else ""


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows with equal keys."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join("-" if value is None else _plain(str(value)) for value in row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _plain(text: str) -> str:
    """Text from outside, such as a file's name, that stays text in Markdown."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>()#+!|~" else letter for letter in " ".join(text.split()))


def _publish_pictures(outcome: Outcome) -> None:
    count = outcome.job.config.run.pictures
    manifest = next((item for item in _of_this_run(outcome) if item.rows_ok), None)
    if manifest is None or not count:
        return
    shard = next(shard for shard in outcome.plan.shards if shard.shard_id == manifest.shard_id)
    try:
        pairs = [pair for pair, _ in zip(_pairs(outcome.job, shard, manifest), range(count), strict=False)]
    except (PipelineError, OSError) as error:  # the source may have changed since; the results stand
        observer().note(f"no pictures for Prefect: {error}")
        return
    data = base64.b64encode(strip(pairs)).decode()
    # Not an image artifact: beside the image Prefect's page writes its address, which is the whole image here.
    create_markdown_artifact(
        key="protect-pictures",
        markdown=f"![protected images](data:image/jpeg;base64,{data})",
        description=f"Above: protected images of {manifest.shard_id}, small. Below: what was changed in them, "
        f"x{2 * AMPLIFIED}, without its sign, so that no original can be had back.",
    )


def _pairs(job: Job, shard: Shard, manifest: Manifest) -> Iterator[tuple[Pixels, Pixels]]:
    """Protected images of a shard, and what was changed in them (see `strip`); read unit by unit as they are asked."""
    source, destination = job.source(), job.destination()
    index = load_index(destination, shard)
    ranges = unit_ids(index, job.config_fp, manifest.rung)
    unit, originals = "", dict[str | None, bytes]()
    for row in rows_of(destination, manifest, ["unit_id", "source_sha256", "image"]):
        if row["unit_id"] != unit:
            unit = row["unit_id"]
            (read,) = read_units(source, index, [ranges[unit]])
            originals = {asset.source_sha256: asset.data or b"" for asset in read.assets}
        stored = model_view(decode(row["image"]["bytes"], limits=job.limits))
        original = model_view(decode(originals[row["source_sha256"]], limits=job.limits))
        yield stored, unsigned(difference(original, stored))


def unsigned(change: Pixels) -> Pixels:
    """Size of an amplified change, grey: with the sign of every channel, the original could be had back."""
    size: npt.NDArray[np.int16] = np.abs(change.astype(np.int16) - 128).max(axis=2)
    return np.clip(2 * size, 0, 255).astype(np.uint8)


def strip(pairs: Sequence[tuple[Pixels, Pixels]]) -> bytes:
    """Protected images, and under each of them what was changed, as one small JPEG without metadata."""
    columns = []
    for pair in pairs:
        images = [Image.fromarray(pixels).convert("RGB") for pixels in pair]
        width = min(3 * THUMBNAIL, max(1, round(THUMBNAIL * images[0].width / images[0].height)))
        columns.append([image.resize((width, THUMBNAIL), Image.Resampling.BOX) for image in images])
    sheet = Image.new("RGB", (sum(column[0].width for column in columns), 2 * THUMBNAIL))
    left = 0
    for column in columns:
        for number, image in enumerate(column):
            sheet.paste(image, (left, number * THUMBNAIL))
        left += column[0].width
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=85)
    return file.getvalue()


def tell_interruption(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook of crashed and cancelled runs: leaves a summary, since the run cannot. Only for runs of a deployment.

    Prefect passes the arguments by name, and may call it twice.
    """
    if flow_run.deployment_id is None:
        return  # somebody sits before the terminal, and the command tells it
    config = JobConfig.model_validate(flow_run.parameters["config"])
    destination = destination_store(config)
    done = len(read_commits(destination).committed)
    text = (
        f"**{_plain(state.name)}**: {_plain(state.message or 'no reason was given')}\n\n"
        f"Nothing is lost: {done} shards are committed in {_plain(destination.url)}, and units that were finished "
        "are stored. The next run goes on there; quick run starts one at once."
    )
    with get_client(sync_client=True) as client:
        client.create_artifact(
            ArtifactCreate(
                key="protect-summary",
                type="markdown",
                data=text,
                description=destination.url,
                flow_run_id=flow_run.id,
            )
        )

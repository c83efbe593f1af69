"""The steps of a run between which it may die at any time: prepare, cut waves, tally receipts, publish."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from pipeline.config import JobConfig, RunSettings
from pipeline.croissant import write_card
from pipeline.errors import FatalWorkerError, StorageError, UserError
from pipeline.job import Job, archive_store, code_version, destination_store, find_model, resolve
from pipeline.lineage import check_lineage
from pipeline.manifest import Manifest, publish_success
from pipeline.plan import Plan, Shard, bind, check_binding, load_index, make_plan, publish_plan, unit_ids
from pipeline.provenance.credentials import check_signer
from pipeline.shard_index import schema_from_text
from pipeline.storage import Store, check_conditional_writes, same_or_nested
from pipeline.units import RowRange, group_units
from pipeline.verify.gate import at_current_rung
from pipeline.worker import Receipt

SAME_ERROR_ROWS = 50  # this many rows with one error type stop a run early, if they exceed the tolerated share


@dataclass(frozen=True, slots=True)
class Task:
    """Units of one shard, on its rung of the ladder, that are read together."""

    shard: Shard
    units: tuple[str, ...]
    rows: int


@dataclass(slots=True, kw_only=True)
class Tally:
    """Counts of a run. ``add`` refuses to go on when the same error comes again and again."""

    run: RunSettings
    # Assets of the plan, and those of them that were done before this run.
    assets: int
    resumed: int = 0
    units: int = 0
    protected: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    # Of assets that were protected again, because the gate asked for a stronger preset.
    errors_again: Counter[str] = field(default_factory=Counter)
    # Shards that could not go on, with the reason.
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def quarantined(self) -> int:
        """Assets that this run quarantined."""
        return self.errors.total()

    @property
    def tolerated(self) -> float:
        """Quarantined assets up to which the run counts as good."""
        return max(self.run.max_quarantine_rows, self.run.max_quarantine_fraction * self.assets)

    def add(self, receipt: Receipt, *, again: bool = False) -> None:
        """Takes the receipt of a finished unit; `again` on a rung after the first, where its assets count already.

        Raises:
            FatalWorkerError: One error type has hit ``SAME_ERROR_ROWS`` assets and more than are tolerated.
        """
        self.units += 1
        if again:
            self.errors_again.update(receipt.quarantined)
        else:
            self.protected += receipt.protected
            self.errors.update(receipt.quarantined)
        for name, count in (self.errors_again if again else self.errors).most_common(1):
            if count >= SAME_ERROR_ROWS and count > self.tolerated:
                raise FatalWorkerError(
                    f"stopped: {count} assets failed with {name}, which looks like one cause (the last is "
                    f"{receipt.example}). What is done stays; run the same command to go on."
                )


def preflight(config: JobConfig) -> None:
    """Finds in about a second what would stop the job at once. Writes nothing.

    Raises:
        UserError: Overlap, unknown method, preset or model, a value that cannot work, or nothing to protect.
    """
    (source, key), destination = archive_store(config.source, config.run.s3), destination_store(config)
    if same_or_nested(config.source, config.destination):
        raise UserError(
            f"source {source.url} and destination {destination.url} overlap: originals could be overwritten. "
            "Choose a destination outside the source."
        )
    find_model(config)
    check_lineage(config)
    signer = config.job.provenance.signer
    if signer.certificate is not None and config.run.ray_address is None:  # else the key may lie on the workers only
        check_signer(signer)
    try:
        if next(source.list(key), None) is None:
            raise UserError(
                f"{source.url}{'/' + key if key else ''} is empty or does not exist: there is nothing to protect"
            )
        next(destination.list("plans/"), None)  # a missing bucket or a wrong key shows here
    except StorageError as error:  # before anything has begun, what cannot be reached was named wrongly
        raise UserError(str(error)) from error


def prepare(config: JobConfig, *, dry_run: bool = False) -> tuple[Job, Plan]:
    """Resolves the job, tests and binds the destination, and plans the source. A dry run writes nothing.

    Raises:
        UserError: The job cannot run as configured.
    """
    preflight(config)
    job = resolve(config)
    source, destination = job.source(), job.destination()
    check_binding(destination, job.fields)
    if not dry_run:
        check_conditional_writes(destination)
    while True:
        plan = make_plan(
            source,
            destination,
            config.job.archive,
            job.config_fp,
            only=job.source_key,
            subject_column=config.job.method.subject_column,
        )
        _check_columns(config, plan)
        if dry_run:
            return job, plan
        bind(destination, job.fields)  # only now: a job that cannot be planned must bind nothing
        if publish_plan(destination, plan):
            plan.indexes.clear()  # they are in the store now, and may be large
            return job, plan


def _check_columns(config: JobConfig, plan: Plan) -> None:
    """Raises UserError if no shard has a column by which the method or the check groups images.

    Some shards may lack it: an archive may hold folders of images beside its tables.
    """
    method, check = config.job.method, config.job.check
    schemas = (schema_from_text(text) for text in plan.columns.values())
    there = {column.metadata[b"fixative.source"].decode() for schema in schemas for column in schema}
    for column in (method.subject_column, check.subject_column, check.class_column):
        if column is not None and plan.indexes and column not in there:
            raise UserError(f"no shard has the column '{column}'; there are: {', '.join(sorted(there)) or 'none'}")


def open_units(destination: Store, shard: Shard, config_fp: str) -> list[list[tuple[str, RowRange]]]:
    """The units of a shard that have no part yet, in groups that are read together."""
    index = load_index(destination, shard)
    names = {rows: name for name, rows in unit_ids(index, config_fp, shard.rung).items()}
    stored = {
        item.key.rpartition("/")[2].removesuffix(".parquet") for item in destination.list(f"parts/{shard.shard_id}/")
    }
    missing = [rows for rows, name in names.items() if name not in stored]
    return [[(names[rows], rows) for rows in group] for group in group_units(missing, index.row_groups)]


def cut_waves(job: Job, shards: Sequence[Shard], tally: Tally) -> Iterator[tuple[list[Task], list[Shard]]]:
    """Yields waves: the tasks of each, and the shards that are complete when they are done.

    Ray's driver keeps some memory per unit, so a wave is bounded; shards are committed between waves.
    """
    destination = job.destination()
    tasks: list[Task] = []
    complete: list[Shard] = []
    units = 0
    for planned in shards:
        shard = at_current_rung(job, planned)
        groups = open_units(destination, shard, job.config_fp)
        tally.resumed += shard.rows - sum(high - low for group in groups for _, (low, high) in group)
        for group in groups:
            if units + len(group) > job.config.run.wave_units and tasks:
                yield tasks, complete
                tasks, complete, units = [], [], 0
            tasks.append(_task(shard, group))
            units += len(group)
        complete.append(shard)
    if tasks or complete:
        yield tasks, complete


def raised(job: Job, shards: Sequence[Shard]) -> tuple[list[Task], list[Shard]]:
    """The shards one rung higher, and the tasks that this takes."""
    higher = [replace(shard, rung=shard.rung + 1) for shard in shards]
    destination = job.destination()
    return [_task(s, group) for s in higher for group in open_units(destination, s, job.config_fp)], higher


def _task(shard: Shard, group: Sequence[tuple[str, RowRange]]) -> Task:
    return Task(shard, tuple(name for name, _ in group), sum(high - low for _, (low, high) in group))


def publish(job: Job, plan: Plan, manifests: Sequence[Manifest], report_key: str) -> None:
    """Publishes ``_SUCCESS.json`` and the dataset card. Call it once every shard of the plan is committed."""
    about = {
        "config_fingerprint": job.config_fp,
        # By shard: source objects whose rows have newer versions in other shards, and those the source lost.
        **plan.outdated,
        "report": report_key,
        "code_version": code_version(),
        "run_id": job.run_id,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    publish_success(job.destination(), manifests, about, plan.replaced)
    write_card(job.destination())

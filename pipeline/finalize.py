"""Commits one shard: merge its parts in input order, reconcile, write the data, then the manifest."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import metrics
from pipeline.errors import AlreadyExists, IntegrityError, SourceChanged
from pipeline.ids import sha256_hex
from pipeline.job import Job, code_version
from pipeline.manifest import Manifest, logical_hash
from pipeline.parts import PARQUET_OPTIONS, read_part
from pipeline.plan import Shard, load_index, unit_ids
from pipeline.schema import CHECK_TYPE, QUARANTINED, SCHEMA_VERSION, data_schema, output_name
from pipeline.storage import Store, put_json_new, stored_sha256
from pipeline.units import RowRange
from pipeline.verify.check import StoredCheck, sampled_rows, stored_checks
from pipeline.verify.gate import history
from pipeline.verify.statistics import survival
from pipeline.verify.trials import stored_tables

ROW_GROUP_BYTES = 64_000_000  # readers hold one row group in memory


def finalize_shard(job: Job, shard: Shard, customer: pa.Schema) -> Manifest:
    """Commits a shard whose parts and checks are all stored. Idempotent; of two finalizers one wins.

    Args:
        job: The job.
        shard: The shard.
        customer: Output form of the customer's columns.

    Raises:
        IntegrityError: A part, a check or a row is missing, double or unknown, or stored bytes do not match.
    """
    since = time.perf_counter()
    destination = job.destination()
    index = load_index(destination, shard)
    units = unit_ids(index, job.config_fp, shard.rung)
    checks = stored_checks(destination, shard)
    wanted = {row for rows in sampled_rows(job, shard).values() for row in rows}
    if wanted != set(checks):
        raise IntegrityError(
            f"{shard.shard_id}: checks of rows {sorted(wanted ^ set(checks))[:5]} are missing or unknown; "
            f"delete {destination.url}/checks/{shard.shard_id}/ and run again"
        )
    with tempfile.TemporaryDirectory(prefix="fixative-") as folder:
        merged = _Merge(job, shard, customer, checks, Path(folder))
        for unit, rows in units.items():
            merged.add(_read_part(destination, shard, unit, rows))
        merged.close()
        if merged.rows != index.rows:
            raise IntegrityError(f"{shard.shard_id}: {merged.rows} rows in its parts, {index.rows} in the plan")
        data = _store_file(destination, merged.data_path, f"data/{_label(shard)}", merged.protected)
        quarantine = _store_file(destination, merged.quarantine_path, f"quarantine/{_label(shard)}", merged.quarantined)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        shard_id=shard.shard_id,
        source={
            "uri": f"{job.source().url}/{shard.key}",
            "key": shard.key,
            "kind": shard.kind,
            "etag": shard.etag,
            "size": shard.size,
        },
        data=data,
        quarantine=quarantine,
        rows_in=index.rows,
        rows_ok=merged.protected,
        rows_quarantined=merged.quarantined,
        logical_sha256=logical_hash(merged.identities),
        config_fingerprint=job.config_fp,
        protector=job.config.job.method.name,
        protector_version=job.protector_version,
        model_digest=job.model_digest,
        code_version=code_version(),
        plan_id=shard.plan_id,
        run_id=job.run_id,
        writer_id=uuid.uuid4().hex,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        rung=shard.rung,
        verify={
            "sampled": len(checks),
            "survival": [asdict(item) for item in survival([check.objective for check in checks.values()])],
            "customization": [table.to_dict() for table in stored_tables(job, [shard])],
            # One decision per rung of the ladder that the shard was tried on; the last one let it through.
            "gate": [asdict(decision) for decision in history(destination, shard)],
        },
    )
    ours, stored = put_json_new(destination, manifest.key, asdict(manifest))
    if "abandoned" in stored:
        raise SourceChanged(f"{shard.shard_id}: another run has planned its source anew; run again")
    if ours:
        _record_commit(manifest, since)
    return Manifest(**stored)


def _record_commit(manifest: Manifest, since: float) -> None:
    method = manifest.protector
    metrics.SHARDS_COMMITTED.record(method=method)
    metrics.IMAGES_COMMITTED.record(manifest.rows_ok, method=method, status="protected")
    metrics.IMAGES_COMMITTED.record(manifest.rows_quarantined, method=method, status="quarantined")
    files = [file for file in (manifest.data, manifest.quarantine) if file is not None]
    metrics.WRITTEN_BYTES.record(sum(file["size"] for file in files), method=method, stage="commit")
    metrics.STAGE_SECONDS.record(time.perf_counter() - since, stage="commit", method=method)


def _label(shard: Shard) -> str:
    return f"shard-{shard.number:05d}"


def _read_part(destination: Store, shard: Shard, unit: str, rows: RowRange) -> pa.Table:
    key = f"parts/{shard.shard_id}/{unit}.parquet"
    table = read_part(destination, key)
    if table.column("row").to_pylist() != list(range(*rows)):
        raise IntegrityError(
            f"{destination.url}/{key} does not hold rows {rows[0]} to {rows[1] - 1}; delete it and run again"
        )
    for row in table.select(["asset_id", "image", "status", "protected_sha256"]).to_pylist():
        if row["status"] == "protected" and sha256_hex(row["image"]["bytes"]) != row["protected_sha256"]:
            raise IntegrityError(
                f"{destination.url}/{key}: the bytes of {row['asset_id']} are damaged; delete it and run again"
            )
    return table


class _Merge:
    """Streams parts into a data file and a quarantine file, holding one row group at a time."""

    def __init__(
        self, job: Job, shard: Shard, customer: pa.Schema, checks: dict[int, StoredCheck], folder: Path
    ) -> None:
        self.data_path, self.quarantine_path = folder / "data.parquet", folder / "quarantine.parquet"
        self.shard, self.customer, self.checks = shard, customer, checks
        about = {
            "schema_version": SCHEMA_VERSION,
            "protector": {"name": job.config.job.method.name, "config": job.ladder[self.shard.rung]},
            "config_fingerprint": job.config_fp,
            "inputs": {"key": shard.key, "etag": shard.etag, "kind": shard.kind},
        }
        self.schema = data_schema(customer, about)
        self.data = pq.ParquetWriter(self.data_path, self.schema, **PARQUET_OPTIONS)
        self.quarantine = pq.ParquetWriter(self.quarantine_path, QUARANTINED, **PARQUET_OPTIONS)
        self.rows = self.protected = self.quarantined = 0
        self.identities: list[tuple[str, str | None, str, str]] = []
        self._held: list[pa.Table] = []

    def add(self, part: pa.Table) -> None:
        """Takes the next part, in row order."""
        identity = part.select(["asset_id", "pixel_sha256", "status", "config_fingerprint"])
        self.identities += [tuple(row.values()) for row in identity.to_pylist()]
        good = pc.equal(part.column("status"), "protected")
        self.rows += part.num_rows
        bad = part.filter(pc.invert(good)).append_column(
            "shard_id", pa.array([self.shard.shard_id] * (part.num_rows - pc.sum(good).as_py()), pa.string())
        )
        self.quarantined += bad.num_rows
        if bad.num_rows:
            self.quarantine.write_table(bad.select(QUARANTINED.names).cast(QUARANTINED))
        part = part.filter(good)
        self.protected += part.num_rows
        self._held.append(self._output(part))
        if sum(table.nbytes for table in self._held) >= ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Writes what is left and closes both files."""
        self._flush()
        self.data.add_key_value_metadata({"fixative.logical_sha256": logical_hash(self.identities)})
        self.data.close()
        self.quarantine.close()

    def _flush(self) -> None:
        table = pa.concat_tables(self._held) if self._held else self.schema.empty_table()
        if table.num_rows:
            self.data.write_table(table, row_group_size=table.num_rows)
        self._held = []

    def _output(self, part: pa.Table) -> pa.Table:
        checks = [self.checks.get(row) for row in part.column("row").to_pylist()]
        hashes = part.column("protected_sha256").to_pylist()
        columns: dict[str, Any] = {
            "sampled": pa.array([check is not None for check in checks], pa.bool_()),
            "verified": pa.array([None if check is None else True for check in checks], pa.bool_()),
            "check": pa.array(list(map(_check_rows, checks, hashes)), CHECK_TYPE),
        }
        if "customer" in part.column_names:
            struct = part.column("customer").combine_chunks()
            for i in range(struct.type.num_fields):
                columns[output_name(struct.type.field(i).name)] = pc.struct_field(struct, [i])
        arrays = []
        for item in self.schema:
            column = columns.get(item.name)
            if column is None and item.name in part.column_names and item.name not in self.customer.names:
                column = part.column(item.name)
            arrays.append(pa.nulls(part.num_rows, item.type) if column is None else column.cast(item.type))
        return pa.table(arrays, schema=self.schema)


def _check_rows(check: StoredCheck | None, protected_sha256: str) -> list[dict[str, Any]] | None:
    if check is None:
        return None
    if check.protected_sha256 != protected_sha256:
        raise IntegrityError(f"{check.key} measured other bytes than its part holds now; delete it and run again")
    return [
        {"purifier": name, "objective_clean": clean, "objective_protected": protected}
        for name, (clean, protected) in check.objective.items()
    ]


def _store_file(destination: Store, path: Path, prefix: str, rows: int) -> dict[str, Any] | None:
    """Writes a file under its own content hash and reads it back; None for a file without rows."""
    if not rows:
        return None
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    size, footer = os.path.getsize(path), pq.ParquetFile(path).metadata
    if footer.num_rows != rows:
        raise IntegrityError(f"{prefix}: the merged file holds {footer.num_rows} rows instead of {rows}")
    key = f"{prefix}-{digest[:12]}.parquet"
    with suppress(AlreadyExists):  # then it holds these bytes already, as its name says and the next lines prove
        destination.put_new_file(key, path)
    if stored_sha256(destination, key) != digest:
        raise IntegrityError(f"{destination.url}/{key} does not hold what was written; delete it and run again")
    return {"key": key, "sha256": digest, "size": size, "rows": rows, "row_groups": footer.num_row_groups}

"""The protected images of a shard beside the originals they were made from, before and after its commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.ids import sha256_hex
from pipeline.manifest import Manifest, rows_of
from pipeline.parts import read_part
from pipeline.plan import Shard, load_index, unit_ids
from pipeline.readers import read_units
from pipeline.schema import output_name
from pipeline.storage import Store
from pipeline.units import group_units
from pipeline.verify.groups import Candidate

_NAMES = ["asset_id", "unit_id", "source_sha256", "protected_sha256"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Specimens:
    """Reads both sides of a shard. Small: pixels are read when they are asked for."""

    destination: Store
    source: Store
    shard: Shard
    config_fp: str
    # None: the shard is not committed yet, and its parts are read.
    manifest: Manifest | None
    subject_column: str | None = None
    class_column: str | None = None

    def candidates(self) -> list[Candidate]:
        """Every protected image, without pixels."""
        return [
            Candidate(
                asset_id=row["asset_id"],
                source_sha256=row["source_sha256"],
                protected_sha256=row["protected_sha256"],
                unit_id=row["unit_id"],
                subject=self._customers(row, self.subject_column),
                class_word=self._customers(row, self.class_column),
            )
            for row in self._rows(_NAMES, None, with_customers=True)
        ]

    def protected(self, wanted: Sequence[Candidate]) -> dict[str, bytes]:
        """Stored bytes by the hash of their original.

        Raises:
            IntegrityError: An image is no longer there, or its bytes are not what its row says.
        """
        hashes = {item.source_sha256 for item in wanted}
        found: dict[str, bytes] = {}
        for row in self._rows([*_NAMES, "image"], {item.unit_id for item in wanted}):
            if row["source_sha256"] in hashes:
                data = row["image"]["bytes"]
                if sha256_hex(data) != row["protected_sha256"]:
                    raise IntegrityError(f"{row['asset_id']}: the stored image does not match its row")
                found[row["source_sha256"]] = data
        return self._complete(found, wanted)

    def originals(self, wanted: Sequence[Candidate]) -> dict[str, bytes]:
        """Original bytes by their hash.

        Raises:
            SourceChanged: The source is no longer what the plan lists.
            IntegrityError: An original is no longer there.
        """
        index = load_index(self.destination, self.shard)
        units = unit_ids(index, self.config_fp, self.shard.rung)
        rows = sorted({units[item.unit_id] for item in wanted})
        hashes = {item.source_sha256 for item in wanted}
        found: dict[str, bytes] = {}
        for group in group_units(rows, index.row_groups):
            for unit in read_units(self.source, index, group):
                for asset in unit.assets:
                    if asset.source_sha256 in hashes and asset.data is not None:
                        found[str(asset.source_sha256)] = asset.data
        return self._complete(found, wanted)

    def _complete(self, found: dict[str, bytes], wanted: Sequence[Candidate]) -> dict[str, bytes]:
        missing = [item.asset_id for item in wanted if item.source_sha256 not in found]
        if missing:
            raise IntegrityError(f"{self.shard.shard_id}: {', '.join(missing[:3])} cannot be found again")
        return found

    def _rows(
        self, columns: list[str], units: set[str] | None, *, with_customers: bool = False
    ) -> Iterator[dict[str, Any]]:
        index = load_index(self.destination, self.shard)
        # A folder of images has no columns beside a Parquet file that has: its subjects are unknown.
        asked = (self.subject_column, self.class_column) if with_customers else ()
        own = [column for column in asked if column is not None and column in index.schema.names]
        if self.manifest is not None:
            for row in rows_of(self.destination, self.manifest, [*columns, *map(output_name, own)]):
                if units is None or row["unit_id"] in units:
                    yield row
            return
        for unit in unit_ids(index, self.config_fp, self.shard.rung):
            if units is None or unit in units:
                key = f"parts/{self.shard.shard_id}/{unit}.parquet"
                wanted = [*columns, "status", *(["customer"] if own else [])]
                for row in read_part(self.destination, key, wanted).to_pylist():
                    if row["status"] == "protected":
                        yield row

    def _customers(self, row: dict[str, Any], column: str | None) -> str | None:
        if column is None:
            return None
        value = row.get(output_name(column)) if self.manifest is not None else (row["customer"] or {}).get(column)
        return None if value is None else str(value)

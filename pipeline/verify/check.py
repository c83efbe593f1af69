"""The sampled check of a shard: read stored images back, purify them, measure the objective that is left."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.decode import decode, model_view
from pipeline.encode import measure
from pipeline.errors import IntegrityError
from pipeline.ids import sha256_hex
from pipeline.job import Job
from pipeline.parts import read_part
from pipeline.plan import Shard, load_index, unit_ids
from pipeline.readers import read_units
from pipeline.scale import to_training_scale
from pipeline.storage import Store, get_json, put_json_new
from pipeline.verify.purify import PURIFIERS
from pipeline.verify.sample import choose_sample
from pipeline.worker import Optimizer

UNPURIFIED = "none"


@dataclass(slots=True, kw_only=True)
class CheckedAsset:
    """One sampled asset with the four cells of each purifier: clean and protected, before and after."""

    asset_id: str
    row: int
    seed: int
    # By purifier: the clean and the protected image at training scale, uint8 (h, w, 3).
    cells: dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]


@dataclass(slots=True, kw_only=True)
class Check:
    """The sampled assets of one unit."""

    shard_id: str
    unit_id: str
    assets: list[CheckedAsset]

    @property
    def key(self) -> str:
        """Where its result goes."""
        return f"checks/{self.shard_id}/{self.unit_id}.json"


def sampled_rows(job: Job, shard: Shard) -> dict[str, dict[int, str]]:
    """The sample of a shard: rows and their asset ids, by unit. Reads two columns of every part."""
    destination = job.destination()
    protected: dict[str, dict[int, str]] = {}
    for unit in unit_ids(load_index(destination, shard), job.config_fp):
        table = read_part(destination, f"parts/{shard.shard_id}/{unit}.parquet", ["row", "asset_id", "status"])
        protected[unit] = {row["row"]: row["asset_id"] for row in table.to_pylist() if row["status"] == "protected"}
    names = [name for rows in protected.values() for name in rows.values()]
    chosen = choose_sample(names, job.config.job.check)
    picked = {unit: {r: name for r, name in rows.items() if name in chosen} for unit, rows in protected.items()}
    return {unit: rows for unit, rows in picked.items() if rows}


def prepare_checks(job: Job, shard: Shard) -> Iterator[Check]:
    """Yields the checks of a shard that are not stored yet, with originals and stored images read and purified.

    Raises:
        IntegrityError: A stored image is not what its row says, or breaks the budget.
        SourceChanged: The original is no longer there.
    """
    destination, source = job.destination(), job.source()
    index = load_index(destination, shard)
    ranges = unit_ids(index, job.config_fp)
    done = {item.key for item in destination.list(f"checks/{shard.shard_id}/")}
    for unit, rows in sampled_rows(job, shard).items():
        check = Check(shard_id=shard.shard_id, unit_id=unit, assets=[])
        if check.key in done:
            continue
        (originals,) = read_units(source, index, [ranges[unit]])
        part = read_part(destination, f"parts/{shard.shard_id}/{unit}.parquet")
        stored = {row["row"]: row for row in part.to_pylist()}
        for asset in originals.assets:
            if asset.row in rows:
                check.assets.append(_cells(job, asset.data or b"", stored[asset.row]))
        yield check


def _cells(job: Job, original: bytes, row: dict[str, Any]) -> CheckedAsset:
    data = row["image"]["bytes"]
    mismatch = IntegrityError(f"{row['asset_id']}: the stored image does not match its row in unit {row['unit_id']}")
    if sha256_hex(data) != row["protected_sha256"]:
        raise mismatch
    clean = decode(original, limits=job.limits)
    measured = measure(data, clean, job.limits)
    if measured.pixel_sha256 != row["pixel_sha256"]:
        raise mismatch
    if row["format"] != "JPEG" and measured.linf_levels > math.floor(job.eps_levels):
        raise IntegrityError(f"{row['asset_id']}: the stored image is {measured.linf_levels} levels off")
    pair = (model_view(clean), model_view(decode(data, limits=job.limits)))
    cells = {UNPURIFIED: pair} | {name: (purify(pair[0]), purify(pair[1])) for name, purify in PURIFIERS.items()}
    scaled = {name: (_at_scale(job, a), _at_scale(job, b)) for name, (a, b) in cells.items()}
    return CheckedAsset(asset_id=row["asset_id"], row=row["row"], seed=row["seed"], cells=scaled)


def _at_scale(job: Job, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """What an attacker's trainer makes of an image, whatever the resolution policy."""
    return to_training_scale(pixels, job.base_size)


def measure_check(optimizer: Optimizer, check: Check) -> dict[str, Any]:
    """The result of one check, as it is stored: the objective of every cell, by row and purifier."""
    rows: dict[str, Any] = {}
    for asset in check.assets:
        clean = asset.cells[UNPURIFIED][0]
        images = [clean, *(image for pair in asset.cells.values() for image in pair)]
        values = optimizer.objective(images, asset.seed)[1:]
        pairs = {name: [values[2 * i], values[2 * i + 1]] for i, name in enumerate(asset.cells)}
        rows[str(asset.row)] = {"asset_id": asset.asset_id, "objective": pairs}
    return {"shard_id": check.shard_id, "unit_id": check.unit_id, "rows": rows}


def store_check(job: Job, key: str, result: Mapping[str, Any]) -> None:
    """Writes the result, create-only: a check that another run stored first stays."""
    put_json_new(job.destination(), key, {"writer_id": uuid.uuid4().hex, **result})


def stored_checks(destination: Store, shard: Shard) -> dict[int, dict[str, list[float]]]:
    """Objectives (clean, protected) by row and purifier, of every stored check of the shard."""
    found: dict[int, dict[str, list[float]]] = {}
    for item in destination.list(f"checks/{shard.shard_id}/"):
        for row, entry in get_json(destination, item.key)["rows"].items():
            found[int(row)] = entry["objective"]
    return found

"""The sampled check of a shard: read stored images back, purify them, measure the objective that is left."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.decode import decode, model_view
from pipeline.encode import measure
from pipeline.errors import IntegrityError
from pipeline.ids import sha256_hex
from pipeline.job import Job
from pipeline.parts import read_part
from pipeline.plan import Shard, load_index, unit_ids
from pipeline.readers import read_units
from pipeline.scale import to_training_scale
from pipeline.storage import Store, get_json, in_parallel, put_json_new
from pipeline.units import group_units
from pipeline.verify.attack_models import AttackModels
from pipeline.verify.purifiers import PURIFIERS
from pipeline.verify.sample import choose_sample
from pipeline.verify.scores import NO_PURIFIER
from pipeline.worker import Optimizer

NO_MODELS = AttackModels({})
AT_TRAINING_SCALE = "@training-scale"


Pair = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
"""The clean and the protected image, uint8 (h, w, 3)."""


@dataclass(slots=True, kw_only=True)
class CheckedAsset:
    """One sampled asset with the four cells of each purifier: clean and protected, before and after."""

    row: int
    seed: int
    # Names the stored bytes that were measured.
    protected_sha256: str
    # By purifier: the clean and the protected image at training scale, uint8 (h, w, 3). Purifiers that need a model
    # are not in here: they run where the optimizer is.
    cells: dict[str, Pair]


@dataclass(slots=True, kw_only=True)
class Check:
    """The sampled assets of one unit."""

    shard_id: str
    unit_id: str
    rung: int
    assets: list[CheckedAsset]

    @property
    def key(self) -> str:
        """Where its result goes."""
        return f"{checks_of(self.shard_id, self.rung)}{self.unit_id}.json"


def checks_of(shard_id: str, rung: int) -> str:
    """The prefix under which the results of a shard on one rung lie."""
    return f"checks/{shard_id}/{rung:02d}/"


def sampled_rows(job: Job, shard: Shard) -> dict[str, dict[int, str]]:
    """The sample of a shard: rows and their asset ids, by unit. Reads two columns of every part."""
    destination = job.destination()
    places: dict[str, tuple[str, int]] = {}
    for unit in unit_ids(load_index(destination, shard), job.config_fp, shard.rung):
        table = read_part(destination, f"parts/{shard.shard_id}/{unit}.parquet", ["row", "asset_id", "status"])
        for row in table.to_pylist():
            if row["status"] == "protected":
                places.setdefault(row["asset_id"], (unit, row["row"]))  # customers' ids may occur twice
    chosen = choose_sample(places, job.config.job.check)
    picked: dict[str, dict[int, str]] = {}
    for name, (unit, number) in places.items():
        if name in chosen:
            picked.setdefault(unit, {})[number] = name
    return picked


def prepare_checks(job: Job, shard: Shard) -> Iterator[Check]:
    """Yields the checks of a shard that are not stored yet, with originals and stored images read and purified.

    Raises:
        IntegrityError: A stored image is not what its row says, or breaks the budget.
        SourceChanged: The original is no longer there.
    """
    destination, source = job.destination(), job.source()
    index = load_index(destination, shard)
    ranges = unit_ids(index, job.config_fp, shard.rung)
    done = {item.key for item in destination.list(checks_of(shard.shard_id, shard.rung))}
    sample = sampled_rows(job, shard)
    checks = {ranges[unit]: Check(shard_id=shard.shard_id, unit_id=unit, rung=shard.rung, assets=[]) for unit in sample}
    todo = sorted(rows for rows, check in checks.items() if check.key not in done)
    for group in group_units(todo, index.row_groups):
        for rows, originals in zip(group, read_units(source, index, group), strict=True):
            check = checks[rows]
            part = read_part(destination, f"parts/{shard.shard_id}/{check.unit_id}.parquet")
            stored = {row["row"]: row for row in part.to_pylist()}
            for asset in originals.assets:
                if asset.row in sample[check.unit_id]:
                    check.assets.append(_cells(job, asset.data or b"", stored[asset.row], shard.rung))
            yield check


def _cells(job: Job, original: bytes, row: dict[str, Any], rung: int) -> CheckedAsset:
    data = row["image"]["bytes"]
    mismatch = IntegrityError(f"{row['asset_id']}: the stored image does not match its row in unit {row['unit_id']}")
    if sha256_hex(data) != row["protected_sha256"]:
        raise mismatch
    clean = decode(original, limits=job.limits)
    measured = measure(data, clean, job.limits)
    if measured.pixel_sha256 != row["pixel_sha256"]:
        raise mismatch
    if row["format"] != "JPEG" and measured.linf_levels > math.floor(job.eps_levels(rung)):
        raise IntegrityError(f"{row['asset_id']}: the stored image is {measured.linf_levels} levels off")
    pair = (model_view(clean), model_view(decode(data, limits=job.limits)))
    # What an attacker's trainer makes of an image, whatever the resolution policy.
    small = (to_training_scale(pair[0], job.base_size), to_training_scale(pair[1], job.base_size))
    cells = {NO_PURIFIER: small}
    for name in job.config.job.check.purifiers:
        if PURIFIERS[name].needs is None:
            # The attacker may purify the file, or what the trainer sees; on a large image the first does little.
            full = _purified(name, pair, row["seed"], NO_MODELS)
            cells[name] = (to_training_scale(full[0], job.base_size), to_training_scale(full[1], job.base_size))
            cells[name + AT_TRAINING_SCALE] = _purified(name, small, row["seed"], NO_MODELS)
    return CheckedAsset(row=row["row"], seed=row["seed"], protected_sha256=row["protected_sha256"], cells=cells)


def _purified(name: str, pair: Pair, seed: int, models: AttackModels) -> Pair:
    """Both images after a purifier that draws the same random numbers for either."""
    images = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None] for image in pair]
    clean, protected = (PURIFIERS[name].purify(image, seeds=[seed], models=models) for image in images)
    return clean[0].permute(1, 2, 0).numpy(), protected[0].permute(1, 2, 0).numpy()


def measure_check(optimizer: Optimizer, check: Check, models: AttackModels) -> dict[str, Any]:
    """The result of one check, as it is stored: the objective of every cell, by row and purifier."""
    rows: dict[str, Any] = {}
    wanted = optimizer.job.config.job.check.purifiers
    for asset in check.assets:
        small = asset.cells[NO_PURIFIER]
        modelled = [name for name in wanted if PURIFIERS[name].needs is not None]
        cells = asset.cells | {
            name + AT_TRAINING_SCALE: _purified(name, small, asset.seed, models) for name in modelled
        }
        images = [small[0], *(image for pair in cells.values() for image in pair)]
        values = optimizer.objective(images, asset.seed, check.rung)[1:]
        pairs = {name: [values[2 * i], values[2 * i + 1]] for i, name in enumerate(cells)}
        rows[str(asset.row)] = {"protected_sha256": asset.protected_sha256, "objective": pairs}
    return {"shard_id": check.shard_id, "unit_id": check.unit_id, "rows": rows}


def store_check(job: Job, key: str, result: Mapping[str, Any]) -> None:
    """Writes the result, create-only: a check that another run stored first stays."""
    put_json_new(job.destination(), key, {"writer_id": uuid.uuid4().hex, **result})


@dataclass(frozen=True, slots=True)
class StoredCheck:
    """The stored result for one row."""

    key: str
    # Names the stored bytes that were measured.
    protected_sha256: str
    # Objective of the clean and the protected image, by purifier.
    objective: dict[str, list[float]]


def stored_checks(destination: Store, shard: Shard) -> dict[int, StoredCheck]:
    """Every stored check of the shard, by row."""
    keys = [item.key for item in destination.list(checks_of(shard.shard_id, shard.rung))]
    found: dict[int, StoredCheck] = {}
    for key, document in zip(keys, in_parallel(partial(get_json, destination), keys), strict=True):
        for row, entry in document["rows"].items():
            found[int(row)] = StoredCheck(key, entry["protected_sha256"], entry["objective"])
    return found

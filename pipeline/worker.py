"""What happens to one unit: load it, protect it, store its part. Knows no Ray; every step can die and be repeated."""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import metrics
from pipeline.assets import Asset, Unit
from pipeline.decode import decode, model_view
from pipeline.errors import AlreadyExists, AssetError, CrashLoop, ErrorInfo, FatalWorkerError, ProtectError
from pipeline.fuse import begin
from pipeline.ids import asset_seed
from pipeline.job import NO_MODEL, Job, model_folder
from pipeline.parts import build_part
from pipeline.plan import Shard, load_index, unit_ids
from pipeline.readers import read_units
from pipeline.scale import Box, blend_tiles, tile_boxes, to_training_scale
from protectors.base import ImageFacts, ImageProtector
from protectors.loading import load_for
from protectors.registry import protector_class

# Decoded pixels that may travel with one unit; what is beyond is decoded by the optimizer, one image at a time.
TRAVELLING_BYTES = 256_000_000
DEVICE_FAULT_EXIT = 17
GPU_BATCH = 8
MEMORY_ERRORS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of one unit. Small: the driver collects these."""

    shard_id: str
    unit_id: str
    protected: int = 0
    # Error types of the quarantined assets, and one of their messages.
    quarantined: list[str] = field(default_factory=list)
    example: str = ""


def load_units(job: Job, shard: Shard, wanted: Sequence[str]) -> Iterator[Unit]:
    """Reads and decodes units of a shard that lie together, one at a time."""
    index = load_index(job.destination(), shard)
    ranges = unit_ids(index, job.config_fp, shard.rung)
    source, method = job.source(), job.config.job.method.name
    since = time.perf_counter()
    for name, rows in zip(wanted, read_units(source, index, [ranges[name] for name in wanted]), strict=True):
        unit = Unit(shard_id=shard.shard_id, unit_id=name, rung=shard.rung, assets=rows.assets, customer=rows.customer)
        # Ray repeats this stage for ever when an image kills it, so it has a fuse like the optimizer's.
        attempt = begin(job.destination(), f"loads/{name}", job.run_id)
        metrics.attempt_begun("load", attempt.number)
        travelling = 0
        for asset in unit.healthy:
            if not attempt.enter(asset.row):
                asset.failure = ErrorInfo("decode", CrashLoop.__name__, "the worker died twice on this image")
                continue
            asset.seed = asset_seed(str(asset.source_sha256), job.config_fp)
            try:
                view = optimizer_view(job, asset)
            except AssetError as error:
                asset.failure = ErrorInfo.of(error, "decode")
                continue
            travelling += view.nbytes
            asset.view = view if travelling <= TRAVELLING_BYTES else None
        attempt.finish()
        for asset, subject in zip(unit.assets, _subjects(job, unit), strict=True):
            asset.subject = subject
        metrics.READ_BYTES.record(sum(len(asset.data or b"") for asset in unit.assets), method=method)
        metrics.unit_done("load", method, images=len(unit.assets), since=since)
        yield unit
        since = time.perf_counter()


def _subjects(job: Job, unit: Unit) -> Sequence[str | None]:
    """The subject of each row; None where the configuration names no column, the shard has none, or the row is null."""
    column = job.config.job.method.subject_column
    if column is None or column not in unit.customer.column_names:  # that some shard has it, the plan has seen
        return [None] * len(unit.assets)
    return [None if value is None else str(value) for value in unit.customer.column(column).to_pylist()]


def optimizer_view(job: Job, asset: Asset) -> npt.NDArray[np.uint8]:
    """The image as the optimizer sees it: upright sRGB uint8 (h, w, 3), at training scale or at its own size.

    Raises:
        DecodeError: The bytes are no image that can be protected.
    """
    pixels = model_view(decode(asset.data or b"", limits=job.limits))
    if job.config.job.output.resolution == "training-scale":
        return to_training_scale(pixels, job.base_size)
    return pixels


class Optimizer:
    """Holds the model and protects units. One per actor.

    Args:
        job: The job; the model is loaded here.
        device: "cpu" or "cuda".
    """

    def __init__(self, job: Job, device: str) -> None:
        if device == "cpu":
            # Sums are rounded by thread count: a fixed number keeps pixels equal on every pool size.
            torch.set_num_threads(job.config.run.threads)
        chosen = protector_class(job.config.job.method.name)
        model = None if job.model_digest == NO_MODEL else _load_model(job, chosen, device)
        self.job = job
        self.protectors: list[ImageProtector[Any, Any]] = [
            chosen(chosen.config_type.from_dict(config), model) for config in job.ladder
        ]
        self.batch_size = job.config.run.batch_size or (GPU_BATCH if device == "cuda" else 1)
        self.destination = job.destination()
        self.device = torch.cuda.get_device_name() if device == "cuda" else f"cpu {platform.machine()}"
        self.out_of_memory = 0

    def protect(self, unit: Unit) -> Unit:
        """Fills in ``delta`` and facts of every healthy asset, or its failure. Marks the attempt first."""
        if not unit.healthy:
            return unit
        run, since = self.job.config.run, time.perf_counter()
        attempt = begin(self.destination, f"attempts/{unit.unit_id}", self.job.run_id, max_deaths=run.max_deaths)
        metrics.attempt_begun("protect", attempt.number)
        method, images = self.job.config.job.method.name, len(unit.healthy)
        for asset in unit.healthy:
            asset.attempt, asset.device = attempt.number, self.device
        # An image that did not travel is large: it is decoded alone, so that one of them is in memory at a time.
        travelled = [asset for asset in unit.healthy if asset.view is not None]
        for together in _subject_groups(travelled) if attempt.isolate else [travelled]:
            if not attempt.isolate or attempt.enter_group(together[0].row):
                self._protect_assets(together, unit.rung)
        for asset in unit.assets:
            if asset.failure is None and asset.delta is None and attempt.enter(asset.row):
                self._protect_assets([asset], unit.rung)
            elif asset.failure is None and asset.delta is None:
                asset.failure = ErrorInfo("protect", CrashLoop.__name__, "the worker died twice on this image")
            asset.view = None  # the next stage decodes at full size
        attempt.finish()
        metrics.unit_done("protect", method, images=images, since=since)
        return unit

    def objective(self, images: Sequence[npt.NDArray[np.uint8]], seed: int, rung: int) -> list[float]:
        """The method's objective on versions of one image, the first being the clean one; all of one size."""
        protector = self.protectors[rung]
        batch = _tensor(images)
        values: list[float] = []
        for image in batch:
            value = protector.objective(image[None], originals=batch[:1], prompts=self._prompts(1), seeds=[seed])
            values.append(float(value[0]))
        return values

    def _protect_assets(self, assets: Sequence[Asset], rung: int) -> None:
        groups: dict[tuple[int, int], list[_Tile]] = defaultdict(list)
        for asset in assets:
            view = asset.view if asset.view is not None else optimizer_view(self.job, asset)
            for number, box in enumerate(tile_boxes(view.shape[0], view.shape[1], self.job.base_size)):
                tile = view[box.top : box.top + box.height, box.left : box.left + box.width]
                seed = int(asset.seed or 0)
                groups[tile.shape[0], tile.shape[1]].append(
                    _Tile(asset, box, tile, seed if number == 0 else asset_seed(f"{seed}", "", str(number)))
                )
        tiles = [tile for group in groups.values() for tile in group]  # rows of a method's batch have one shape
        for group in groups.values():
            for batch in _batches(group, self.batch_size):
                self._protect_tiles(batch, rung)
        for asset in assets:
            own = [tile for tile in tiles if tile.asset is asset]
            if asset.failure is None:
                _join(asset, own)

    def _protect_tiles(self, tiles: Sequence[_Tile], rung: int) -> None:
        """Protects tiles of one shape. A batch that fails is halved until the tile at fault stands alone.

        That may cut a subject in two: its images are then protected all the same, as two smaller groups.
        """
        try:
            result = self.protectors[rung].protect(
                _tensor([tile.pixels for tile in tiles]),
                prompts=self._prompts(len(tiles)),
                groups=[tile.group for tile in tiles],
                seeds=[tile.seed for tile in tiles],
            )
        except Exception as error:  # noqa: BLE001 - whatever a method raises must not take the other images down
            exit_on_device_fault(error)
            if len(tiles) > 1:
                middle = len(tiles) // 2
                self._protect_tiles(tiles[:middle], rung)
                self._protect_tiles(tiles[middle:], rung)
            else:
                self._count_out_of_memory(error)
                tiles[0].asset.failure = ErrorInfo.of(error, "protect")
            return
        self.out_of_memory = 0
        levels = (result.images * 255).round().to(torch.int16).permute(0, 2, 3, 1).numpy()
        for tile, saved, facts in zip(tiles, levels, result.facts, strict=True):
            if facts.failed is not None:
                tile.asset.failure = ErrorInfo.of(ProtectError(facts.failed), "protect")
            tile.delta = (saved - tile.pixels.astype(np.int16)).astype(np.int8)
            tile.facts = facts

    def _count_out_of_memory(self, error: Exception) -> None:
        """Stops the run, before anything is stored, when single images run out of memory one after the other.

        Then the device is too small or somebody else fills it; quarantine would write good images off.
        """
        if not isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
            return
        self.out_of_memory += 1
        if self.out_of_memory >= MEMORY_ERRORS:
            raise FatalWorkerError(
                f"{self.device} ran out of memory on {MEMORY_ERRORS} single images in a row ({error}). "
                "Free it, use --precision bfloat16 or a smaller model; then run the same command to go on."
            )

    def _prompts(self, count: int) -> list[str] | None:
        prompt = self.job.config.job.method.prompt
        return None if prompt is None else [prompt] * count


def _subject_groups(assets: Sequence[Asset]) -> list[list[Asset]]:
    """The assets that share their subject with others, by subject, in the order of their first rows."""
    subjects: dict[str, list[Asset]] = {}
    for asset in assets:
        if asset.subject is not None:
            subjects.setdefault(asset.subject, []).append(asset)
    return [group for group in subjects.values() if len(group) > 1]


def _load_model(job: Job, chosen: type[ImageProtector[Any, Any]], device: str) -> Any:
    precision = getattr(torch, job.config.job.method.precision)
    model = load_for(chosen, model_folder(job.model), device=device, dtype=precision)
    if model.digest != job.model_digest:
        raise FatalWorkerError(f"this machine holds another '{job.model}' than the one that planned the run")
    return model


@dataclass(slots=True)
class _Tile:
    asset: Asset
    box: Box
    pixels: npt.NDArray[np.uint8]
    seed: int
    delta: npt.NDArray[np.int8] | None = None
    facts: ImageFacts | None = None

    @property
    def group(self) -> str:
        """Tiles of one subject are one group; a tile of none is its own."""
        if self.asset.subject is not None:
            return f"subject {self.asset.subject}"
        return f"row {self.asset.row} at {self.box.top}, {self.box.left}"


def _batches(tiles: Sequence[_Tile], size: int) -> Iterator[list[_Tile]]:
    """Batches of about this many tiles. A group is never cut: a larger one is a batch of its own."""
    groups: dict[str, list[_Tile]] = {}
    for tile in tiles:
        groups.setdefault(tile.group, []).append(tile)
    batch: list[_Tile] = []
    for group in groups.values():
        if batch and len(batch) + len(group) > size:
            yield batch
            batch = []
        batch = batch + group
    if batch:
        yield batch


def _join(asset: Asset, tiles: Sequence[_Tile]) -> None:
    height = max(tile.box.top + tile.box.height for tile in tiles)
    width = max(tile.box.left + tile.box.width for tile in tiles)
    facts = [tile.facts for tile in tiles if tile.facts is not None]
    deltas = [tile.delta for tile in tiles if tile.delta is not None]
    asset.delta = blend_tiles(deltas, [tile.box for tile in tiles], height, width)
    asset.steps = max(fact.steps for fact in facts)
    asset.objective_before = float(np.mean([fact.objective_before for fact in facts]))
    asset.objective_after = float(np.mean([fact.objective_after for fact in facts]))


def _tensor(images: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
    stacked = torch.from_numpy(np.stack(images))
    return stacked.permute(0, 3, 1, 2).float().div(255)


def exit_on_device_fault(error: Exception) -> None:
    """Ends the process on a CUDA fault: every later image would fail in it too. Ray starts a new worker."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
    elif isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        os._exit(DEVICE_FAULT_EXIT)


def store_unit(job: Job, unit: Unit) -> Receipt:
    """Encodes, measures and writes the unit's part with one create-only PUT; a part that is there already wins."""
    since = time.perf_counter()
    attempt = begin(job.destination(), f"stores/{unit.unit_id}", job.run_id)
    metrics.attempt_begun("store", attempt.number)
    data = build_part(job, unit, attempt)
    attempt.finish()
    # Where another run stored the unit first, its part stays: a finalizer may be reading it.
    with suppress(AlreadyExists):
        job.destination().put_new(unit.part_key, data)
        _record_part(unit, data, job.config.job.method.name)
    metrics.unit_done("store", job.config.job.method.name, images=len(unit.assets), since=since)
    failures = [(asset, asset.failure) for asset in unit.assets if asset.failure is not None]
    return Receipt(
        shard_id=unit.shard_id,
        unit_id=unit.unit_id,
        protected=len(unit.assets) - len(failures),
        quarantined=[failure.error_type for _, failure in failures],
        example="".join(f"{asset.asset_id}: {failure.message}" for asset, failure in failures[:1]),
    )


def _record_part(unit: Unit, data: bytes, method: str) -> None:
    """Records a part that the store accepted, with what was measured on the bytes in it."""
    metrics.PARTS_COMMITTED.record(method=method)
    metrics.WRITTEN_BYTES.record(len(data), method=method, stage="store")
    stored = pq.ParquetFile(pa.BufferReader(data)).read(["eps_linf_measured", "psnr"], use_threads=False)
    for row, asset in zip(stored.to_pylist(), unit.assets, strict=True):
        if asset.failure is not None:
            metrics.quarantined(asset.failure, method)
            continue
        metrics.IMAGES_PROTECTED.record(method=method)
        metrics.LINF.record(row["eps_linf_measured"], method=method)
        if row["psnr"] is not None:  # nothing differs
            metrics.PSNR.record(row["psnr"], method=method)
        if asset.objective_before is not None and asset.objective_after is not None:
            metrics.OBJECTIVE_GAIN.record(asset.objective_after - asset.objective_before, method=method)

"""A unit from its source to its stored part: budget on stored bytes, failures stay alone, equal pixels anywhere."""

from __future__ import annotations

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.decode import DecodeLimits, decode
from pipeline.encode import measure
from pipeline.errors import FatalWorkerError
from pipeline.fuse import begin
from pipeline.ids import asset_seed, sha256_hex
from pipeline.job import Job
from pipeline.parts import build_part
from pipeline.plan import Plan, Shard
from pipeline.run import open_units, prepare
from pipeline.worker import Optimizer, load_units, store_unit
from protectors.base import Batch
from protectors.fake import FakeProtector
from tests.pipeline import images
from tests.pipeline.archives import photo, photos, write_folder, write_parquet, write_tar
from tests.pipeline.local_job import job_config, part_rows, protect_shard, tree

LIMITS = DecodeLimits()


def prepared(tmp_path: Path, files: dict[str, bytes], **sections: Any) -> tuple[Job, Plan, Shard]:
    """A planned job over a folder; one shard."""
    job, plan = prepare(job_config(write_folder(tmp_path / "in", files), tmp_path / "out", **sections))
    (shard,) = plan.shards
    return job, plan, shard


def protected(tmp_path: Path, files: dict[str, bytes], **sections: Any) -> dict[str, dict[str, Any]]:
    """The stored rows by asset id."""
    job, _, shard = prepared(tmp_path, files, **sections)
    protect_shard(job, shard)
    return {row["asset_id"]: row for row in part_rows(job, shard)}


def pixel_hashes(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """By source image, wherever it lay."""
    return {row["source_sha256"]: row["pixel_sha256"] for row in rows.values()}


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("eps", [1, 4, 7.65])
def test_the_budget_holds_on_stored_bytes(tmp_path: Path, format: str, eps: float) -> None:
    files = {f"{n}.png": photo(n) for n in range(3)}
    rows = protected(tmp_path, files, method={"eps": eps}, output={"format": format})
    for name, row in rows.items():
        data = row["image"]["bytes"]
        before, after = decode(files[name], limits=LIMITS), decode(data, limits=LIMITS)
        linf = int(np.abs(after.pixels.astype(int) - before.pixels.astype(int)).max())
        assert row["eps_linf_measured"] == linf > 0
        assert format == "jpeg" or linf <= math.floor(eps)
        assert row["eps_levels"] == eps
        measured = measure(data, before, LIMITS)
        assert (row["psnr"], row["ssim"], row["pixel_sha256"]) == (measured.psnr, measured.ssim, measured.pixel_sha256)
        assert row["protected_sha256"] == sha256_hex(data)
        assert row["source_sha256"] == sha256_hex(files[name])
        assert row["format"] == format.upper()
        assert row["image"]["path"] == f"{name.removesuffix('.png')}.{format.replace('jpeg', 'jpg')}"
        assert row["objective_after"] > row["objective_before"]


KINDS = {
    "grey": images.plain("PNG", "L"),
    "grey16": images.grey16(),
    "grey-alpha": images.grey_alpha_png(),
    "alpha": images.rgba_png(),
    "palette": images.palette_png(transparent=True),
    "cmyk": images.cmyk_jpeg(),
    "rotated": images.oriented("JPEG", 6),
    "mirrored": images.oriented("PNG", 7),
}


@pytest.mark.parametrize("resolution", ["training-scale", "native"])
def test_every_kind_of_image(tmp_path: Path, resolution: str) -> None:
    files = {f"{name}.jpg" if name in ("cmyk", "rotated") else f"{name}.png": data for name, data in KINDS.items()}
    rows = protected(tmp_path, files, output={"resolution": resolution})
    assert {row["status"] for row in rows.values()} == {"protected"}
    for name, row in rows.items():
        before, after = decode(files[name], limits=LIMITS), decode(row["image"]["bytes"], limits=LIMITS)
        assert (after.orientation, after.grey) == (before.orientation, before.grey)
        assert (after.alpha is None) == (before.alpha is None)
        if after.alpha is not None and before.alpha is not None:
            np.testing.assert_array_equal(after.alpha, before.alpha)
        assert 0 < row["eps_linf_measured"] <= 4
        assert (row["source_format"], row["source_mode"]) == (before.source_format, before.source_mode)


def test_ill_images_do_not_take_others_down(tmp_path: Path) -> None:
    files = {f"{n}.png": photo(n) for n in range(6)}
    files |= {"1.png": photo(1, marker=7), "3.png": photo(3, marker=9), "4.png": b"no image", "5.png": b""}
    markers = {"overrides": {"raise_on": 7, "nan_on": 9}}
    rows = protected(tmp_path / "a", files, method=markers, run={"batch_size": 4})
    found = {name: (row["status"], row["stage"], row["error_type"]) for name, row in rows.items()}
    assert found == {
        "0.png": ("protected", None, None),
        "1.png": ("quarantined", "protect", "RuntimeError"),
        "2.png": ("protected", None, None),
        "3.png": ("quarantined", "protect", "ProtectError"),
        "4.png": ("quarantined", "decode", "DecodeError"),
        "5.png": ("quarantined", "fetch", "FetchError"),
    }
    assert all(
        row["image"] is None and row["pixel_sha256"] is None for n, row in rows.items() if n not in "0.png 2.png"
    )
    healthy = protected(tmp_path / "b", {name: files[name] for name in ("0.png", "2.png")}, method=markers)
    assert {rows[name]["pixel_sha256"] for name in healthy} == {row["pixel_sha256"] for row in healthy.values()}


def test_pixels_do_not_depend_on_place_order_or_batch(tmp_path: Path) -> None:
    data = photos(6)
    job, plan = prepare(job_config(write_parquet(tmp_path / "p" / "a.parquet", data), tmp_path / "p-out"))
    protect_shard(job, plan.shards[0])
    seeds = {row["source_sha256"]: row["seed"] for row in part_rows(job, plan.shards[0])}
    assert seeds == {sha256_hex(item): asset_seed(sha256_hex(item), job.config_fp) for item in data}
    assert len(set(seeds.values())) == 6
    wanted = {row["source_sha256"]: row["pixel_sha256"] for row in part_rows(job, plan.shards[0])}
    reverse = {f"{9 - n}.png": item for n, item in enumerate(data)}
    assert pixel_hashes(protected(tmp_path / "f", reverse, run={"batch_size": 4})) == wanted


def test_isolation_gives_the_same_pixels(tmp_path: Path) -> None:
    files = {f"{n}.png": photo(n) for n in range(4)}
    calm = protected(tmp_path / "calm", files, run={"batch_size": 4})
    job, _, shard = prepared(tmp_path / "ill", files, run={"batch_size": 4})
    ((unit, _),) = open_units(job.destination(), shard, job.config_fp)[0]
    begin(job.destination(), f"attempts/{unit}", job.run_id, max_deaths=9)  # a worker that died
    protect_shard(job, shard)
    rows = {row["asset_id"]: row for row in part_rows(job, shard)}
    assert pixel_hashes(rows) == pixel_hashes(calm)
    assert {row["attempt"] for row in rows.values()} == {1}
    marks = [key for key in tree(tmp_path / "ill" / "out") if key.startswith(f"attempts/{unit}/{job.run_id}/01-row-")]
    assert len(marks) == 5  # each image, and that the last one survived


def test_an_image_that_kills_its_worker_is_set_aside(tmp_path: Path) -> None:
    job, _, shard = prepared(tmp_path, {f"{n}.png": photo(n) for n in range(4)})
    ((unit, _),) = open_units(job.destination(), shard, job.config_fp)[0]
    begin(job.destination(), f"attempts/{unit}", job.run_id, max_deaths=9)
    for _ in range(2):
        attempt = begin(job.destination(), f"attempts/{unit}", job.run_id, max_deaths=9)
        for row in range(3):
            attempt.enter(row)
    (receipt,) = protect_shard(job, shard)
    assert (receipt.protected, receipt.quarantined) == (3, ["CrashLoop"])
    rows = part_rows(job, shard)
    assert [row["error_type"] for row in rows] == [None, None, "CrashLoop", None]
    assert [row["stage"] for row in rows] == [None, None, "protect", None]
    assert receipt.example == "2.png: the worker died twice on this image"


@pytest.mark.parametrize(("prefix", "stage"), [("loads", "decode"), ("stores", "encode")])
def test_an_image_that_kills_the_stages_around_is_set_aside(tmp_path: Path, prefix: str, stage: str) -> None:
    job, _, shard = prepared(tmp_path, {f"{n}.png": photo(n) for n in range(4)})
    ((unit, _),) = open_units(job.destination(), shard, job.config_fp)[0]
    begin(job.destination(), f"{prefix}/{unit}", job.run_id)
    for _ in range(2):
        attempt = begin(job.destination(), f"{prefix}/{unit}", job.run_id)
        for row in range(2):
            attempt.enter(row)
    (receipt,) = protect_shard(job, shard)
    assert (receipt.protected, receipt.quarantined) == (3, ["CrashLoop"])
    rows = part_rows(job, shard)
    assert [(row["stage"], row["error_type"]) for row in rows] == [
        (None, None),
        (stage, "CrashLoop"),
        (None, None),
        (None, None),
    ]
    assert {row["attempt"] for row in rows} == {0}  # the optimizer's count


def test_results_that_are_lost_blame_no_image(tmp_path: Path) -> None:
    job, _, shard = prepared(tmp_path, {f"{n}.png": photo(n) for n in range(3)})
    ((name, _),) = open_units(job.destination(), shard, job.config_fp)[0]
    optimizer = Optimizer(job, "cpu")
    for _ in range(4):  # Ray repeats whatever led to a result that it has lost
        (unit,) = load_units(job, shard, [name])
        receipt = store_unit(job, optimizer.protect(unit))
        assert (receipt.protected, receipt.quarantined, receipt.example) == (3, [], "")


def test_views_stay_behind(tmp_path: Path) -> None:
    files = {"a.png": photo(1), "b.png": photo(2, marker=7), "c.png": b"no"}
    job, _, shard = prepared(tmp_path, files, method={"overrides": {"raise_on": 7}})
    ((name, _),) = open_units(job.destination(), shard, job.config_fp)[0]
    (unit,) = load_units(job, shard, [name])
    assert [asset.view is None for asset in unit.assets] == [False, False, True]
    assert [asset.view is None for asset in Optimizer(job, "cpu").protect(unit).assets] == [True, True, True]


def test_rows_say_where_they_were_made(tmp_path: Path) -> None:
    rows = protected(tmp_path, {"a.png": photo(1), "b.png": b"no"})
    good, bad = rows["a.png"], rows["b.png"]
    assert (good["device"], good["torch_version"]) == (f"cpu {platform.machine()}", version("torch"))
    assert (bad["device"], bad["torch_version"]) == (None, None)


class Short:
    """Stands for the protector's work on a device whose memory some images do not fit into."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, error: type[Exception], fits: set[int], most: int) -> None:
        work = FakeProtector._perturb

        def perturb(protector: FakeProtector, batch: Batch, progress: Any) -> torch.Tensor:
            markers = {round(float(image[0, 0, 0]) * 255) for image in batch.originals}
            self.batches.append(len(batch.originals))
            if len(batch.originals) > most or not markers <= fits:
                raise error("no memory left")
            return work(protector, batch, progress)

        self.batches: list[int] = []
        monkeypatch.setattr(FakeProtector, "_perturb", perturb)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("error", [MemoryError, torch.cuda.OutOfMemoryError])
def test_a_device_without_memory_stops_the_run_before_anything_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], batch_size: int
) -> None:
    job, _, shard = prepared(tmp_path, {f"{n}.png": photo(n) for n in range(6)}, run={"batch_size": batch_size})
    Short(monkeypatch, error=error, fits=set(), most=8)
    with pytest.raises(FatalWorkerError, match=r"ran out of memory on 3 single images in a row \(no memory left\)"):
        protect_shard(job, shard)
    assert list(job.destination().list("parts/")) == []


def test_memory_errors_add_up_over_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _, shard = prepared(tmp_path, {f"{n}.png": photo(n) for n in range(4)}, archive={"unit_assets": 2})
    Short(monkeypatch, error=MemoryError, fits=set(), most=8)
    with pytest.raises(FatalWorkerError, match="ran out of memory"):
        protect_shard(job, shard)
    assert len(list(job.destination().list("parts/"))) == 1


def test_a_batch_that_is_too_large_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{n}.png": photo(n) for n in range(6)}
    calm = protected(tmp_path / "calm", files)
    short = Short(monkeypatch, error=torch.cuda.OutOfMemoryError, fits={200}, most=2)
    rows = protected(tmp_path / "short", files, run={"batch_size": 6})
    assert pixel_hashes(rows) == pixel_hashes(calm)
    assert short.batches == [6, 3, 1, 2, 3, 1, 2]


def test_single_images_that_are_too_large_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{n}.png": photo(n, marker=200 if n % 3 == 2 else 7) for n in range(6)}  # never three in a row
    Short(monkeypatch, error=MemoryError, fits={200}, most=8)
    rows = protected(tmp_path, files)
    assert [row["error_type"] for row in rows.values()] == ["MemoryError", "MemoryError", None] * 2


def test_a_lost_result_is_quarantined(tmp_path: Path) -> None:
    job, _, shard = prepared(tmp_path, {"a.png": photo(1)})
    ((name, _),) = open_units(job.destination(), shard, job.config_fp)[0]
    (unit,) = load_units(job, shard, [name])
    data = build_part(job, unit, begin(job.destination(), f"stores/{name}", job.run_id))
    (row,) = pq.read_table(pa.BufferReader(data)).to_pylist()
    assert (row["status"], row["error_type"]) == ("quarantined", "ProtectError")


def test_native_resolution_works_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = images.save(Image.fromarray(images.samples(700, 900)), "PNG")
    seeds: list[int] = []
    perturb = FakeProtector._perturb

    def recorded(protector: FakeProtector, batch: Batch, progress: Any) -> torch.Tensor:
        seeds.extend(batch.seeds)
        return perturb(protector, batch, progress)

    monkeypatch.setattr(FakeProtector, "_perturb", recorded)
    row = protected(tmp_path, {"big.png": big}, output={"resolution": "native"})["big.png"]
    assert row["status"] == "protected"
    assert (row["width"], row["height"]) == (900, 700)
    before, after = decode(big, limits=LIMITS), decode(row["image"]["bytes"], limits=LIMITS)
    delta = after.pixels.astype(int) - before.pixels.astype(int)
    assert 0 < np.abs(delta).max() <= 4
    for area in (delta[:512, :512], delta[-188:, -388:]):
        assert (area != 0).mean() > 0.5  # every corner is protected
    assert seeds[0] == row["seed"]
    assert len(set(seeds)) == len(seeds) == 6  # a seed for each tile, or the same noise would repeat


def test_training_scale_covers_the_whole_image(tmp_path: Path) -> None:
    big = images.save(Image.fromarray(images.samples(700, 1100)), "PNG")
    row = protected(tmp_path, {"big.png": big}, method={"eps": 7.65})["big.png"]
    before, after = decode(big, limits=LIMITS), decode(row["image"]["bytes"], limits=LIMITS)
    delta = after.pixels.astype(int) - before.pixels.astype(int)
    assert np.abs(delta).max() == 7  # whole levels only, and enlarging overshoots until it is clipped
    assert min((part != 0).mean() for part in np.array_split(delta, 8, axis=1)) > 0.3


def test_large_units_do_not_travel_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{n}.png": photo(n) for n in range(3)}
    calm = protected(tmp_path / "calm", files)
    job, _, shard = prepared(tmp_path / "tight", files)
    monkeypatch.setattr("pipeline.worker.TRAVELLING_BYTES", 2 * 24 * 24 * 3)
    group = open_units(job.destination(), shard, job.config_fp)[0]
    (unit,) = load_units(job, shard, [name for name, _ in group])
    assert [asset.view is None for asset in unit.assets] == [False, False, True]
    store_unit(job, Optimizer(job, "cpu").protect(unit))
    assert pixel_hashes({row["asset_id"]: row for row in part_rows(job, shard)}) == pixel_hashes(calm)


def test_a_part_that_is_there_wins(tmp_path: Path) -> None:
    job, _, shard = prepared(tmp_path, {"a.png": photo(1)})
    group = open_units(job.destination(), shard, job.config_fp)[0]
    (unit,) = load_units(job, shard, [name for name, _ in group])
    job.destination().put_new(unit.part_key, b"first")
    receipt = store_unit(job, Optimizer(job, "cpu").protect(unit))
    assert receipt.protected == 1
    assert job.destination().get(unit.part_key) == b"first"


def test_sidecars_travel_with_their_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "t.tar", [("a.png", photo(1)), ("a.txt", b"one"), ("b.png", photo(2))])
    job, plan = prepare(job_config(tmp_path / "in", tmp_path / "out"))
    protect_shard(job, plan.shards[0])
    assert [row["customer"] for row in part_rows(job, plan.shards[0])] == [{"txt": "one"}, {"txt": None}]


def test_originals_are_not_in_the_parts(tmp_path: Path) -> None:
    files = {"good.png": photo(1), "bad.png": photo(2, marker=7)}
    protected(tmp_path, files, method={"overrides": {"raise_on": 7}})
    stored = b"".join(tree(tmp_path / "out").values())
    assert all(data[60:200] not in stored for data in files.values())

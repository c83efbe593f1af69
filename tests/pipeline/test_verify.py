"""The sampled check: the same assets every time, purifiers that are what they say, arithmetic by hand."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import CheckSettings
from pipeline.errors import IntegrityError
from pipeline.job import Job
from pipeline.parts import PARQUET_OPTIONS
from pipeline.plan import Shard
from pipeline.run import prepare
from pipeline.scale import to_training_scale
from pipeline.verify.attack_models import AttackModels
from pipeline.verify.check import measure_check, prepare_checks, sampled_rows, stored_checks
from pipeline.verify.purifiers import PURIFIERS
from pipeline.verify.report import read_verification, write_verification
from pipeline.verify.sample import choose_sample
from pipeline.verify.statistics import survival
from pipeline.worker import Optimizer
from tests.pipeline import images
from tests.pipeline.archives import photo, write_folder
from tests.pipeline.local_job import check_shard, commit, job_config, part_rows, protect_shard, ready

PLAIN = CheckSettings().purifiers
MEASURED = ["none", *(scaled for name in PLAIN for scaled in (name, f"{name}@training-scale"))]
NO_MODELS = AttackModels({})


def purified(name: str, pixels: Any, seed: int = 0) -> Any:
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
    return PURIFIERS[name].purify(image, seeds=[seed], models=NO_MODELS)[0].permute(1, 2, 0).numpy()


NAMES = [f"asset-{number}" for number in range(200)]


def sample(names: list[str], fraction: float, least: int = 0, salt: str = "") -> set[str]:
    return choose_sample(names, CheckSettings(fraction=fraction, min_per_shard=least, salt=salt))


@given(st.sets(st.text(), max_size=30), st.floats(0, 1), st.integers(0, 40))
def test_the_sample_is_deterministic_and_large_enough(names: set[str], fraction: float, least: int) -> None:
    chosen = sample(sorted(names), fraction, least)
    assert chosen == sample(sorted(names, reverse=True), fraction, least)
    assert chosen <= names
    assert len(chosen) >= min(least, len(names))
    assert sample(sorted(names), fraction) <= chosen


def test_the_sample_has_the_share_that_was_asked_for() -> None:
    assert sample(NAMES, 0) == set()
    assert sample(NAMES, 1) == set(NAMES)
    assert 60 <= len(sample(NAMES, 0.4)) <= 100
    assert sample(NAMES, 0.2) < sample(NAMES, 0.4)
    assert sample(NAMES, 0.4, salt="x") != sample(NAMES, 0.4)


def test_survival_by_hand() -> None:
    images = [{"none": [1.0, 3.0], "jpeg": [1.5, 2.5]}, {"none": [0.0, 6.0], "jpeg": [0.5, 0.0]}]
    found = {item.purifier: item for item in survival(images)}
    assert (found["none"].share, found["none"].low, found["none"].high, found["none"].images) == (1.0, 1.0, 1.0, 2)
    assert found["jpeg"].share == pytest.approx((1.0 - 0.5) / 8)
    # Resamples are (1, 1), (1, 2), (2, 1), (2, 2): shares 0.5, 1/16 and -1/12.
    assert (found["jpeg"].low, found["jpeg"].high) == pytest.approx((-1 / 12, 0.5))
    assert survival(images) == survival(images)


def test_the_interval_does_not_hang_on_other_purifiers() -> None:
    random = np.random.default_rng(1)
    images = [{name: [0.0, float(random.normal(2, 1))] for name in ("jpeg", "none", "blur")} for _ in range(20)]
    together = {item.purifier: item for item in survival(images)}
    alone = {item.purifier: item for item in survival([{k: i[k] for k in ("none", "blur")} for i in images])}
    assert together["blur"] == alone["blur"]
    assert together["none"].low == together["none"].high == 1.0
    assert survival(images, seed=1) != survival(images)


def test_resamples_without_a_gain_are_left_out() -> None:
    images = [{"none": [0.0, 1.0], "jpeg": [0.0, 0.5]}, {"none": [0.0, -0.9], "jpeg": [0.0, 0.0]}]
    found = {item.purifier: item for item in survival(images)}
    assert found["jpeg"].share == pytest.approx(0.5 / 0.1)
    assert (found["jpeg"].low, found["jpeg"].high) == pytest.approx((0.5, 5.0))


def test_the_bootstrap_holds_one_resample_in_memory() -> None:
    images = [{"none": [0.0, 1.0 + n % 3], "jpeg": [0.0, 1.0]} for n in range(2000)]
    tracemalloc.start()
    survival(images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # all 2000 resamples at once would be 32 MB of indices


def test_survival_without_enough_to_go_on() -> None:
    assert survival([]) == []
    (one,) = survival([{"none": [1.0, 2.0]}])
    assert (one.share, one.low, one.high, one.images) == (1.0, None, None, 1)
    (none,) = survival([{"none": [2.0, 1.0]}, {"none": [1.0, 1.0]}])
    assert (none.share, none.low, none.high) == (None, None, None)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Job, Shard]:
    """A shard whose parts are stored, and every asset of which is in the sample."""
    files = {f"{n}.png": photo(n) for n in range(5)} | {"bad.png": b"no image"}
    config = job_config(
        write_folder(tmp_path / "in", files), tmp_path / "out", check={"fraction": 1}, archive={"unit_assets": 4}
    )
    job, plan = prepare(config)
    protect_shard(job, plan.shards[0])
    return job, plan.shards[0]


def test_a_check_measures_every_cell_on_stored_bytes(stored: tuple[Job, Shard]) -> None:
    job, shard = stored
    optimizer = Optimizer(job, "cpu")
    rows = {row["row"]: row for row in part_rows(job, shard)}
    assert sorted(row for rows in sampled_rows(job, shard).values() for row in rows) == [0, 1, 2, 3, 4]
    seen: list[int] = []
    for check in prepare_checks(job, shard):
        result = measure_check(optimizer, check, NO_MODELS)
        for asset in check.assets:
            seen.append(asset.row)
            assert asset.cells.keys() == set(MEASURED)
            row = rows[asset.row]
            assert (asset.protected_sha256, asset.seed) == (row["protected_sha256"], row["seed"])
            assert result["rows"][str(asset.row)]["protected_sha256"] == row["protected_sha256"]
            clean, left = asset.cells["none"]
            np.testing.assert_array_equal(left, np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))))
            np.testing.assert_array_equal(asset.cells["jpeg75"][1], purified("jpeg75", left))
            # The fake's objective is the mean absolute distance from the clean image.
            for name, (a, b) in asset.cells.items():
                wanted = [np.abs(image.astype(float) - clean).mean() for image in (a, b)]
                assert result["rows"][str(asset.row)]["objective"][name] == pytest.approx(wanted, rel=1e-4)
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_checks_are_stored_once(stored: tuple[Job, Shard]) -> None:
    job, shard = stored
    check_shard(job, shard)
    found = stored_checks(job.destination(), shard)
    assert sorted(found) == [0, 1, 2, 3, 4]
    for row in part_rows(job, shard):
        if row["status"] == "protected":
            check = found[row["row"]]
            assert check.key == f"checks/{shard.shard_id}/00/{row['unit_id']}.json"
            assert check.protected_sha256 == row["protected_sha256"]
            assert check.objective.keys() == set(MEASURED)
    assert list(prepare_checks(job, shard)) == []
    check_shard(job, shard)
    assert stored_checks(job.destination(), shard) == found


def tampered(job: Job, shard: Shard, change: Any) -> str:
    """Rewrites one row of the first part; returns the part's key."""
    item = next(job.destination().list(f"parts/{shard.shard_id}/"))
    table = pq.read_table(pa.BufferReader(job.destination().get(item.key)))
    rows = table.to_pylist()
    change(rows[0])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, table.schema), sink, **PARQUET_OPTIONS)
    job.destination().delete(item.key)
    job.destination().put_new(item.key, bytes(sink.getvalue()))
    return item.key


def broken_image(row: dict[str, Any]) -> None:
    row["image"]["bytes"] = row["image"]["bytes"][:-40]


def other_image(row: dict[str, Any]) -> None:
    row["image"]["bytes"] = photo(99)


def other_pixels(row: dict[str, Any]) -> None:
    row["pixel_sha256"] = "0" * 64


@pytest.mark.parametrize("change", [broken_image, other_image, other_pixels])
def test_a_tampered_part_is_found(stored: tuple[Job, Shard], change: Any) -> None:
    job, shard = stored
    tampered(job, shard, change)
    with pytest.raises(IntegrityError, match="the stored image does not match its row"):
        list(prepare_checks(job, shard))


@pytest.mark.parametrize("content", [None, b"", b"no parquet"])
def test_a_part_that_cannot_be_read_is_named(stored: tuple[Job, Shard], content: bytes | None) -> None:
    job, shard = stored
    item = next(job.destination().list(f"parts/{shard.shard_id}/"))
    job.destination().delete(item.key)
    if content is not None:
        job.destination().put_new(item.key, content)
    with pytest.raises(IntegrityError, match=item.key):
        list(prepare_checks(job, shard))


def test_the_report_holds_the_totals(tmp_path: Path) -> None:
    files = {f"{n}.png": photo(n) for n in range(4)}
    settings = {"archive": {"files_per_shard": 2}, "check": {"min_per_shard": 2}}
    job, plan = ready(job_config(write_folder(tmp_path / "in", files), tmp_path / "out", **settings))
    key, totals = write_verification(job, plan.shards, commit(job, plan))
    document = json.loads((tmp_path / "out" / key).read_bytes())
    assert document["sampled"] == 4
    assert [entry["sampled"] for entry in document["shards"].values()] == [2, 2]
    assert {item.purifier: item.images for item in totals} == dict.fromkeys(MEASURED, 4)
    assert read_verification(job.destination(), key) == totals


def test_a_large_image_is_purified_at_both_scales(tmp_path: Path) -> None:
    files = {"big.png": images.save(Image.fromarray(images.samples(540, 600)), "PNG")}
    job, plan = prepare(job_config(write_folder(tmp_path / "in", files), tmp_path / "out"))
    protect_shard(job, plan.shards[0])
    (check,) = prepare_checks(job, plan.shards[0])
    (asset,) = check.assets
    (row,) = part_rows(job, plan.shards[0])
    full = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
    small = to_training_scale(full, job.base_size)
    assert max(small.shape) < 600
    np.testing.assert_array_equal(asset.cells["none"][1], small)
    for name in PLAIN:
        np.testing.assert_array_equal(asset.cells[name][1], to_training_scale(purified(name, full), job.base_size))
        np.testing.assert_array_equal(asset.cells[f"{name}@training-scale"][1], purified(name, small))
        assert not np.array_equal(asset.cells[name][1], asset.cells[f"{name}@training-scale"][1])

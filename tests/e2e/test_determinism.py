"""The same bytes and configuration give the same pixels.

1. With one actor and with two.
2. Whatever the objects are called, in whatever order they come, and whatever lies beside them in a unit.
3. Also with gradients through the embedded model (one class of device, one thread per actor).
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.manifest import rows_of
from pipeline.storage import StorageOptions, open_store
from tests.e2e.archives import fill, marked_pictures, parquet_file
from tests.e2e.command import FAKE, finished, fixative, job_file

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "prefect_server"), pytest.mark.timeout(240)]


def _pixels(source: Path, destination: Path, actors: int, *method: str) -> dict[str, str]:
    """Protects a folder; returns the pixel hash of every image by the hash of its source bytes."""
    config = job_file(destination.with_suffix(".yaml"))
    result = fixative("protect", source, destination, "-c", config, "--actors", actors, *method)
    assert result.code == 0, result
    store = open_store(str(destination), StorageOptions())
    rows = [row for item in finished(store) for row in rows_of(store, item, ["source_sha256", "pixel_sha256", "image"])]
    assert len({row["pixel_sha256"] for row in rows}) == len(rows)
    return {row["source_sha256"]: row["pixel_sha256"] for row in rows}


def test_pool_size_names_order_and_neighbours_change_no_pixel(tmp_path: Path) -> None:
    images = marked_pictures()
    plain, shuffled = tmp_path / "plain", tmp_path / "shuffled"
    fill(open_store(str(plain), StorageOptions()), images)
    contents = random.Random(1).sample(list(images.values()), len(images))
    renamed = {f"{i:02d}-{i * 7 % 5}.png": data for i, data in enumerate(contents[:7])}
    rest = {f"row-{i}": data for i, data in enumerate(contents[7:])}
    fill(open_store(str(shuffled), StorageOptions()), {**renamed, "rest.parquet": parquet_file(rest)})
    one = _pixels(plain, tmp_path / "one", 1, "--method", FAKE)
    assert len(one) == len(images)
    assert _pixels(shuffled, tmp_path / "other", 2, "--method", FAKE) == one


@pytest.mark.slow
def test_pool_size_changes_no_pixel_of_a_real_method(tmp_path: Path) -> None:
    images = dict(list(marked_pictures().items())[:6])
    fill(open_store(str(tmp_path / "plain"), StorageOptions()), images)
    method = ("--method", "photoguard", "--set", "steps=2")
    one = _pixels(tmp_path / "plain", tmp_path / "one", 1, *method)
    assert len(one) == len(images)
    assert _pixels(tmp_path / "plain", tmp_path / "two", 2, *method) == one

"""The snippets of pipeline/READING.md do what they say, as they are printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.archives import photo, photos, write_folder, write_parquet
from tests.pipeline.local_job import Outcome, data_table, job_config, run_job
from tests.pipeline.published import published

PAGE = Path(__file__).parents[2] / "pipeline" / "READING.md"
LIST = "The list of files"
Names = dict[str, Any]
Row = dict[str, Any]


def snippets() -> dict[str, str]:
    """The Python blocks of the page by their headings."""
    sections = (text.partition("\n") for text in PAGE.read_text().split("\n## ")[1:])
    found = ((heading, re.search(r"^```python\n(.*?)^```", text, re.M | re.S)) for heading, _, text in sections)
    return {heading: block[1] for heading, block in found if block}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, list[Row]]:
    """A folder with a published archive as ``protected``, and its rows: a/one.png in an old and a new version."""
    folder = tmp_path_factory.mktemp("reading")
    before = published(folder)
    (folder / "in" / "a" / "one.png").unlink()
    write_folder(folder / "in", {"a/one.png": photo(77, side=40)})
    outcome = run_job(before.job.config)
    (folder / "protected").symlink_to(folder / "out")
    (folder / "out" / "data" / "shard-00000-000000000000.parquet").write_bytes(b"left by a run that was stopped")
    rows = [row for item in outcome.manifests if item.data for row in data_table(folder / "out", item).to_pylist()]
    return folder, outcome, rows


def ids(rows: list[Row]) -> list[str]:
    return [row["asset_id"] for row in rows]


def check_datasets(names: Names, printed: str, rows: list[Row]) -> None:
    assert sorted(names["images"]["asset_id"]) == sorted(ids(rows))
    first = next(row for row in rows if row["asset_id"] == names["images"][0]["asset_id"])
    assert str((first["width"], first["height"])) in printed


def check_duckdb(names: Names, printed: str, rows: list[Row]) -> None:
    assert len(names["images"].fetchall()) == len(rows)
    assert "protectors.fake:FakeProtector" in printed
    assert f" {len(rows)} " in printed


def check_pandas(names: Names, printed: str, rows: list[Row]) -> None:
    assert list(names["facts"]["asset_id"]) == ids(rows)
    assert "psnr" in printed


def check_polars(names: Names, printed: str, rows: list[Row]) -> None:
    assert names["worst"]["ssim"].to_list() == sorted(row["ssim"] for row in rows)[:10]
    assert "ssim" in printed


def check_pyarrow(names: Names, printed: str, rows: list[Row]) -> None:
    sizes = [f"{row['asset_id']} {(row['width'], row['height'])}" for row in rows]
    assert printed.splitlines() == sizes


def check_current(names: Names, printed: str, rows: list[Row]) -> None:
    assert len(rows) == 11
    assert sorted(set(ids(rows))) == sorted(names["current"]["asset_id"].to_pylist())
    (one,) = (row for row in names["current"].to_pylist() if row["asset_id"] == "a/one.png")
    assert one["width"] == 40
    assert printed.strip() == "10"


def check_mlcroissant(names: Names, printed: str, rows: list[Row]) -> None:
    assert names["record"]["images/asset_id"].decode() in ids(rows)
    assert "(24, 24)" in printed


CHECKS: dict[str, Callable[[Names, str, list[Row]], None]] = {
    "datasets": check_datasets,
    "DuckDB": check_duckdb,
    "pandas": check_pandas,
    "Polars": check_polars,
    "pyarrow": check_pyarrow,
    "Images that changed later": check_current,
    "mlcroissant": check_mlcroissant,
}


def test_every_snippet_is_checked() -> None:
    assert list(snippets()) == [LIST, *CHECKS]


@pytest.mark.parametrize("heading", CHECKS)
def test_a_snippet(
    heading: str,
    archive: tuple[Path, Outcome, list[Row]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder, outcome, rows = archive
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if heading == "datasets":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(folder)
    names: Names = {}
    for part in (LIST, heading):
        exec(compile(snippets()[part], f"{PAGE.name}: {part}", "exec"), names)
    assert len(names["files"]) == sum(item.data is not None for item in outcome.manifests) > 1
    CHECKS[heading](names, capsys.readouterr().out, rows)


def test_shards_with_equal_columns_open_by_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no other file lies beside them, as after one run that nothing disturbed."""
    import duckdb
    import pandas as pd
    import polars as pl
    import pyarrow.dataset as ds
    from datasets import load_dataset

    for name, start in (("first", 0), ("second", 3)):
        write_parquet(
            tmp_path / "in" / f"{name}.parquet", photos(3, start), {"caption": [f"{name} {n}" for n in "abc"]}
        )
    outcome = run_job(job_config(tmp_path / "in", tmp_path / "out"))
    folder = tmp_path / "out" / "data"
    pattern = str(folder / "*.parquet")
    assert len(list(folder.iterdir())) == len(outcome.manifests) == 2
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {
        "datasets": load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(tmp_path))["caption"],
        "DuckDB": [caption for (caption,) in duckdb.read_parquet(pattern).select("caption").fetchall()],
        "pandas": pd.read_parquet(folder, columns=["caption"])["caption"],
        "Polars": pl.scan_parquet(pattern).select("caption").collect()["caption"],
        "pyarrow": ds.dataset(folder).to_table(columns=["caption"])["caption"].to_pylist(),
    }
    wanted = [f"{name} {n}" for name in ("first", "second") for n in "abc"]
    assert {reader: sorted(read) for reader, read in found.items()} == dict.fromkeys(found, wanted)

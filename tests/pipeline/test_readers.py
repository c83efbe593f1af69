"""Every row of a source comes exactly once, with its bytes and columns, or as a failure of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.assets import Asset
from pipeline.config import ArchiveSettings
from pipeline.errors import SourceChanged
from pipeline.ids import sha256_hex
from pipeline.readers import NEAR_BYTES, UnitRows, is_picture, read_units
from pipeline.shard_index import ShardIndex, index_files, index_parquet, index_tar
from pipeline.storage_local import LocalStore
from pipeline.units import RowRange, group_units
from tests.pipeline import images
from tests.pipeline.archives import flip, image_array, photo, photos, write_folder, write_parquet, write_tar


def indexed(path: Path, **settings: Any) -> tuple[LocalStore, ShardIndex]:
    """Store and index of a folder of files, a Parquet file or a tar."""
    wanted = ArchiveSettings(**{"unit_assets": 4, **settings})
    if path.is_dir():
        store = LocalStore(str(path))
        return store, index_files(list(store.list()), "etag", wanted)
    store = LocalStore(str(path.parent))
    build = index_parquet if path.suffix == ".parquet" else index_tar
    return store, build(store, store.info(path.name), wanted)


def read(store: LocalStore, index: ShardIndex, units: Sequence[RowRange] | None = None) -> list[UnitRows]:
    groups = group_units(index.units if units is None else units, index.row_groups)
    return [rows for group in groups for rows in read_units(store, index, group)]


def assets(units: Sequence[UnitRows]) -> list[Asset]:
    return [asset for unit in units for asset in unit.assets]


def column(units: Sequence[UnitRows], name: str) -> list[Any]:
    return [value for unit in units for value in unit.customer.column(name).to_pylist()]


def test_files(tmp_path: Path) -> None:
    data = photos(5)
    write_folder(tmp_path, {f"d/{n}.png": item for n, item in enumerate(data)} | {"e.png": b""})
    store, index = indexed(tmp_path)
    found = assets(read(store, index))
    assert [asset.row for asset in found] == list(range(6))
    assert [asset.asset_id for asset in found] == [*(f"d/{n}.png" for n in range(5)), "e.png"]
    assert [asset.data for asset in found[:5]] == data
    assert [asset.source_sha256 for asset in found[:5]] == [sha256_hex(item) for item in data]
    assert found[0].source_uri == f"{store.url}/d/0.png"
    assert found[5].failure is not None
    assert (found[5].failure.stage, found[5].failure.error_type) == ("fetch", "FetchError")


@pytest.mark.parametrize("form", ["struct", "binary"])
def test_parquet(tmp_path: Path, form: Literal["struct", "binary"]) -> None:
    data: list[bytes | None] = [*photos(8), None, b""]
    path = write_parquet(tmp_path / "a.parquet", data, {"n": range(10), "t": list("abcdefghij")}, form=form)
    units = read(*indexed(path, unit_assets=3))
    found = assets(units)
    assert [asset.data for asset in found] == data
    assert [asset.failure is None for asset in found] == [True] * 8 + [False] * 2
    assert [asset.asset_id for asset in found] == [f"a.parquet#{n:06d}" for n in range(10)]
    assert column(units, "n") == list(range(10))
    assert column(units, "t") == list("abcdefghij")


def test_a_null_struct_has_no_bytes(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([{"bytes": photo(), "path": None}, None], image_array([b""]).type)})
    pq.write_table(table, tmp_path / "a.parquet")
    found = assets(read(*indexed(tmp_path / "a.parquet")))
    assert [asset.data for asset in found] == [photo(), None]
    assert found[1].failure is not None


def test_named_columns(tmp_path: Path) -> None:
    decoys = [b"decoy", b"of", b"bytes"]
    other = image_array(photos(3))
    path = write_parquet(tmp_path / "a.parquet", decoys, {"other": other, "key": [7, 8, None]}, form="binary")
    units = read(*indexed(path, image_column="other", id_column="key"))
    assert [asset.data for asset in assets(units)] == photos(3)
    assert [asset.asset_id for asset in assets(units)] == ["7", "8", "a.parquet#000002"]
    assert units[0].customer.column_names == ["image", "key"]
    assert column(units, "image") == decoys


PICTURES = [
    *(images.plain(format) for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")),
    images.save(images.picture(), "TIFF", big_tiff=False, tiffinfo={270: "x"}),
    b"\0\0\0\x20ftypavif\0\0",
    b"\0\0\0\x18ftypheic\0\0",
    b"\0\0\0\x0cJXL \r\n",
]
HARMLESS = [b"", None, b"BMW is a name", b"\0\0\0\x20", b"GIF", bytes(100), b"%PDF-1.7", b"x" + PICTURES[0]]


def test_every_kind_of_picture_is_known() -> None:
    assert all(is_picture(data) for data in PICTURES)
    assert not any(is_picture(data) for data in HARMLESS if data is not None)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "tar"])
@pytest.mark.parametrize("choice", ["refuse", "drop", "keep"])
def test_pictures_in_binary_values(tmp_path: Path, kind: str, choice: str) -> None:
    beside = [*PICTURES, *HARMLESS]
    rows = len(beside)
    if kind == "tar":
        members = [(f"{n:02d}.png", photo(n)) for n in range(rows)]
        members += [(f"{n:02d}.bin", data) for n, data in enumerate(beside) if data is not None]
        path = write_tar(tmp_path / "a.tar", members)
    else:
        extra = {"bin": pa.array(beside, getattr(pa, kind)()), "n": range(rows)}
        path = write_parquet(tmp_path / "a.parquet", photos(rows), extra)
    units = read(*indexed(path, other_images=choice))
    found = assets(units)
    assert [asset.row for asset in found] == list(range(rows))
    assert [asset.data for asset in found] == photos(rows)
    hidden: list[bytes | None] = [None] * len(PICTURES)
    assert column(units, "bin") == [*(PICTURES if choice == "keep" else hidden), *HARMLESS]
    failed = [asset.row for asset in found if asset.failure is not None]
    assert failed == (list(range(len(PICTURES))) if choice == "refuse" else [])
    for asset in found[: len(failed)]:
        assert asset.failure is not None
        assert asset.failure.stage == "fetch"
        assert asset.failure.message == "column bin holds a picture, unprotected; use --other-images drop or keep"
    if kind != "tar":
        assert column(units, "n") == list(range(rows))


def test_a_row_without_an_image_keeps_its_own_reason(tmp_path: Path) -> None:
    extra = {"bin": pa.array([photo(1), b"x"], pa.binary())}
    found = assets(read(*indexed(write_parquet(tmp_path / "a.parquet", [None, photo(2)], extra))))
    assert found[0].failure is not None
    assert found[0].failure.message == "there are no image bytes here"
    assert found[1].failure is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_units_of_any_row_groups(tmp_path: Path, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40))
    content = [f"image {n}".encode() for n in range(rows)]
    path = tmp_path / f"{rows}.parquet"
    group = data.draw(st.integers(1, 40))
    write_parquet(path, content, {"n": range(rows)}, row_group_size=group)
    store, index = indexed(path)
    edges = sorted({0, rows, *range(0, rows, group), *data.draw(st.sets(st.integers(0, rows), max_size=8))})
    cut = [unit for unit in itertools.pairwise(edges) if data.draw(st.booleans())]
    units = read(store, replace(index, units=cut))
    wanted = [row for low, high in cut for row in range(low, high)]
    assert [len(unit.assets) for unit in units] == [high - low for low, high in cut]
    assert [asset.row for asset in assets(units)] == wanted
    assert [asset.data for asset in assets(units)] == [content[row] for row in wanted]
    assert column(units, "n") == wanted


def test_a_gap_within_what_was_read_ahead(tmp_path: Path) -> None:
    store, index = indexed(write_parquet(tmp_path / "a.parquet", photos(9)))
    found = assets(read(store, index, [(0, 4), (4, 5), (6, 7), (7, 8)]))
    assert [asset.row for asset in found] == [0, 1, 2, 3, 4, 6, 7]
    assert [asset.data for asset in found] == [photo(asset.row) for asset in found]


@pytest.fixture
def many_pages(tmp_path: Path) -> Path:
    """Two row groups of 20 rows, a page every few images, compressed so that damage is seen."""
    options: dict[str, Any] = {
        "compression": "gzip",
        "use_dictionary": False,
        "data_page_size": 4000,
        "write_batch_size": 1,
    }
    return write_parquet(tmp_path / "a.parquet", photos(40), {"n": range(40)}, row_group_size=20, **options)


def test_a_damaged_page_takes_only_the_rows_behind_it(many_pages: Path) -> None:
    chunk = pq.ParquetFile(many_pages).metadata.row_group(0).column(0)
    store, index = indexed(many_pages)
    flip(many_pages, chunk.data_page_offset + chunk.total_compressed_size // 2, 40)
    index = replace(index, etag=store.info("a.parquet").etag)
    units = read(store, index)
    found = assets(units)
    assert [asset.row for asset in found] == list(range(40))
    failed = [asset.row for asset in found if asset.failure is not None]
    assert failed == list(range(failed[0], 20))
    assert 4 <= failed[0] <= 11
    assert failed[0] % 4 == 0
    good = [asset for asset in found if asset.failure is None]
    assert [asset.data for asset in good] == [photo(asset.row) for asset in good]
    assert all("damaged" in str(asset.failure) for asset in found if asset.failure is not None)
    assert column(units, "n") == [None if row in failed else row for row in range(40)]


def test_a_connection_that_breaks_once_costs_nothing(many_pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, index = indexed(many_pages)
    opened: list[str] = []

    class Breaking(LocalStore):
        def open(self, key: str) -> Any:
            opened.append(key)
            if len(opened) in (1, 3):
                raise OSError("connection reset")
            return super().open(key)

    found = assets(read(Breaking(str(store.root)), index))
    assert [asset.data for asset in found] == photos(40)
    assert len(opened) == 4


def test_tar(tmp_path: Path) -> None:
    far = b"\0" * (2 * NEAR_BYTES)
    members = [
        ("a.png", photo(1)),
        ("b.png", photo(2)),
        ("b.json", b'{"x": 1}'),
        ("c.png", b""),
        ("filler.bin", far),
        ("a.txt", "größer".encode()),
        ("b.npy", b"\xff"),
    ]
    path = write_tar(tmp_path / "t.tar", members)
    store, index = indexed(path)
    units = read(store, index)
    found = assets(units)
    assert [asset.asset_id for asset in found] == ["t.tar#a.png", "t.tar#b.png", "t.tar#c.png"]
    assert [asset.data for asset in found] == [photo(1), photo(2), b""]
    assert [asset.failure is None for asset in found] == [True, True, False]
    assert column(units, "txt") == ["größer", None, None]
    assert column(units, "json") == [None, '{"x": 1}', None]
    assert column(units, "npy") == [None, b"\xff", None]


def test_far_members_are_not_read_through(tmp_path: Path) -> None:
    members = [("a.png", photo(1)), ("filler.bin", b"\0" * (4 * NEAR_BYTES)), ("a.txt", b"x"), ("b.png", photo(2))]
    path = write_tar(tmp_path / "t.tar", members)
    lengths: list[int | None] = []

    class Counting(LocalStore):
        def get(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
            lengths.append(length)
            return super().get(key, start=start, length=length, etag=etag)

    _, index = indexed(path)
    read(Counting(str(tmp_path)), index)
    assert len(lengths) == 2
    assert all(length is not None and length < NEAR_BYTES for length in lengths)


def test_a_sidecar_that_is_no_utf8_fails_its_own_asset(tmp_path: Path) -> None:
    members = [("a.png", photo(1)), ("a.txt", b"\xff\xfe"), ("b.png", photo(2)), ("b.txt", b"fine")]
    units = read(*indexed(write_tar(tmp_path / "t.tar", members)))
    first, second = assets(units)
    assert first.failure is not None
    assert "its .txt is not UTF-8" in first.failure.message
    assert second.failure is None
    assert column(units, "txt") == [None, "fine"]


@pytest.mark.parametrize("kind", ["files", "parquet", "tar"])
@pytest.mark.parametrize("change", ["replaced", "gone"])
def test_a_changed_source_is_seen(tmp_path: Path, kind: str, change: str) -> None:
    if kind == "files":
        root = write_folder(tmp_path / "d", {"a.png": photo(1)})
        path = root / "a.png"
    elif kind == "parquet":
        root = path = write_parquet(tmp_path / "a.parquet", photos(2))
    else:
        root = path = write_tar(tmp_path / "a.tar", [("a.png", photo(1))])
    store, index = indexed(root)
    content = path.read_bytes()
    path.unlink()
    if change == "replaced" and kind == "parquet":
        write_parquet(path, photos(2, start=5))  # reads as well as the one before
    elif change == "replaced":
        path.write_bytes(content + b" ")
    with pytest.raises(SourceChanged, match=path.name):
        read(store, index)

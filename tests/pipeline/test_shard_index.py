"""The index of every kind of shard; what is no shard is refused with the way out, and nothing is lost unseen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config import ArchiveSettings, OtherImages
from pipeline.shard_index import (
    ShardIndex,
    UnreadableShard,
    find_id_column,
    find_image_column,
    index_files,
    index_parquet,
    index_tar,
    kind_of,
)
from pipeline.storage_local import LocalStore
from tests.pipeline.archives import HF_TYPE, image_array, photo, photos, write_folder, write_parquet, write_tar

SETTINGS = ArchiveSettings(unit_assets=4)


def parquet_index(path: Path, settings: ArchiveSettings = SETTINGS) -> ShardIndex:
    store = LocalStore(str(path.parent))
    return index_parquet(store, store.info(path.name), settings)


def tar_index(path: Path, settings: ArchiveSettings = SETTINGS) -> ShardIndex:
    store = LocalStore(str(path.parent))
    return index_tar(store, store.info(path.name), settings)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("a/b.JPG", "files"),
        ("x.tiff", "files"),
        ("x.Parquet", "parquet"),
        ("x.tar", "tar"),
        ("x.tar.gz", None),
        ("README.md", None),
        ("jpg", None),
    ],
)
def test_kind_by_suffix(key: str, kind: str | None) -> None:
    assert kind_of(key) == kind


def test_files(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{n}.png": data for n, data in enumerate(photos(6))})
    objects = list(LocalStore(str(tmp_path)).list())
    index = index_files(objects, "etag", SETTINGS)
    assert index.members == [[item.key, item.etag, item.size] for item in objects]
    assert index.units == [(0, 4), (4, 6)]
    assert (index.rows, index.key, index.size) == (6, "0.png", sum(item.size for item in objects))


def test_parquet_units_respect_row_groups(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", photos(10), {"n": list(range(10))}, row_group_size=6)
    index = parquet_index(path)
    assert index.row_groups == [6, 4]
    assert index.units == [(0, 4), (4, 6), (6, 10)]
    assert index.image_column == "image"
    assert index.id_column == ""
    assert index.schema.names == ["n"]


def test_parquet_units_respect_bytes(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", photos(6))
    size = path.stat().st_size // 6
    assert parquet_index(path, ArchiveSettings(unit_bytes=2 * size)).units == [(0, 2), (2, 4), (4, 6)]


@pytest.mark.parametrize("kind", ["files", "parquet", "tar"])
def test_survives_json(tmp_path: Path, kind: str) -> None:
    if kind == "files":
        write_folder(tmp_path, {"a.png": photo()})
        index = index_files(list(LocalStore(str(tmp_path)).list()), "e", SETTINGS)
    elif kind == "parquet":
        index = parquet_index(write_parquet(tmp_path / "a.parquet", photos(5), {"n": range(5)}, row_group_size=2))
    else:
        index = tar_index(write_tar(tmp_path / "a.tar", [("a.png", photo()), ("a.txt", b"x")]))
    again = ShardIndex.from_json(json.loads(json.dumps(index.to_json())))
    assert again == index
    assert again.schema.equals(index.schema, check_metadata=True)


def schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"x": HF_TYPE}, "x"),
        ({"x": pa.binary()}, "x"),
        ({"x": pa.large_binary()}, "x"),
        ({"x": HF_TYPE, "mask": pa.binary()}, "x"),  # a struct with bytes is clearly an image
        ({"jpg": pa.binary(), "embedding": pa.binary()}, "jpg"),
        ({"text": pa.string(), "x": pa.struct([("path", pa.string())]), "y": pa.binary()}, "y"),
    ],
)
def test_image_column_is_found(columns: Mapping[str, pa.DataType], found: str) -> None:
    assert find_image_column(schema(**columns), None, "here") == found


@pytest.mark.parametrize(
    "columns",
    [
        {"left": HF_TYPE, "right": HF_TYPE},
        {"a": pa.binary(), "b": pa.binary()},
        {"jpg": pa.binary(), "png": pa.binary()},
    ],
)
def test_several_image_columns_must_be_named(columns: Mapping[str, pa.DataType]) -> None:
    with pytest.raises(
        UnreadableShard, match=r"here: several could be the image .*name it with --image-column"
    ) as caught:
        find_image_column(schema(**columns), None, "here")
    assert all(name in str(caught.value) for name in columns)
    assert find_image_column(schema(**columns), min(columns), "here") == min(columns)


def test_wrong_image_column() -> None:
    with pytest.raises(UnreadableShard, match="no image column"):
        find_image_column(schema(a=pa.string()), None, "here")
    with pytest.raises(UnreadableShard, match=r"column 'a' holds no images.*columns are a, b"):
        find_image_column(schema(a=pa.string(), b=pa.binary()), "a", "here")


@pytest.mark.parametrize(
    ("columns", "wanted", "found"),
    [
        ({"asset_id": pa.string()}, None, "asset_id"),
        ({"asset_id": pa.int64()}, None, "asset_id"),
        ({"asset_id": pa.float32()}, None, ""),
        ({"id": pa.string()}, None, ""),
        ({"id": pa.large_string(), "asset_id": pa.string()}, "id", "id"),
    ],
)
def test_id_column(columns: Mapping[str, pa.DataType], wanted: str | None, found: str) -> None:
    assert find_id_column(schema(**columns), wanted, "here") == found


@pytest.mark.parametrize(("wanted", "message"), [("x", "no column 'x'"), ("score", "must be text or integers")])
def test_wrong_id_column(wanted: str, message: str) -> None:
    with pytest.raises(UnreadableShard, match=message):
        find_id_column(schema(score=pa.float64()), wanted, "here")


def test_an_id_column_of_text_is_not_stored_twice(tmp_path: Path) -> None:
    ids = [str(n) for n in range(2)]
    assert parquet_index(write_parquet(tmp_path / "a.parquet", photos(2), {"asset_id": ids})).schema.names == []
    numbers = write_parquet(tmp_path / "b.parquet", photos(2), {"asset_id": [1, 2]})
    assert parquet_index(numbers).schema.names == ["asset_id"]  # its type would be lost


def beside(other_images: OtherImages) -> ArchiveSettings:
    return ArchiveSettings(image_column="image", other_images=other_images)


@pytest.mark.parametrize("listed", [False, True])
def test_further_columns_of_pictures(tmp_path: Path, listed: bool) -> None:
    views = image_array(photos(2))
    extra = {"view": pa.array([[v] for v in views.to_pylist()], pa.list_(HF_TYPE)) if listed else views, "n": [1, 2]}
    path = write_parquet(tmp_path / "a.parquet", photos(2), {"mask": image_array(photos(2)), **extra})
    with pytest.raises(UnreadableShard, match=r"a\.parquet: mask, view hold further pictures.*drop.*keep"):
        parquet_index(path, beside("refuse"))
    assert parquet_index(path, beside("drop")).schema.names == ["n"]
    kept = parquet_index(path, beside("keep"))
    assert (kept.schema.names, kept.other_images) == (["mask", "view", "n"], "keep")


@pytest.mark.parametrize("choice", ["refuse", "drop", "keep"])
def test_binary_columns_are_judged_row_by_row(tmp_path: Path, choice: OtherImages) -> None:
    path = write_parquet(tmp_path / "a.parquet", photos(2), {"raw": image_array(photos(2), "binary")})
    assert parquet_index(path, beside(choice)).schema.names == ["raw"]


@pytest.mark.parametrize("name", ["a.gif", "a.HEIC", "a.depth.bmp", "a.svg"])
def test_pictures_beside_the_image_of_a_tar(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.png", photo()), ("a.txt", b"x"), (name, b"x"), ("lonely.gif", b"x")])
    column = name.partition(".")[2]
    with pytest.raises(UnreadableShard, match=f"t.tar: {column} hold further pictures"):
        tar_index(path, beside("refuse"))
    assert tar_index(path, beside("drop")).schema.names == ["txt"]
    assert tar_index(path, beside("keep")).schema.names == sorted(["txt", column])


def test_pictures_of_no_sample_do_not_matter(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.png", photo()), ("lonely.gif", b"x")])
    assert tar_index(path).schema.names == []


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all, but some bytes PAR1"])
def test_no_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UnreadableShard, match=r"a\.parquet: not a readable Parquet file"):
        parquet_index(tmp_path / "a.parquet")


def test_doubled_column_names_are_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    columns = [pa.array(photos(1)), pa.array([1]), pa.array([2])]
    pq.write_table(pa.table(columns, names=["image", "n", "n"]), tmp_path / "a.parquet")
    with pytest.raises(UnreadableShard, match="two columns are named n"):
        parquet_index(tmp_path / "a.parquet")


def test_tar_samples(tmp_path: Path) -> None:
    members: list[tuple[str, Any]] = [
        ("d/one.jpg", photo(1)),
        ("d/one.txt", b"first"),
        ("lonely.json", b"{}"),
        ("two.seg.PNG", photo(2)),
        ("two.png", photo(3)),
        ("two.npy", b"\0"),
    ]
    index = tar_index(write_tar(tmp_path / "a.tar", members))
    assert [name for name, _ in index.members] == ["d/one.jpg", "two.seg.PNG", "two.png"]
    assert index.schema == pa.schema([("npy", pa.binary()), ("txt", pa.string())])
    content = (tmp_path / "a.tar").read_bytes()
    found = [content[o : o + s] for _, places in index.members for o, s in [places[""]]]
    assert found == [photo(1), photo(2), photo(3)]


def test_doubled_member_names_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", photo(1)), ("a.png", photo(2))])
    with pytest.raises(UnreadableShard, match=r"two files in it are named a\.png"):
        tar_index(path)


def test_tar_without_images(tmp_path: Path) -> None:
    with pytest.raises(UnreadableShard, match="no image in this tar"):
        tar_index(write_tar(tmp_path / "a.tar", [("a.txt", b"x")]))


def test_compressed_tar(tmp_path: Path) -> None:
    with pytest.raises(UnreadableShard, match="not a readable plain tar"):
        tar_index(write_tar(tmp_path / "a.tar", [("a.png", photo())], mode="w:gz"))


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.png", photo(n)) for n in range(3)])
    whole, end = path.read_bytes(), tar_index(path).members[-1][1][""]
    padded = -(-sum(end) // 512) * 512
    for length in [0, 1, 511, 512, 600, *range(1024, padded + 512, 256), padded, padded + 1, padded + 511]:
        path.write_bytes(whole[:length])
        with pytest.raises(UnreadableShard, match=r"a\.tar"):
            tar_index(path)
    path.write_bytes(whole[: padded + 512])  # the rest is padding
    assert tar_index(path).rows == 3


def test_a_damaged_header_does_not_hide_what_follows(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.png", photo(n)) for n in range(3)])
    data = bytearray(path.read_bytes())
    second = data.index(b"1.png")
    data[second : second + 4] = b"oops"
    path.write_bytes(data)
    with pytest.raises(UnreadableShard, match=f"damaged at byte {second}"):
        tar_index(path)

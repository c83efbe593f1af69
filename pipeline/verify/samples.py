"""Images for the laboratory bench, from wherever an archive may lie: a folder, a prefix, a Parquet file, a tar."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from pipeline.config import ArchiveSettings, S3Settings
from pipeline.decode import DecodeLimits, decode, model_view
from pipeline.errors import DecodeError, UserError
from pipeline.job import archive_store
from pipeline.readers import read_units
from pipeline.shard_index import ShardIndex, index_files, index_parquet, index_tar, kind_of
from pipeline.storage import Store
from pipeline.units import group_units
from pipeline.verify.trial import Pixels


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, upright sRGB uint8 (H, W, 3)."""

    name: str
    pixels: Pixels


def read_samples(
    url: str, count: int | None, *, limits: DecodeLimits, s3: S3Settings
) -> tuple[list[Sample], list[str]]:
    """The first images of an archive in its own order, and why others before them were left out.

    Args:
        url: folder, prefix, Parquet file or tar; any URL that `fixative protect` takes.
        count: images at most; None for all.
        limits: how large and how small an image may be.
        s3: how to reach S3.

    Raises:
        UserError: there is no image that can be read.
    """
    left_out: list[str] = []
    return list(stream_samples(url, count, limits=limits, s3=s3, left_out=left_out)), left_out


def stream_samples(
    url: str, count: int | None, *, limits: DecodeLimits, s3: S3Settings, left_out: list[str]
) -> Iterator[Sample]:
    """As `read_samples`, one by one and none kept; `left_out` gets the reasons as they come up."""
    store, key = archive_store(url, s3)
    number = 0
    for sample in islice(_decoded(store, key, limits, left_out), count):
        number += 1
        yield sample
    if not number:
        raise UserError(f"{url} holds no image that can be read" + (f": {left_out[0]}" if left_out else ""))


def _decoded(store: Store, key: str, limits: DecodeLimits, left_out: list[str]) -> Iterator[Sample]:
    for index in _indexes(store, key):
        for group in group_units(index.units, index.row_groups):
            for unit in read_units(store, index, group):
                for asset in unit.assets:
                    try:
                        yield Sample(asset.asset_id, model_view(decode(asset.data or b"", limits=limits)))
                    except DecodeError as error:
                        left_out.append(f"{asset.asset_id}: {error}")


def _indexes(store: Store, key: str) -> Iterator[ShardIndex]:
    settings = ArchiveSettings(other_images="drop")
    listing = [item for item in store.list(key) if not key or item.key == key or item.key.startswith(f"{key}/")]
    for item in listing:
        if kind_of(item.key) == "parquet":
            yield index_parquet(store, item, settings)
        elif kind_of(item.key) == "tar":
            yield index_tar(store, item, settings)
    if files := [item for item in listing if kind_of(item.key) == "files"]:
        yield index_files(files, "", settings)

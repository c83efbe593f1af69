"""Builds small archives on disk: folders of images, Parquet files in every form that is met, WebDataset tars."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.pipeline import images

HF_TYPE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])


def photo(seed: int = 0, *, side: int = 24, marker: int | None = None) -> bytes:
    """A small PNG, another one per seed; the top left pixel's red value is the marker that FakeProtector obeys."""
    pixels = images.samples(side, side, seed=seed)
    pixels[0, 0, 0] = 200 if marker is None else marker
    return images.save(Image.fromarray(pixels), "PNG")


def photos(count: int, start: int = 0) -> list[bytes]:
    return [photo(seed) for seed in range(start, start + count)]


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def image_array(data: Sequence[bytes | None], form: Literal["struct", "binary"] = "struct") -> pa.Array:
    if form == "binary":
        return pa.array(data, pa.binary())
    rows = [{"bytes": item, "path": f"{number}.png"} for number, item in enumerate(data)]
    return pa.array(rows, HF_TYPE)


def write_parquet(
    path: Path,
    data: Sequence[bytes | None],
    columns: Mapping[str, Any] | None = None,
    *,
    form: Literal["struct", "binary"] = "struct",
    metadata: Mapping[str, str] | None = None,
    **options: Any,
) -> Path:
    """A Parquet file with the images in the column ``image`` and further columns beside them."""
    table = pa.table({"image": image_array(data, form), **(columns or {})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, **options)
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, mode: Literal["w", "w:gz"] = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def flip(path: Path, offset: int, count: int = 1) -> None:
    """Inverts some bytes of a file in place."""
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = (np.frombuffer(data[offset : offset + count], np.uint8) ^ 0xFF).tobytes()
    path.write_bytes(data)

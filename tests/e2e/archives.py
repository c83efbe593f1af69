"""Small archives for tests of whole runs: random pictures, so that no two are alike and none compresses away."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.storage import Store

MARKS = range(100, 112)


def picture(seed: int, *, mark: int = 0, suffix: str = "png") -> bytes:
    """A noisy 40 x 48 picture; the red value of its first pixel is ``mark`` (exact in PNG)."""
    pixels = np.random.default_rng(seed).integers(20, 230, (40, 48, 3), dtype=np.uint8)
    pixels[0, 0, 0] = mark
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[suffix], quality=92)
    return file.getvalue()


def marked_pictures() -> dict[str, bytes]:
    """Twelve PNG files, marked 100 to 111 in key order."""
    return {f"{mark}.png": picture(mark, mark=mark) for mark in MARKS}


def parquet_file(images: Mapping[str, bytes], *, row_group_size: int = 3) -> bytes:
    """A Hugging Face style Parquet file, with a caption beside each image."""
    rows = [
        {"asset_id": name, "image": {"bytes": data, "path": name}, "caption": f"caption of {name}"}
        for name, data in images.items()
    ]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=row_group_size)
    return file.getvalue()


def tar_file(images: Mapping[str, bytes]) -> bytes:
    """A WebDataset tar: each image with a text of the same name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in images.items():
            for member, content in ((name, data), (f"{name.partition('.')[0]}.txt", f"text of {name}".encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def fill(store: Store, objects: Mapping[str, bytes]) -> None:
    """Puts objects into a store."""
    for key, data in objects.items():
        store.put_new(key, data)


def three_kinds() -> tuple[dict[str, bytes], dict[str, bytes], str]:
    """An archive of files, Parquet and tar: its objects, its 14 images by asset id, the id of a truncated JPEG."""
    files = {
        f"photos/{i}.{suffix}": picture(i, suffix=suffix) for i, suffix in enumerate(("png", "jpg", "webp", "png"))
    }
    rows = {f"row-{i}": picture(10 + i, suffix="jpg") for i in range(5)}
    members = {f"member-{i}.jpg": picture(20 + i, suffix="jpg") for i in range(5)}
    members["member-3.jpg"] = members["member-3.jpg"][: len(members["member-3.jpg"]) // 2]
    objects = {**files, "rows.parquet": parquet_file(rows), "members.tar": tar_file(members)}
    images = {**files, **rows, **{f"members.tar#{name}": data for name, data in members.items()}}
    return objects, images, "members.tar#member-3.jpg"

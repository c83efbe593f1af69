"""The demo: an archive from photographs that scikit-image and scikit-learn carry, and a picture of the result."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from skimage import data as photographs
from sklearn.datasets import load_sample_image

from pipeline.config import JobConfig
from pipeline.decode import decode, model_view
from pipeline.errors import NotFound, UserError
from pipeline.job import Job, destination_store, resolve
from pipeline.manifest import rows_of, success_manifests
from pipeline.plan import BINDING_KEY
from pipeline.storage import get_json
from pipeline.verify.difference import AMPLIFIED, difference
from protectors.reference.data import Photos

Pixels = npt.NDArray[np.uint8]

CROP = 256
# Photographs that stand for subjects, each with the word for what is on it, and how many crops there are of each:
# four to customize a model on, three to compare with. Only such as nano-sd learns with the settings of ATTACK: on clean
# crops similarity goes from 0.33 to 0.81 of 0.84 (motorcycle), from 0.48 to 0.68 of 0.79 (flower).
SUBJECTS = {"motorcycle": "motorcycle", "flower": "flower"}
CROPS = 7
# Sides of a subject's crops, as shares of the photograph's shorter side: the subject stays in the picture.
WIDEST, CLOSEST = 0.95, 0.7
ATTACK: Mapping[str, Any] = {
    "groups": 1,
    "edited": 2,
    "subject_column": "subject",
    "class_column": "subject_class",
    # Of `quick` half the batch and the class images, and three quarters of the updates. After 100 the motorcycle is
    # half learnt, which is the least with which an attack counts as one.
    "customizer_overrides": {"steps": 150, "batch": 2, "prior_images": 16},
}
"""What the demo's verification tries, as settings of `AttackSettings`."""
CELL = 192
SHOWN = 6


def build_archive(folder: Path) -> Path:
    """Writes the archive, three shards of three kinds; does nothing where it is already.

    Among its 33 assets are a truncated JPEG, a CMYK JPEG, an RGBA PNG, and a 16-bit image. The Parquet file names
    subjects: crops of one photograph each, which are easier to learn than several photographs of one subject.
    """
    done = _mark(folder)
    if done.exists() and folder.exists():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is no archive of the demo; choose another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    photos = _photographs()
    _write_files(building / "photos", photos)
    _write_parquet(building / "crops.parquet", photos)
    _write_tar(building / "studio.tar", photos)
    done.touch()
    return building.rename(folder)


def _mark(archive: Path) -> Path:
    """Lies beside an archive that the demo has built to the end."""
    return archive.with_name(f".{archive.name}-complete")


def _photographs() -> dict[str, Pixels]:
    named = {
        "astronaut": photographs.astronaut(),
        "cat": photographs.chelsea(),
        "coffee": photographs.coffee(),
        "rocket": photographs.rocket(),
        "motorcycle": photographs.stereo_motorcycle()[0],
        "china": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
        "cameraman": photographs.camera(),
        "coins": photographs.coins(),
    }
    return {name: np.asarray(pixels, dtype=np.uint8) for name, pixels in named.items()}


def demo_photos() -> Photos:
    """The colour photographs of the demo, with captions, for a quick look at the reference models."""
    photos = {name: pixels for name, pixels in _photographs().items() if pixels.ndim == 3}
    images = [torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous() for pixels in photos.values()]
    return Photos(images, [f"a photo of a {name}" for name in photos])


def _write_files(folder: Path, photos: dict[str, Pixels]) -> None:
    """Whole photographs in every form that archives hold."""
    folder.mkdir(exist_ok=True)
    for name in ("astronaut", "cat", "china", "flower"):
        _save(folder / f"{name}.jpg", Image.fromarray(photos[name]))
    _save(folder / "coffee.webp", Image.fromarray(photos["coffee"]))
    _save(folder / "cameraman.tif", Image.fromarray(photos["cameraman"]))
    _save(folder / "rocket-cmyk.jpg", Image.fromarray(photos["rocket"]).convert("CMYK"))
    coffee = Image.fromarray(photos["coffee"])
    fade = np.tile(np.linspace(0, 255, coffee.width).astype(np.uint8), (coffee.height, 1))
    coffee.putalpha(Image.fromarray(fade))
    _save(folder / "coffee-rgba.png", coffee)
    _save(folder / "coins-16bit.png", Image.fromarray(photos["coins"].astype(np.uint16) * 257))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    exif[0x8298] = "Example Archive"  # copyright
    Image.fromarray(photos["motorcycle"]).save(folder / "motorcycle-turned.jpg", quality=92, exif=exif)
    whole = (folder / "cat.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])


def _save(path: Path, image: Image.Image) -> None:
    image.save(path, quality=92) if path.suffix in (".jpg", ".webp") else image.save(path)


def _write_parquet(path: Path, photos: dict[str, Pixels]) -> None:
    """Crops as a Hugging Face dataset has them, with the customer's own columns."""
    rows = []
    for name, kind in SUBJECTS.items():
        for number, crop in enumerate(_views(photos[name], CROPS)):
            picture = {"bytes": _jpeg(crop), "path": f"{name}-{number}.jpg"}
            about = {"caption": f"a crop of {name}", "subject": name, "subject_class": kind, "price": 9.5}
            rows.append({"asset_id": f"crop-{name}-{number}", "image": picture, **about})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=6)


def _write_tar(path: Path, photos: dict[str, Pixels]) -> None:
    """Crops as WebDataset has them: picture, caption and JSON under one name."""
    with tarfile.open(path, "w") as tar:
        for name in ("motorcycle", "rocket", "cameraman", "coins"):
            for number, crop in enumerate(_crops(photos[name], 2)):
                sample = f"{name}-{number}"
                about = json.dumps({"photographer": "unknown", "crop": number}).encode()
                for suffix, content in (("jpg", _jpeg(crop)), ("txt", f"part of {name}".encode()), ("json", about)):
                    member = tarfile.TarInfo(f"{sample}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _crops(pixels: Pixels, count: int) -> list[Pixels]:
    height, width = pixels.shape[:2]
    side = min(CROP, height, width)
    tops = np.linspace(0, height - side, count).astype(int)
    lefts = np.linspace(0, width - side, count).astype(int)
    return [pixels[top : top + side, left : left + side] for top, left in zip(tops, lefts, strict=True)]


def _views(pixels: Pixels, count: int) -> list[Pixels]:
    """Square crops at several places, from wide to close."""
    height, width = pixels.shape[:2]
    sides = (np.linspace(WIDEST, CLOSEST, count) * min(height, width)).astype(int)
    views = []
    for number, side in enumerate(sides):
        # Two heights and three places from left to right: six combinations before one comes again.
        top, left = (height - side) * (number % 2), (width - side) * (number % 3) // 2
        views.append(pixels[top : top + side, left : left + side])
    return views


def _jpeg(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def discard_other_demo(config: JobConfig) -> bool:
    """Removes the result of an earlier demo that this one cannot go on from; tells whether there was one."""
    try:
        binding = get_json(destination_store(config), BINDING_KEY)
    except NotFound:
        return False
    if binding["config_fingerprint"] == resolve(config).config_fp:
        return False
    if not _mark(Path(config.source)).exists():
        raise UserError(f"{config.destination} holds results that are not the demo's; choose another --out")
    shutil.rmtree(config.destination)
    return True


def contact_sheet(job: Job, path: Path) -> Path:
    """Draws some originals, what is stored for them, and the amplified difference."""
    source, destination = job.source(), job.destination()
    sheet = Image.new("RGB", (3 * CELL, SHOWN * CELL + 24), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(("original", "protected", f"difference x {AMPLIFIED}")):
        pen.text((column * CELL + 6, 6), title, fill="black")
    shown = 0
    for manifest in success_manifests(destination):
        if manifest.source["kind"] != "files":
            continue
        for row in rows_of(destination, manifest, ["source_uri", "image"]):
            if shown == SHOWN:
                break
            key = row["source_uri"].removeprefix(f"{source.url}/")
            pair = [model_view(decode(data, limits=job.limits)) for data in (source.get(key), row["image"]["bytes"])]
            for column, pixels in enumerate((*pair, difference(pair[0], pair[1]))):
                cell = Image.fromarray(pixels)
                cell.thumbnail((CELL - 4, CELL - 4))
                sheet.paste(cell, (column * CELL + 2, 24 + shown * CELL + 2))
            shown += 1
    sheet.save(path)
    return path

"""Photographs for training the reference models: decoded once, cut into crops that depend on nothing but the seed."""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

# First words of the seed sequences, so that two uses of the same seed never draw the same numbers.
_ORDER, _CROP = 1, 2


@dataclass(frozen=True, slots=True)
class Photos:
    """Decoded photographs in memory (about 80 kB each at a short side of 150 px)."""

    images: list[Tensor]  # uint8, (3, H, W), sRGB
    captions: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """Names the photos and captions, in their order."""
        total = hashlib.sha256()
        for image, caption in zip(self.images, self.captions, strict=True):
            total.update(f"{tuple(image.shape)}{caption}".encode() + image.numpy().tobytes())
        return total.hexdigest()[:12]

    def spread(self, count: int) -> "Photos":
        """At most `count` of them, evenly spread, because files are often sorted by class."""
        rows = _spread(len(self), count)
        return Photos([self.images[row] for row in rows], [self.captions[row] for row in rows])


def _spread(length: int, count: int) -> list[int]:
    """At most `count` places of a list of `length`, evenly spread."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def _spread_over(names: Sequence[str | None], count: int) -> list[int]:
    """At most `count` places, one of each name, then a second one of each; what a round has too many is spread."""
    rounds: dict[int, list[int]] = {}
    met: Counter[str | None] = Counter()
    for place, name in enumerate(names):
        rounds.setdefault(met[name], []).append(place)
        met[name] += 1
    chosen: list[int] = []
    for places in rounds.values():
        chosen += [places[number] for number in _spread(len(places), count - len(chosen))]
    return sorted(chosen)


def is_held_out(asset_id: str) -> bool:
    """True for the fifth of all photographs that no reference model is ever trained on."""
    return int(hashlib.sha256(asset_id.encode()).hexdigest(), 16) % 5 == 0


def load_photos(
    parquet: Path, *, held_out: bool | None, limit: int | None = None, over_captions: bool = False
) -> Photos:
    """Decodes one side of the split, in file order.

    Args:
        parquet: columns `asset_id`, `image` {bytes, path}, `caption`.
        held_out: the side, None for both; the split is by asset, so no crop of a held-out photo is trained on.
        limit: at most so many, spread evenly over the file, because files are often sorted by class.
        over_captions: spreads them over the captions instead: one of each, then a second one of each, and so on.

    Raises:
        ValueError: the side is empty, a column is missing, or a picture cannot be decoded.
        OSError: the file cannot be read.
    """
    table = read_columns(parquet, ("asset_id", "image", "caption"))
    ids = [str(asset_id) for asset_id in table.column("asset_id").to_pylist()]
    rows = [row for row, asset_id in enumerate(ids) if held_out in (None, is_held_out(asset_id))]
    if not rows:
        raise ValueError(f"{parquet} has no photos on this side of the split (held_out={held_out})")
    if limit is not None:
        captions = table.column("caption").take(rows).to_pylist()
        places = _spread_over(captions, limit) if over_captions else _spread(len(rows), limit)
        rows = [rows[place] for place in places]
    chosen = table.take(rows)
    names = chosen.column("asset_id").to_pylist()
    images = [
        decode_photo(image["bytes"] if image else b"", name)
        for image, name in zip(chosen.column("image").to_pylist(), names, strict=True)
    ]
    return Photos(images, [caption or "" for caption in chosen.column("caption").to_pylist()])


def read_columns(parquet: Path, columns: Sequence[str]) -> pa.Table:
    """Reads columns of a Parquet file; raises ValueError if one is missing or it is no Parquet file."""
    try:
        missing = set(columns) - set(pq.read_schema(parquet).names)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{parquet} is no Parquet file: {error}") from error
    if missing:
        raise ValueError(f"{parquet} has no column {', '.join(sorted(missing))}; it needs {', '.join(columns)}")
    return pq.read_table(parquet, columns=list(columns))


def decode_photo(data: bytes, name: str) -> Tensor:
    """Pixels of an encoded photo, upright, uint8 `(3, H, W)`; raises ValueError with `name` if it is none."""
    try:
        return _decode(data)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow: SyntaxError for some broken PNGs
        raise ValueError(f"photo {name!r} cannot be decoded: {error}") from error


def _decode(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def order(count: int, *, seed: int, position: int, batch: int) -> list[int]:
    """Returns the photo numbers at `position`..`position + batch` of an endless series of reshuffled epochs.

    It is a pure function, so resuming needs the position only, not the state of a generator.
    """
    picks = []
    for place in range(position, position + batch):
        epoch, offset = divmod(place, count)
        picks.append(_permutation(count, seed, epoch)[offset])
    return picks


_permutations: dict[tuple[int, int, int], list[int]] = {}


def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    key = (count, seed, epoch)
    if key not in _permutations:
        _permutations.clear()  # one epoch is in use at a time; two at a boundary cost one more shuffle
        _permutations[key] = np.random.default_rng([_ORDER, seed, epoch]).permutation(count).tolist()
    return _permutations[key]


@dataclass(frozen=True, slots=True)
class CropRule:
    """How a photo becomes a square of `size` pixels.

    `scales` is the side of the crop as a share of the photo's short side. A model for 128 px that is first
    trained on 64 px takes crops of half the side, so that the sharpness of the content stays the same.
    """

    size: int
    scales: tuple[float, float] = (0.4, 1.0)
    # How much longer than the other side a side of the crop may be; it is squeezed to the square. Objects that
    # are wider than a photo is high are never seen whole with 1.
    squeeze: float = 1.0
    # Largest change of brightness, contrast and saturation; 0 keeps the colours.
    colour: float = 0.1


def random_crop(image: Tensor, rule: CropRule, key: Sequence[int]) -> Tensor:
    """Cuts one random crop: float (3, size, size) in [0, 1]. The same key gives the same crop."""
    rng = np.random.default_rng([_CROP, *key])
    _, height, width = image.shape
    short = max(8, round(min(height, width) * rng.uniform(*rule.scales)))
    long = round(short * rng.uniform(1, rule.squeeze))
    tall, wide = (min(long, height), short) if height > width else (short, min(long, width))
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    crop = resize(image[:, top : top + tall, left : left + wide], rule.size)
    if rng.random() < 0.5:
        crop = crop.flip(-1)
    if rule.colour:
        crop = _recolour(crop, rng.uniform(1 - rule.colour, 1 + rule.colour, size=3))
    return crop


def _recolour(crop: Tensor, factors: np.ndarray) -> Tensor:
    brightness, contrast, saturation = (float(factor) for factor in factors)
    grey = crop.mean(0, keepdim=True)
    crop = grey + (crop - grey) * saturation
    mean = crop.mean()
    return ((mean + (crop - mean) * contrast) * brightness).clamp(0, 1)


def crop_batch(photos: Photos, picks: Sequence[int], rule: CropRule, key: tuple[int, int]) -> Tensor:
    """One random crop of each picked photo, `(N, 3, size, size)` in [-1, 1]; `key` is seed and first position."""
    seed, position = key
    crops = [random_crop(photos.images[pick], rule, (seed, position + i)) for i, pick in enumerate(picks)]
    return torch.stack(crops) * 2 - 1


def centre_crop(image: Tensor, size: int) -> Tensor:
    """Cuts the largest centred square, resized: float (3, size, size) in [0, 1]."""
    _, height, width = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[:, top : top + side, left : left + side], size)


def resize(crop: Tensor, size: int) -> Tensor:
    """Resizes uint8 pixels to a square with an anti-aliased bicubic filter, to float in [0, 1]."""
    pixels = crop.unsqueeze(0).float() / 255
    if crop.shape[-2:] == (size, size):
        return pixels[0]
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)

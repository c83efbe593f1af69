"""Purifiers: what an attacker does to an image before using it. Pixels in, pixels of the same size out."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Purifier = Callable[[Pixels], Pixels]
"""uint8 (H, W, 3) to uint8 (H, W, 3), deterministic."""


def jpeg75(pixels: Pixels) -> Pixels:
    """JPEG at quality 75 with 4:2:0 chroma subsampling, decoded again."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=75, subsampling="4:2:0")
    return np.asarray(Image.open(file).convert("RGB"))


def half_size(pixels: Pixels) -> Pixels:
    """Half the size and back, Lanczos both ways."""
    image = Image.fromarray(pixels)
    small = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.LANCZOS)
    return np.asarray(small.resize(image.size, Image.Resampling.LANCZOS))


PURIFIERS: Mapping[str, Purifier] = MappingProxyType({"jpeg75": jpeg75, "half-size": half_size})
"""All purifiers of the sampled check, by name."""

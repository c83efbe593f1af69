"""What a protection has changed, made visible."""

from __future__ import annotations

import numpy as np

from pipeline.verify.trial import Pixels

AMPLIFIED = 8


def difference(original: Pixels, protected: Pixels) -> Pixels:
    """The change between two images uint8 (H, W, 3), amplified around middle grey."""
    change = protected.astype(np.int16) - original.astype(np.int16)
    return np.clip(128 + AMPLIFIED * change, 0, 255).astype(np.uint8)

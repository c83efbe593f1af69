"""Tiles cover, blends hold the budget, enlarging keeps what is there."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scale import OVERLAP, blend_tiles, enlarge_delta, tile_boxes, to_training_scale

sizes = st.integers(1, 120)
sides = st.integers(4, 40)


@settings(deadline=None)
@given(sizes, sizes, sides)
def test_tiles_cover_and_overlap(height: int, width: int, side: int) -> None:
    boxes = tile_boxes(height, width, side)
    hits = np.zeros((height, width), int)
    for box in boxes:
        assert 0 <= box.top <= box.top + box.height <= height
        assert 0 <= box.left <= box.left + box.width <= width
        hits[box.top : box.top + box.height, box.left : box.left + box.width] += 1
    assert hits.min() >= 1
    assert len({(box.height, box.width) for box in boxes}) == 1
    if len(boxes) == 1:
        assert height * width <= 2 * side * side
    else:
        assert all(box.height <= side and box.width <= side for box in boxes)
        for starts in (sorted({box.top for box in boxes}), sorted({box.left for box in boxes})):
            assert all(b - a <= side - side // OVERLAP for a, b in itertools.pairwise(starts))


@settings(deadline=None)
@given(sizes, sizes, sides, st.integers(1, 64), st.integers(0, 2**32))
def test_blend_stays_within_its_tiles(height: int, width: int, side: int, eps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = tile_boxes(height, width, side)
    tiles = [rng.integers(-eps, eps + 1, (box.height, box.width, 3)).astype(np.int8) for box in boxes]
    blended = blend_tiles(tiles, boxes, height, width)
    assert blended.shape == (height, width, 3)
    assert blended.dtype == np.int8
    low, high = np.full((height, width, 3), 127), np.full((height, width, 3), -127)
    for tile, box in zip(tiles, boxes, strict=True):
        area = np.s_[box.top : box.top + box.height, box.left : box.left + box.width]
        low[area], high[area] = np.minimum(low[area], tile), np.maximum(high[area], tile)
    assert (low <= blended).all()
    assert (blended <= high).all()


def test_blend_has_no_seam() -> None:
    boxes = tile_boxes(16, 40, 16)
    tiles = [np.full((box.height, box.width, 3), 40 * (i % 2) - 20, np.int8) for i, box in enumerate(boxes)]
    row = blend_tiles(tiles, boxes, 16, 40)[8, :, 0].astype(int)
    assert np.abs(np.diff(row)).max() < 20  # a hard edge would jump by 40


@settings(deadline=None)
@given(st.integers(16, 90), st.integers(16, 90), st.integers(8, 40))
def test_training_scale(height: int, width: int, side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    scaled = to_training_scale(pixels, side)
    if min(height, width) <= side:
        assert scaled is pixels
    else:
        assert min(scaled.shape[:2]) == side
        assert abs(scaled.shape[0] / scaled.shape[1] - height / width) < 0.5 * max(height, width) / side / side + 0.1


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 90), st.integers(1, 90), st.integers(-64, 64))
def test_enlarging_a_flat_delta_keeps_its_level(h: int, w: int, height: int, width: int, level: int) -> None:
    enlarged = enlarge_delta(np.full((h, w, 3), level, np.int8), height, width)
    assert enlarged.shape == (height, width, 3)
    assert enlarged.dtype == np.int16
    assert (enlarged == level).all()


def test_enlarging_to_the_same_size_changes_nothing() -> None:
    delta = np.random.default_rng(0).integers(-8, 9, (20, 30, 3)).astype(np.int8)
    np.testing.assert_array_equal(enlarge_delta(delta, 20, 30), delta)
    enlarged = enlarge_delta(delta, 40, 60)
    assert np.corrcoef(enlarged[::2, ::2, 0].ravel(), delta[..., 0].ravel())[0, 1] > 0.8

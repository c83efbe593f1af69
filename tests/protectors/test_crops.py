"""Crops of a subject's photos: where they lie, and what is trained on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from protectors.apdm import APDM
from protectors.concepts import Words, cache_concept
from protectors.crops import crops
from tests.protectors.model_runs import SMALL, concept, small_model


def test_crops_are_windows_of_the_photo_and_every_other_one_is_mirrored() -> None:
    side = 64
    across = torch.linspace(0, 1, side).expand(1, 3, side, side)
    found = crops(across, 8)
    assert found.shape == (8, 3, side, side)
    steps = found[:, 0, 0].diff(dim=1)
    for number, rises in enumerate(steps):
        inner = rises[4:-4] * (side - 1) * (-1 if number % 2 == 0 else 1)
        # A window of a share of the side is as much less steep.
        assert 0.6 < float(inner.mean()) < 1.05
        assert float(inner.std()) < 0.15
    starts = found[1::2, 0, 0, 0]
    assert starts.unique().numel() > 1
    assert torch.equal(crops(across, 3), found[:3])
    down = crops(across.transpose(-1, -2), 1)[0, 0, :, 0]
    assert bool((down.diff() > 0).all())  # nothing is turned upside down
    assert crops(across, 0).shape == (0, 3, side, side)


def test_crops_stay_in_range_and_are_of_each_photo_in_turn() -> None:
    images = torch.stack(
        [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1)).round(), torch.zeros(3, 16, 16)]
    )
    found = crops(images, 3)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert [bool(one.any()) for one in found] == [True, False] * 3


def test_a_model_is_protected_on_crops_too(tmp_path: Path) -> None:
    model, given = small_model(tmp_path / "tiny"), concept(2)
    words = (Words(instance="a photo of sks dog", general="a photo of dog"),)
    plain = cache_concept(model, given, words, class_images=3)
    more = cache_concept(model, given, words, class_images=3, crops_of_each=2)
    assert torch.equal(more.images[:2], plain.images)
    assert (len(more.images), len(more.moments[0]), len(more.positives)) == (6, 6, 2)
    # Provenance names the photos alone.
    assert more.pairs == plain.pairs
    results = [APDM(SMALL.replace(crops=count), model).protect([given], seed=3) for count in (0, 2)]
    assert any(not torch.equal(weight, results[1].weights[name]) for name, weight in results[0].weights.items())
    with pytest.raises(ValueError, match="crops=-1"):
        SMALL.replace(crops=-1)

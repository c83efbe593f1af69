from __future__ import annotations

import math

import pytest
import torch

from protectors.constraints import linf_levels, project, psnr_db, quantize, to_8bit


@pytest.mark.parametrize("eps", [1.0, 1.5, 6.375, 7.65, 15.3, 16.0])
def test_quantize_bounds_whole_levels_at_the_ends_of_the_range(eps: float) -> None:
    originals = (torch.arange(256).float() / 255).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    for shift in (-1.0, -eps / 255, 0.3, eps / 255, 1.0):
        saved = quantize(originals + shift, originals, eps)
        assert linf_levels(saved, originals).item() <= math.floor(eps)
        assert torch.equal(to_8bit(saved), saved)
        assert torch.equal(quantize(saved, originals, eps), saved)


def test_quantize_without_change_returns_the_rounded_original() -> None:
    originals = torch.rand(2, 3, 9, 7)
    assert torch.equal(quantize(originals, originals, 8.0), to_8bit(originals))


def test_project_stays_in_ball_and_range_and_keeps_nan() -> None:
    originals = torch.rand(2, 3, 8, 8)
    wild = originals + torch.randn_like(originals)
    wild[0, 0, 0, 0] = torch.nan
    inside = project(wild, originals, 4.0)
    assert inside[0, 0, 0, 0].isnan()
    rest = inside.nan_to_num(0.5) - originals.where(~inside.isnan(), 0.5)
    assert rest.abs().max() <= 4 / 255 + 1e-6
    assert inside[1].min() >= 0
    assert inside[1].max() <= 1


def test_psnr_of_one_level_everywhere() -> None:
    originals = torch.full((2, 3, 4, 4), 0.5)
    changed = originals.clone()
    changed[0] += 1 / 255
    values = psnr_db(changed, originals)
    assert values[0].item() == pytest.approx(20 * math.log10(255), abs=1e-4)
    assert values[1].item() == math.inf

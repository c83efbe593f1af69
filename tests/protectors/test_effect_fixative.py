"""Whether Fixative leaves more after purification than Mist on the embedded model, and shows no more: measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels
from pipeline.verify.purifiers import PURIFIERS
from protectors.diffusion import DiffusionModel, load_model
from protectors.fixative import Fixative
from protectors.mist import Mist
from protectors.reference import reference_path
from protectors.reference.quality import ssim
from tests.protectors.effects import is_above_zero, mean_difference, photos

STEPS = 40


def shift(model: DiffusionModel, images: Tensor, clean: Tensor) -> Tensor:
    """Mean squared distance of the latents per photo ``(B,)``."""
    with torch.no_grad():
        return (model.encode_moments(images)[0] - model.encode_moments(clean)[0]).square().mean((1, 2, 3))


def purified(name: str, images: Tensor) -> Tensor:
    levels = (images * 255).round().to(torch.uint8)
    return PURIFIERS[name].purify(levels, seeds=range(len(images)), models=AttackModels()).float() / 255


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_more_is_left_after_purification_than_of_mist_and_no_more_is_seen() -> None:
    model, clean = load_model(str(reference_path())), photos()
    seeds = list(range(len(clean)))
    ours = Fixative(Fixative.presets["fast"].replace(steps=STEPS), model).protect(clean, seeds=seeds).images
    theirs = Mist(Mist.presets["fast"].replace(steps=STEPS), model).protect(clean, seeds=seeds).images
    gains = {"SSIM": mean_difference(ssim(ours, clean), ssim(theirs, clean))}
    for name in ("vae", "ldm-0.1", "bilateral"):
        cleaned = purified(name, clean)
        left = [shift(model, purified(name, images), cleaned) for images in (ours, theirs)]
        gains[name] = mean_difference(*left)
        print(name, [round(float(values.mean()), 4) for values in left], gains[name])
    print("SSIM", gains["SSIM"])
    assert [name for name in ("vae", "ldm-0.1", "bilateral") if not is_above_zero(gains[name])] == []
    assert gains["SSIM"].high is not None
    assert gains["SSIM"].high > -0.005  # not clearly worse

"""One contract for every registered purifier, on tiny random models and with few steps.

1. uint8 `(B, 3, H, W)` of any size in and out, the input untouched; 2. the same seed gives the same pixels, another
seed gives others exactly where the purifier says so; 3. row i depends on image i and seed i alone: exactly for image
processing, within one level for models, whose convolutions round differently in other batches; 4. the attacker's
checkpoints stay as they were; 5. without its checkpoint it refuses.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind, ModelMissing
from pipeline.verify.purifiers import PURIFIERS, SUITES
from pipeline.verify.purifiers.adverse_cleaner import AdverseCleaner
from pipeline.verify.purifiers.base import Purifier
from pipeline.verify.purifiers.diffpure import DiffPure, ResizeOnly
from pipeline.verify.purifiers.gridpure import GrIDPure
from pipeline.verify.purifiers.impress import ImpressLite
from pipeline.verify.purifiers.latent import LDMPure
from pipeline.verify.purifiers.upscale import NoisyUpscaling, PDMPure
from tests.pipeline.verify_purifiers.models import save_attack_models

SEEDS = (7, 2**40)
# One side below the pixel model's, one of several tiles, both odd.
SIZE = (29, 75)


@pytest.fixture(scope="module")
def models(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> AttackModels:
    return save_attack_models(tmp_path_factory.mktemp("models"))


def cheap(purifier: Purifier) -> Purifier:
    """The same purifier with as few steps as show what the contract is about."""
    match purifier:
        case AdverseCleaner():
            return replace(purifier, bilateral_rounds=2, guided_rounds=min(1, purifier.guided_rounds))
        case LDMPure():
            return replace(purifier, steps=10)
        case DiffPure():
            return replace(purifier, t=8, steps=2)
        case GrIDPure():
            return replace(purifier, t=2, iterations=2)
        case ImpressLite():
            return replace(purifier, iterations=2)
        case NoisyUpscaling():
            return replace(purifier, upscaling=replace(purifier.upscaling, steps=2, tile=32))
        case PDMPure():
            return replace(purifier, steps=2, upscaling=replace(purifier.upscaling, steps=2))
    return purifier


def pictures(height: int, width: int) -> Tensor:
    """Two images with smooth and rough areas."""
    coarse = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    fine = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (0.85 * smooth + 0.15 * fine).mul(255).round().to(torch.uint8)


def state(pipeline: Any) -> dict[str, Any]:
    """Weights of all networks and everything that the schedulers hold."""
    return {
        name: copy.deepcopy(part.state_dict() if isinstance(part, torch.nn.Module) else vars(part))
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module) or "scheduler" in name
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool((left == right) is True)


@pytest.mark.parametrize("name", PURIFIERS)
def test_contract(name: str, models: AttackModels) -> None:
    purifier = cheap(PURIFIERS[name])
    kinds = [kind for kind in models.folders if purifier.missing(AttackModels({})) is not None]
    before = {kind: state(models.get(kind)) for kind in kinds}
    images = pictures(*SIZE)
    given = images.clone()
    purified = purifier.purify(images, seeds=SEEDS, models=models)
    assert purified.dtype == torch.uint8
    assert purified.shape == images.shape
    assert torch.equal(images, given)
    # Nothing is left to shrink where the shorter side is below the model's.
    assert torch.equal(purified, images) is isinstance(purifier, ResizeOnly)
    assert torch.equal(purified, purifier.purify(images, seeds=SEEDS, models=models))
    other = purifier.purify(images, seeds=(1, 2), models=models)
    assert torch.equal(other, purified) is not purifier.randomised
    singles = [purifier.purify(images[i : i + 1], seeds=SEEDS[i : i + 1], models=models) for i in (0, 1)]
    apart = (torch.cat(singles).int() - purified.int()).abs().max()
    assert apart <= (0 if purifier.needs is None else 1)
    assert same(before, {kind: state(models.get(kind)) for kind in kinds})
    assert all(p.grad is None for kind in kinds for p in models.get(kind).unet.parameters())


@pytest.mark.parametrize("name", [name for name, purifier in PURIFIERS.items() if purifier.needs is None])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 9), (300, 301)])
def test_image_processing_takes_any_size(name: str, height: int, width: int) -> None:
    images = pictures(height, width)[:1]
    assert cheap(PURIFIERS[name]).purify(images, seeds=[0], models=AttackModels({})).shape == images.shape


@pytest.mark.parametrize("name", ["vae", "ldm-0.1", "diffpure-50", "gridpure", "noisy-upscaling-quick", "pdm-pure"])
def test_models_take_sizes_far_from_their_own(name: str, models: AttackModels) -> None:
    images = pictures(300, 49)[:1]
    assert cheap(PURIFIERS[name]).purify(images, seeds=[0], models=models).shape == images.shape
    tiny = pictures(5, 3)[:1]
    assert cheap(PURIFIERS[name]).purify(tiny, seeds=[0], models=models).shape == tiny.shape


@pytest.mark.parametrize("name", [name for name, purifier in PURIFIERS.items() if purifier.needs is not None])
def test_without_its_checkpoint_it_refuses(name: str) -> None:
    nothing = AttackModels({})
    assert PURIFIERS[name].missing(nothing) is PURIFIERS[name].needs
    with pytest.raises(ModelMissing, match=f"no {PURIFIERS[name].needs} model given"):
        PURIFIERS[name].purify(pictures(32, 32), seeds=SEEDS, models=nothing)


def test_pdm_pure_needs_the_upscaler_too(models: AttackModels) -> None:
    cascade_only = AttackModels({ModelKind.CASCADE: models.folders[ModelKind.CASCADE]})
    assert PURIFIERS["pdm-pure"].missing(cascade_only) is ModelKind.UPSCALER
    assert PURIFIERS["pdm-pure"].missing(models) is None
    with pytest.raises(ModelMissing, match="no upscaler model"):
        PURIFIERS["pdm-pure"].purify(pictures(32, 32), seeds=SEEDS, models=cascade_only)


def test_wrong_images_and_seeds_are_refused() -> None:
    jpeg, nothing = PURIFIERS["jpeg75"], AttackModels({})
    with pytest.raises(ValueError, match="must be uint8"):
        jpeg.purify(torch.zeros(1, 3, 8, 8), seeds=[0], models=nothing)
    with pytest.raises(ValueError, match="must be uint8"):
        jpeg.purify(pictures(8, 8)[:0], seeds=[], models=nothing)
    with pytest.raises(ValueError, match="2 images and 1 seeds"):
        jpeg.purify(pictures(8, 8), seeds=[0], models=nothing)


def test_suites_hold_each_other_and_everything() -> None:
    quick, standard, full = (set(SUITES[name]) for name in ("quick", "standard", "full"))
    assert {"jpeg75", "chain", "half-size", "bilateral", "vae", "ldm-0.1"} == quick
    assert quick < standard < full == set(PURIFIERS)
    assert all(len(set(names)) == len(names) for names in SUITES.values())


def test_names_have_parameters_and_a_line_of_their_own() -> None:
    recorded = [repr(purifier.parameters()) for purifier in PURIFIERS.values()]
    assert len(set(recorded)) == len(PURIFIERS)
    assert all(20 < len(purifier.summary) <= 110 for purifier in PURIFIERS.values())
    assert PURIFIERS["gridpure"].parameters() == {
        "kind": "GrIDPure", "t": 10, "iterations": 20, "gamma": 0.1, "upstream": False
    }  # fmt: skip

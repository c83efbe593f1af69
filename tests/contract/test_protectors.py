"""One contract for every registered protector. A new method costs one row in ``SMALL``.

1. Pixels: shape, dtype, range, finite, whole levels, budget after rounding, any size, grey, masks.
2. Randomness: the same seed gives the same pixels, alone or in a batch, whatever its place.
3. Effect: the method's own objective improves on average. Efficacy on real models is not a unit test.
4. Side effects: the model's weights stay as they are and get no gradients.
5. Form: bad input raises, the configuration survives JSON, presets exist, the docstring is complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protectors.base import ImageProtector, ProtectResult
from protectors.diffusion import DiffusionModel, load_model
from protectors.inpainting import InpaintingModel, load_inpainting_model
from protectors.model_files import ModelError
from protectors.pixel import PixelModel, load_pixel_model
from protectors.registry import protector_class, protector_names
from tests.contract.docstrings import assert_complete
from tests.protectors.tiny import save_tiny_inpainting_model, save_tiny_model, save_tiny_pixel_model

# Overrides of the "fast" preset that keep a test under a second on the tiny model.
SMALL: dict[str, dict[str, Any]] = {
    "advdm": {"steps": 4, "eval_draws": 2},
    "antipure": {"steps": 4, "step_levels": 4.0, "eval_draws": 2},
    # Without a random start, steps long enough to reach the largest budget of the tests.
    "anti_diffusion": {
        "epochs": 2,
        "pt_steps": 2,
        "pgd_steps": 2,
        "unet_steps": 1,
        "step_levels": 8.0,
        "eval_draws": 2,
    },
    "aspl": {
        "rounds": 2,
        "pgd_steps": 1,
        "clean_steps": 1,
        "perturbed_steps": 1,
        "step_levels": 8.0,
        "eval_draws": 2,
    },
    "fixative": {"steps": 4, "step_levels": 4.0, "eval_draws": 2},
    "fsmg": {"steps": 2, "training_steps": 1, "step_levels": 8.0, "eval_draws": 2},
    "diffusion_guard": {"steps": 4, "step_levels": 4.0, "eval_draws": 2},
    "metacloak": {
        "training_steps": 1,
        "snapshots": 1,
        "rounds": 2,
        "pgd_steps": 1,
        "unroll_steps": 1,
        "step_levels": 8.0,
        "eval_draws": 2,
    },
    "mist": {"steps": 4, "eval_draws": 2},
    "noise": {},
    "static": {},
    "photoguard": {"steps": 4},
    "pid": {"steps": 4},
    "simac": {
        "rounds": 1,
        "pgd_steps": 2,
        "clean_steps": 1,
        "perturbed_steps": 0,
        "selection_rounds": 1,
        "step_levels": 8.0,
        "eval_draws": 2,
    },
    # Starts at the original: the steps must be able to reach every budget of the table. With a target, because random
    # weights know no score.
    "sds": {"steps": 4, "step_levels": 4.0, "eval_draws": 2, "target_weight": 5.0},
}
FAKE = "protectors.fake:FakeProtector"
NAMES = [*protector_names(), FAKE]
MODEL_NAMES = [name for name in NAMES if protector_class(name).needs_model()]


pytestmark = pytest.mark.usefixtures("one_thread")


# What writes a tiny folder of each kind of model, and what loads it.
KINDS: dict[type, tuple[Callable[..., Path], Callable[[str], Any]]] = {
    DiffusionModel: (save_tiny_model, load_model),
    InpaintingModel: (save_tiny_inpainting_model, load_inpainting_model),
    PixelModel: (save_tiny_pixel_model, load_pixel_model),
}
Models = dict[tuple[type, str], Any]
"""By class and prediction type."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    return {
        (kind, prediction): load(str(save(root / kind.__name__ / prediction, prediction_type=prediction)))
        for kind, (save, load) in KINDS.items()
        for prediction in ("epsilon", "v_prediction")
    }


def build(name: str, models: Models, prediction: str = "epsilon", **changes: Any) -> ImageProtector[Any, Any]:
    method = protector_class(name)
    config = method.presets["fast"].replace(**{**SMALL.get(name, {}), **changes})
    return method(config, models[method.model_type, prediction] if method.needs_model() else None)


def pictures(count: int, height: int = 32, width: int = 40, seed: int = 0) -> Tensor:
    """Smooth pictures with black and white areas, in whole levels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 1.6 - 0.3
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth.clamp(0, 1) * 255).round() / 255


def assert_sound(result: ProtectResult, images: Tensor, budget: int) -> None:
    output = result.images
    assert output.shape == images.shape
    assert output.dtype == torch.float32
    assert output.device.type == "cpu"
    assert output.isfinite().all()
    assert output.min() >= 0
    assert output.max() <= 1
    levels, reference = (output * 255).round(), (images * 255).round()
    assert torch.equal(levels / 255, output)
    change = (levels - reference).abs().flatten(1).amax(1)
    assert change.max() <= budget
    assert [fact.linf_levels for fact in result.facts] == change.tolist()
    assert all(fact.failed is None for fact in result.facts)


def test_every_registered_protector_has_a_row() -> None:
    assert set(protector_names()) <= set(SMALL)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NAMES)
def test_result_is_sound_and_reproducible(name: str, prediction: str, models: Models) -> None:
    images = pictures(2)
    protector = build(name, models, prediction)
    first, again = (protector.protect(images, seeds=[3, 2**64 - 1]) for _ in range(2))
    assert_sound(first, images, 8)
    assert (first.images != images).flatten(1).any(1).all()
    assert torch.equal(first.images, again.images)
    assert first.facts == again.facts


@pytest.mark.parametrize(("eps", "budget"), [(1.0, 1), (6.375, 6), (7.65, 7), (16.0, 16)])
@pytest.mark.parametrize("name", NAMES)
def test_budget_holds_after_rounding(name: str, eps: float, budget: int, models: Models) -> None:
    images = pictures(1)
    result = build(name, models, eps_levels=eps).protect(images, seeds=[1])
    assert_sound(result, images, budget)
    assert result.facts[0].linf_levels == budget


@pytest.mark.parametrize("name", NAMES)
def test_seeds_differ_in_every_bit(name: str, models: Models) -> None:
    images = pictures(1).repeat(3, 1, 1, 1)
    output = build(name, models).protect(images, seeds=[5, 6, 5 + 2**32]).images
    assert not torch.equal(output[0], output[1])
    assert not torch.equal(output[0], output[2])


@pytest.mark.parametrize("name", NAMES)
def test_batch_equals_singles_in_any_order(name: str, models: Models) -> None:
    """Batched kernels sum in another order, so a gradient near zero may change its sign: up to 1 % of values
    may differ (float32 on a CPU, 20 steps: AdvDM 0.4 %, PhotoGuard none); objectives agree to three digits."""
    images, seeds = pictures(3), [11, 12, 13]
    protector = build(name, models)
    batch = protector.protect(images, seeds=seeds)
    backwards = protector.protect(images.flip(0), seeds=seeds[::-1])
    for place, seed in enumerate(seeds):
        single = protector.protect(images[place : place + 1], seeds=[seed])
        for other in (batch.images[place], backwards.images[2 - place]):
            assert (single.images[0] != other).float().mean() < 0.01
        before, alone = batch.facts[place], single.facts[0]
        assert before.objective_before == pytest.approx(alone.objective_before, rel=1e-4)
        assert before.objective_after == pytest.approx(alone.objective_after, rel=1e-3)


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (40, 72), (1, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_any_size(name: str, size: tuple[int, int], models: Models) -> None:
    images = pictures(1, *size)
    assert_sound(build(name, models).protect(images, seeds=[1]), images, 8)


@pytest.mark.parametrize("name", NAMES)
def test_grey_stays_grey_beside_colour(name: str, models: Models) -> None:
    images = pictures(2)
    images[0] = images[0, :1]
    output = build(name, models).protect(images, seeds=[1, 2]).images
    assert torch.equal(output[0], output[0, :1].expand(3, -1, -1))
    assert (output[0] != images[0]).any()


@pytest.mark.parametrize("name", NAMES)
def test_mask_is_respected(name: str, models: Models) -> None:
    images = pictures(2)
    masks = torch.zeros(2, 1, 32, 40)
    masks[:, :, 8:24, 10:30] = 1
    output = build(name, models).protect(images, seeds=[1, 2], masks=masks).images
    outside = (masks == 0).expand_as(images)
    assert torch.equal(output[outside], images[outside])
    assert (output != images).any()


@pytest.mark.parametrize("name", NAMES)
def test_objective_improves_on_average_and_is_paired(name: str, models: Models) -> None:
    images, seeds = pictures(4) * 0.6 + 0.2, [1, 2, 3, 4]
    images = (images * 255).round() / 255
    changes = {"steps": 12, "eval_draws": 8} if name == "advdm" else {}
    # With random weights an epsilon model's loss hardly depends on the image; v has the image in its target.
    protector = build(name, models, "v_prediction", **changes)
    result = protector.protect(images, seeds=seeds)
    before, after = (protector.objective(x, originals=images, seeds=seeds) for x in (images, result.images))
    assert not after.requires_grad
    assert after.mean() > before.mean()
    assert before.tolist() == pytest.approx([fact.objective_before for fact in result.facts], rel=1e-5)
    assert after.tolist() == pytest.approx([fact.objective_after for fact in result.facts], rel=1e-5)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_model_stays_frozen(name: str, models: Models) -> None:
    model = models[protector_class(name).model_type, "epsilon"]
    networks = [part for part in vars(model).values() if isinstance(part, torch.nn.Module)]
    assert networks
    before = [{key: value.clone() for key, value in part.state_dict().items()} for part in networks]
    build(name, models).protect(pictures(1), seeds=[1])
    for part, state in zip(networks, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items())
        assert all(parameter.grad is None for parameter in part.parameters())
        assert not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_progress_counts_to_the_end(name: str, models: Models) -> None:
    protector = build(name, models)
    calls: list[tuple[int, int]] = []
    result = protector.protect(pictures(1), seeds=[1], progress=lambda *call: calls.append(call))
    assert calls == [(step + 1, protector.steps) for step in range(protector.steps)]
    assert result.facts[0].steps == protector.steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, "B, 3, H, W"),
        ({"images": torch.zeros(1, 1, 8, 8)}, "B, 3, H, W"),
        ({"images": torch.zeros(0, 3, 8, 8), "seeds": []}, "at least one"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.float64)}, "float32"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "float32"),
        ({"images": torch.full((1, 3, 8, 8), 2.0)}, "outside"),
        ({"images": torch.full((1, 3, 8, 8), torch.nan)}, "NaN"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"seeds": [-1]}, "64-bit"),
        ({"seeds": [2**64]}, "64-bit"),
        ({"prompts": []}, "prompts"),
        ({"prompts": "a"}, "prompts"),
        ({"masks": torch.ones(1, 3, 8, 8)}, "masks"),
        ({"masks": torch.full((1, 1, 8, 8), 0.5)}, "masks"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_input_raises(name: str, change: dict[str, Any], message: str, models: Models) -> None:
    given: dict[str, Any] = {"images": torch.zeros(1, 3, 8, 8), "seeds": [1], **change}
    with pytest.raises(ValueError, match=message):
        build(name, models).protect(given.pop("images"), **given)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_config_or_model_raises(name: str) -> None:
    method = protector_class(name)
    with pytest.raises(TypeError, match=method.config_type.__name__):
        method("fast", None)
    with pytest.raises(ModelError, match="model of class"):
        method(method.presets["fast"], object())


@pytest.mark.parametrize("name", NAMES)
def test_config_and_presets(name: str) -> None:
    method = protector_class(name)
    assert {"paper", "fast", "strong"} <= set(method.presets)
    for config in method.presets.values():
        text = config.canonical_json()
        rebuilt = method.config_type.from_dict(json.loads(text))
        assert type(config) is method.config_type
        assert rebuilt == config
        assert rebuilt.canonical_json() == text
    with pytest.raises(ValueError, match=r"no field 'stepz'.*eps_levels"):
        method.config_type.from_dict({"stepz": 1})
    assert method.name == name or name == FAKE
    assert method.version


@pytest.mark.parametrize("name", NAMES)
def test_docstring_is_complete(name: str) -> None:
    assert_complete(protector_class(name))

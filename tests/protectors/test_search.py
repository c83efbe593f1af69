"""Early stop and restarts of the methods that search on every image for itself, and what they leave as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from protectors.base import Batch
from protectors.config import LATE, SearchConfig
from protectors.diffusion import DiffusionModel, load_model
from protectors.inpainting import InpaintingModel, load_inpainting_model
from protectors.pgd import Places, Plateau, Progress
from protectors.photoguard import PhotoGuard, PhotoGuardConfig
from protectors.pid import PID, PIDConfig
from protectors.pixel import PixelModel, load_pixel_model
from protectors.registry import protector_class, protector_names
from protectors.search import PgdProtector
from tests.protectors.tiny import save_tiny_inpainting_model, save_tiny_model, save_tiny_pixel_model

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [name for name in protector_names() if issubclass(protector_class(name), PgdProtector)]
SMALL: dict[str, Any] = {"steps": 5, "step_levels": 2.0, "eval_draws": 1, "random_start": True, "schedule": "constant"}
# Steps that each seed takes in the tests that script the objective; others take all.
LIMITS = {1: 2, 2: 4}

# Of the canonical JSON of a method's presets: late fields must not show in it. Whoever changes a preset on purpose
# makes stored results of the method invalid, and changes this table.
KEYS = {
    "advdm": "bceda2b7d8074802",
    "anti_diffusion": "563a8dd4ea24d2d1",
    "antipure": "c74315db47225704",
    "aspl": "050acd0a10fd25bd",
    "diffusion_guard": "c955353b4baea1e0",
    "fixative": "00bd1657e26be3cb",
    "fsmg": "3a5eb10f519b661a",
    "metacloak": "4f4461fb23509099",
    "mist": "7a29251ae172cb5b",
    "noise": "96a35c0e38d9fc6c",
    "photoguard": "4a118d840fb57c89",
    "pid": "54fb7e5e61bcf9da",
    "sds": "59c1fb07cf67b302",
    "simac": "82a01ba30e4077d2",
    "static": "436a5e59b33480aa",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[type, Any]:
    root = tmp_path_factory.mktemp("models")
    return {
        DiffusionModel: load_model(str(save_tiny_model(root / "latent"))),
        InpaintingModel: load_inpainting_model(str(save_tiny_inpainting_model(root / "inpainting"))),
        PixelModel: load_pixel_model(str(save_tiny_pixel_model(root / "pixel"))),
    }


def build(name: str, models: dict[type, Any], **changes: Any) -> PgdProtector[Any, Any]:
    method = protector_class(name)
    protector = method(method.presets["fast"].replace(**{**SMALL, **changes}), models[method.model_type])
    assert isinstance(protector, PgdProtector)
    return protector


def pictures(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, 3, 32, 32, generator=generator) * 191 + 32).round() / 255


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The objective grows by one in every step until the limit of the seed, whatever the images are."""

    def plateau(self: PgdProtector[Any, Any], batch: Batch) -> Plateau:
        calls = iter(range(1000))

        def objective(images: Tensor, places: Places) -> Tensor:
            call = next(calls)
            return torch.tensor([float(min(call, LIMITS.get(batch.seeds[place], 99) - 1)) for place in places])

        return Plateau(1, objective)

    monkeypatch.setattr(PgdProtector, "_plateau", plateau)


def differing(first: Tensor, second: Tensor) -> float:
    return float((first != second).float().mean())


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_stops_is_what_it_is_alone_and_the_others_too(name: str, models: dict[type, Any]) -> None:
    """Kernels round differently at other batch sizes: up to 1 % of values may differ, as in the contract test."""
    images, seeds, masks = pictures(3), [1, 2, 3], torch.ones(3, 1, 32, 32)
    masks[0, :, :6], masks[1, :, 20:], masks[2, :, :, :9] = 0, 0, 0
    protector = build(name, models, patience=1)
    batch = protector.protect(images, seeds=seeds, masks=masks)
    assert [fact.steps for fact in batch.facts] == [2, 4, 5]
    for place, seed in enumerate(seeds):
        one = slice(place, place + 1)
        single = protector.protect(images[one], seeds=[seed], masks=masks[one])
        short = build(name, models, steps=LIMITS.get(seed, 5)).protect(images[one], seeds=[seed], masks=masks[one])
        assert torch.equal(single.images, short.images)
        assert single.facts == short.facts
        assert differing(batch.images[place], single.images[0]) < 0.01


@pytest.mark.usefixtures("scripted")
def test_the_model_sees_only_images_that_are_on_their_way(
    models: dict[type, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    model = models[DiffusionModel]
    encode = model.encode_moments

    def counted(images: Tensor) -> tuple[Tensor, Tensor]:
        if images.requires_grad:  # a step, no measurement
            seen.append(len(images))
        return encode(images)  # type: ignore[no-any-return]

    monkeypatch.setattr(model, "encode_moments", counted)
    build("advdm", models, patience=1).protect(pictures(3), seeds=[1, 2, 3])
    assert seen == [3, 3, 2, 2, 1]


@pytest.mark.parametrize("method", [PhotoGuard, PID])
def test_the_rule_stops_at_a_plateau(method: Callable[..., Any], models: dict[type, Any]) -> None:
    settings = {"steps": 60, "step_levels": 1.0, "schedule": "constant", "eps_levels": 4.0}
    config = PhotoGuardConfig if method is PhotoGuard else PIDConfig
    images, seeds = pictures(3), [4, 5, 6]
    full, early = (
        method(config.from_dict({**settings, "patience": patience}), models[DiffusionModel]).protect(
            images, seeds=seeds
        )
        for patience in (0, 6)
    )
    for long, short in zip(full.facts, early.facts, strict=True):
        assert long.steps == 60
        assert 12 <= short.steps <= 42
        assert short.steps % 6 == 0
        gained, all_gain = (fact.objective_after - fact.objective_before for fact in (short, long))
        assert gained > 0.95 * all_gain


def test_a_group_of_which_some_have_stopped_does_not_matter(models: dict[type, Any]) -> None:
    """The pipeline names groups for all methods alike; and an image without any area to change stops first."""
    masks = torch.ones(3, 1, 32, 32)
    masks[1] = 0
    protector = build("pid", models, steps=8, patience=2)
    alone = protector.protect(pictures(3), seeds=[1, 2, 3], masks=masks)
    grouped = protector.protect(pictures(3), seeds=[1, 2, 3], masks=masks, groups=["a", "a", "b"])
    assert alone.facts[1].steps == 4 < alone.facts[0].steps
    assert torch.equal(alone.images, grouped.images)
    assert alone.facts == grouped.facts


@pytest.mark.parametrize("name", NAMES)
def test_restarts_keep_the_best_of_each_image(name: str, models: dict[type, Any]) -> None:
    images, seeds = pictures(2), [7, 2**63]
    protector = build(name, models, steps=2, restarts=3)
    runs: list[tuple[tuple[int, ...], Tensor]] = []
    climb = protector._climb

    def spy(batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        runs.append((batch.seeds, climb(batch, progress, plateau)))
        return runs[-1][1]

    protector._climb = spy  # type: ignore[method-assign]
    calls: list[tuple[int, int]] = []
    result = protector.protect(images, seeds=seeds, progress=lambda *call: calls.append(call))
    assert calls == [(step + 1, 6) for step in range(6)]
    assert [fact.steps for fact in result.facts] == [6, 6]
    assert runs[0][0] == tuple(seeds)
    assert len({seed for run in runs for seed in run[0]}) == 6
    saved = [build(name, models, steps=2).protect(images, seeds=run[0]).images for run in runs]
    values = torch.stack([protector.objective(each, originals=images, seeds=seeds) for each in saved])
    for place, best in enumerate(values.argmax(0).tolist()):
        assert torch.equal(result.images[place], saved[best][place])
        assert result.facts[place].objective_after == pytest.approx(float(values[best, place]), rel=1e-5)
        assert values[best, place] >= values[0, place]
    assert values.std(0).min() > 0


def test_a_start_that_fails_loses_to_one_that_does_not(models: dict[type, Any]) -> None:
    protector = build("pid", models, restarts=2)
    climb, number = protector._climb, iter(range(2))

    def ill_at_first(batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        images = climb(batch, progress, plateau)
        images[next(number)] = torch.nan
        return images

    protector._climb = ill_at_first  # type: ignore[method-assign]
    result = protector.protect(pictures(2), seeds=[1, 2])
    assert [fact.failed for fact in result.facts] == [None, None]
    once = build("pid", models).protect(pictures(2), seeds=[1, 2])
    assert not torch.equal(result.images[0], once.images[0])
    assert torch.equal(result.images[1], once.images[1])


@pytest.mark.usefixtures("scripted")
def test_steps_of_all_starts_are_counted_and_progress_never_turns_back(models: dict[type, Any]) -> None:
    calls: list[tuple[int, int]] = []
    protector = build("pid", models, patience=1, restarts=2)
    result = protector.protect(pictures(1), seeds=[1], progress=lambda *call: calls.append(call))
    # The second start has a seed of its own, which the script lets take all steps.
    assert result.facts[0].steps == 2 + 5
    done = [step for step, _ in calls]
    assert done == sorted(done)
    assert calls[-1] == (10, 10)
    assert protector.steps == 10


def test_a_schedule_that_shrinks_the_steps_changes_pixels(models: dict[type, Any]) -> None:
    results = [
        build("pid", models, schedule=name).protect(pictures(1), seeds=[1]).images
        for name in ("constant", "linear", "cosine")
    ]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@pytest.mark.parametrize("name", sorted(KEYS))
def test_keys_of_stored_results_stay(name: str) -> None:
    presets = protector_class(name).presets
    text = "\n".join(f"{preset} {config.canonical_json()}" for preset, config in sorted(presets.items()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == KEYS[name]


@pytest.mark.parametrize("name", NAMES)
def test_late_fields_keep_their_defaults_because_keys_leave_them_out(name: str) -> None:
    late = {each.name: each.default for each in fields(protector_class(name).config_type) if each.metadata == LATE}
    expected = {"patience": 0, "restarts": 1, "schedule": "linear" if name == "photoguard" else "constant"}
    assert late == expected


def test_a_patience_with_which_nothing_could_stop_is_refused() -> None:
    for patience in (5, 60, -1):
        with pytest.raises(ValueError, match=f"patience={patience}: use less than half of the steps"):
            SearchConfig(steps=10, patience=patience)
    assert SearchConfig(steps=10, patience=4).patience == 4


@pytest.mark.parametrize("name", NAMES)
def test_late_fields_count_where_they_differ(name: str) -> None:
    method = protector_class(name)
    config = method.presets["paper"].replace(patience=20, schedule="cosine")
    assert {"patience": 20, "schedule": "cosine"}.items() <= config.to_dict().items()
    assert "restarts" not in config.to_dict()
    assert method.config_type.from_dict(config.to_dict()) == config
    assert config.replace(patience=0).patience == 0


@pytest.mark.parametrize("name", sorted(set(protector_names()) - set(NAMES)))
def test_methods_on_groups_and_controls_do_not_offer_it(name: str) -> None:
    for field, value in (("patience", 5), ("restarts", 2), ("schedule", "cosine")):
        with pytest.raises(ValueError, match=f"no field '{field}'"):
            protector_class(name).presets["fast"].replace(**{field: value})


def test_restarts_need_random_starts() -> None:
    with pytest.raises(ValueError, match="restarts=2: use 1, or random_start"):
        protector_class("sds").presets["paper"].replace(restarts=2)
    assert protector_class("sds").presets["paper"].replace(restarts=2, random_start=True).restarts == 2  # type: ignore[attr-defined]

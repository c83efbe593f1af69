"""One contract for every registered model protector. A new method costs one row in ``SMALL``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from protectors.concepts import Concept
from protectors.diffusion import DiffusionModel, load_model
from protectors.dpo import squared_error
from protectors.dreambooth import class_latents
from protectors.learning_to_protect import ProtectionLoss, Sample
from protectors.model_base import ModelProtector, Study
from protectors.model_files import ModelError
from protectors.model_registry import model_protector_class, model_protector_names
from protectors.naive import Naive
from protectors.registry import UnknownProtector
from tests.contract.docstrings import assert_complete
from tests.protectors.model_runs import concept, copied, small_model

pytestmark = pytest.mark.usefixtures("one_thread")

# Overrides of the "fast" preset that keep a test under a second on the tiny model.
SMALL: dict[str, dict[str, Any]] = {
    "anchored": {"steps": 2, "inner_steps": 2, "batch": 1, "class_images": 2, "kept_images": 2, "retention_batch": 1},
    "apdm": {"steps": 2, "inner_steps": 2, "batch": 1, "class_images": 2},
    "imma": {"steps": 2, "batch": 1},
    "naive": {"steps": 2, "batch": 1, "class_images": 2},
}
NAMES = model_protector_names()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return small_model(tmp_path_factory.mktemp("models") / "tiny")


def build(name: str, model: Any, **changes: Any) -> ModelProtector[Any]:
    method = model_protector_class(name)
    return method(method.presets["fast"].replace(**{**SMALL.get(name, {}), **changes}), model)


def test_every_registered_model_protector_has_a_row() -> None:
    assert set(NAMES) == set(SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_result_is_sound_and_reproducible(name: str, model: DiffusionModel) -> None:
    calls: list[tuple[int, int]] = []
    first = build(name, model).protect([concept()], seed=2**64 - 1, progress=lambda *call: calls.append(call))
    again = build(name, model).protect([concept()], seed=2**64 - 1)
    other = build(name, model).protect([concept()], seed=1)
    given = dict(model.unet.named_parameters())
    assert set(first.weights) == set(given)
    for key, weight in first.weights.items():
        assert weight.shape == given[key].shape
        assert weight.dtype == torch.float32
        assert weight.device.type == "cpu"
        assert not weight.requires_grad
        assert weight.isfinite().all()
        assert torch.equal(weight, again.weights[key])
    assert first.facts == again.facts
    assert any(not torch.equal(first.weights[key], weight) for key, weight in given.items())
    assert any(not torch.equal(first.weights[key], weight) for key, weight in other.weights.items())
    assert calls == [(1, 2), (2, 2)]
    assert all(len(curve) == 2 for curve in first.facts.curves.values())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_given_model_stays_as_it_is(name: str, fails: bool, model: DiffusionModel) -> None:
    networks = (model.vae, model.unet, model.text_encoder)
    before = [copied(network.parameters()) for network in networks]

    def progress(done: int, total: int) -> None:
        if fails:
            raise InterruptedError

    try:
        build(name, model).protect([concept()], seed=1, progress=progress)
    except InterruptedError:
        assert fails
    for network, weights in zip(networks, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), weights, strict=True))
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_protected_model_is_another_one(name: str, model: DiffusionModel, tmp_path: Path) -> None:
    result = build(name, model).protect([concept()], seed=1)
    before = copied(model.unet.parameters())
    protected = result.on(model)
    assert all(torch.equal(weight, result.weights[key]) for key, weight in protected.unet.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(model.unet.parameters(), before, strict=True))
    # What is kept for a model, by its name or by the object, is not taken for the other one.
    assert protected.digest not in (model.digest, build(name, model).protect([concept()], seed=2).on(model).digest)
    assert protected.digest == result.on(model).digest
    # It names the other networks too.
    assert protected.digest != result.on(small_model(tmp_path, seed=1)).digest
    drawn = [class_latents(each, "a photo of dog", 1) for each in (model, protected)]
    assert not torch.equal(*drawn)
    with pytest.raises(RuntimeError):
        replace(result, weights={}).on(model)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_config_or_model_raises(name: str, model: DiffusionModel, tmp_path: Path) -> None:
    method = model_protector_class(name)
    with pytest.raises(TypeError, match=method.config_type.__name__):
        method("fast", model)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="DiffusionModel, not object"):
        build(name, object())
    small_model(tmp_path)
    with pytest.raises(ModelError, match="float32"):
        build(name, load_model(str(tmp_path), dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concepts": []}, "no concepts"),
        ({"images": torch.zeros(2, 3, 16, 20)}, "16, 16"),
        ({"images": torch.zeros(0, 3, 16, 16)}, "16, 16"),
        ({"images": torch.zeros(3, 16, 16)}, "16, 16"),
        ({"images": torch.full((1, 3, 16, 16), 2.0)}, "float32 in"),
        ({"images": torch.full((1, 3, 16, 16), torch.nan)}, "float32 in"),
        ({"images": torch.zeros(1, 3, 16, 16, dtype=torch.float64)}, "float32 in"),
        ({"class_word": " "}, "class_word"),
        ({"positives": torch.zeros(2, 4, 8, 8)}, "positives"),
        ({"positives": torch.full((1, 4, 8, 8), torch.nan)}, "positives"),
        ({"seed": -1}, "64-bit"),
        ({"seed": 2**64}, "64-bit"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_input_raises(name: str, change: dict[str, Any], message: str, model: DiffusionModel) -> None:
    given: dict[str, Any] = {"images": torch.zeros(1, 3, 16, 16), "class_word": "dog"}
    given |= {key: value for key, value in change.items() if key in ("images", "class_word", "positives")}
    rest = {key: value for key, value in change.items() if key in ("seed", "checkpoint_every")}
    concepts = change.get("concepts", [Concept(**given)])
    with pytest.raises(ValueError, match=message):
        build(name, model).protect(concepts, **{"seed": 1, **rest})


@pytest.mark.parametrize("name", NAMES)
def test_config_and_presets(name: str) -> None:
    method = model_protector_class(name)
    assert {"paper", "fast", "strong"} <= set(method.presets)
    for config in method.presets.values():
        rebuilt = method.config_type.from_dict(json.loads(config.canonical_json()))
        assert type(config) is method.config_type
        assert rebuilt == config
    assert method.name == name
    assert method.version


@pytest.mark.parametrize("name", NAMES)
def test_docstring_is_complete(name: str) -> None:
    assert_complete(model_protector_class(name))


def test_unknown_names_are_told() -> None:
    with pytest.raises(UnknownProtector, match="apdm"):
        model_protector_class("mist")


def test_naive_ascends_on_the_subject_and_descends_on_its_class(model: DiffusionModel) -> None:
    """A negative control must do what it is a control of: one small step, seen on the very draws it was taken on."""
    samples: list[Sample] = []

    class Seen(Naive):
        def _loss(self, study: Study, sample: Sample) -> ProtectionLoss:
            samples.append(sample)
            return super()._loss(study, sample)

    config = Naive.presets["fast"].replace(steps=1, batch=16, rate=1e-4, class_images=2)
    result = Seen(config, model).protect([concept()], seed=1)
    (sample,) = samples
    # Images of the subject under its prompt, then as many of the class under theirs.
    prompts = ["a photo of a sks dog"] * 16 + ["a photo of a dog"] * 16
    assert torch.equal(sample.embeddings, model.embed_prompts(prompts))
    losses = []
    for of in (model, result.on(model)):
        with torch.no_grad():
            subject, prior = squared_error(of, sample.latents, sample.embeddings, sample.draws).chunk(2)
        losses.append(subject.mean() - prior.mean())
    assert losses[1] > losses[0]

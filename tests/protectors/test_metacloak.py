"""What is particular to MetaCloak: snapshots, the number of passes, the transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from protectors.base import Batch
from protectors.diffusion import DiffusionModel, load_model
from protectors.dreambooth import DreamBooth
from protectors.metacloak import MetaCloak, MetaCloakConfig, snapshot_ages
from protectors.objectives import Draws, denoising_loss
from protectors.surrogate import LoraSurrogates, Surrogates, make_surrogates, subject_seeds
from protectors.transforms import blur
from tests.protectors.tiny import save_tiny_model

SMALL = {
    "pgd_steps": 2,
    "training_steps": 5,
    "snapshots": 3,
    "passes": 2,
    "rounds": 2,
    "unroll_steps": 1,
    "step_levels": 1.0,
    "eval_draws": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture
def pictured(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images that the loss was taken of, in order."""
    seen: list[Tensor] = []

    def spy(model: DiffusionModel, images: Tensor, embeddings: Tensor, draws: Draws) -> Tensor:
        seen.append(images.detach().clone())
        return denoising_loss(model, images, embeddings, draws)

    monkeypatch.setattr("protectors.metacloak.denoising_loss", spy)
    return seen


def pictures(count: int) -> Tensor:
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (images * 127 + 64).round() / 255


def metacloak(model: DiffusionModel, **changes: Any) -> MetaCloak:
    return MetaCloak(MetaCloakConfig.from_dict({**SMALL, **changes}), model)


def test_presets(model: DiffusionModel) -> None:
    paper = MetaCloak.presets["paper"]
    assert (paper.eps_levels, paper.step_levels, paper.random_start) == (11, 1.1, False)
    assert (paper.passes, paper.snapshots, paper.rounds, paper.pgd_steps, paper.unroll_steps) == (4, 6, 100, 6, 2)
    assert MetaCloak(paper, model).steps == 14_400
    assert (paper.training_steps, paper.surrogate, paper.learning_rate) == (1000, "full", 5e-7)
    assert (paper.blur_size, paper.flip, paper.resize_low, paper.jpeg_low) == (7, True, 1.0, None)
    for config in MetaCloak.presets.values():
        short = {
            **SMALL,
            "snapshots": 1,
            "passes": 1,
            "rounds": 1,
            "pgd_steps": 1,
            "step_levels": 20.0,
            "prior_images": 0,
        }
        result = MetaCloak(config.replace(**short), model).protect(pictures(1), seeds=[1])
        assert result.facts[0].linf_levels == math.floor(config.eps_levels)


def test_ages_of_the_snapshots() -> None:
    assert snapshot_ages(1000, 6) == [0, 199, 399, 599, 799, 999]
    assert snapshot_ages(7, 7) == list(range(7))
    assert snapshot_ages(5, 1) == [0]


def test_number_of_passes_and_updates(
    model: DiffusionModel, pictured: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As stated: 2 passes, 3 snapshots, 2 rounds, 2 steps; four updates to the last snapshot, one between rounds."""
    updates: list[int] = []
    fit = Surrogates.fit

    def spy(self: Surrogates, loss: Callable[[int], Tensor], *, steps: int, **options: Any) -> None:
        updates.append(steps)
        fit(self, loss, steps=steps, **options)

    monkeypatch.setattr(Surrogates, "fit", spy)
    calls: list[tuple[int, int]] = []
    result = metacloak(model).protect(pictures(1), seeds=[1], progress=lambda *call: calls.append(call))
    assert len(pictured) == 2 * 3 * 2 * 2 == result.facts[0].steps
    assert calls == [(number + 1, 24) for number in range(24)]
    assert updates == [4] + [1] * 6


def test_snapshots_are_states_of_one_training_and_loaded_in_turn(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[Tensor, ...]] = []
    load = LoraSurrogates.load

    def spy(self: LoraSurrogates, state: tuple[Tensor, ...]) -> None:
        loaded.append(state)
        load(self, state)

    monkeypatch.setattr(LoraSurrogates, "load", spy)
    protector = metacloak(model)
    protector.protect(pictures(2), seeds=[1, 2], groups=["a", "a"])
    assert len(loaded) == 6
    batch = Batch(originals=pictures(2), seeds=(1, 2), groups=((0, 1),))
    for age, first, second in zip([0, 2, 4], loaded[:3], loaded[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with make_surrogates("lora", model, subject_seeds(batch), train_text_encoder=True) as surrogates:
            DreamBooth(surrogates, batch, protector.config).train(steps=age)
            for kept, own in zip(first, surrogates.state(), strict=True):
                assert torch.equal(kept, own)


def test_training_sees_the_clean_images_first_and_then_the_current_ones(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float | None] = []
    images = pictures(1)
    train = DreamBooth.train

    def spy(self: DreamBooth, current: Tensor | None = None, **options: Any) -> None:
        seen.append(None if current is None else float((current - images).abs().max() * 255))
        train(self, current, **options)

    monkeypatch.setattr(DreamBooth, "train", spy)
    metacloak(model, passes=1).protect(images, seeds=[1])
    # Two steps of one level per round, kept from one round and snapshot to the next, inside the ball of 8 levels.
    first, *changes = seen
    assert first is None
    assert changes[0] == pytest.approx(2, abs=1e-3)
    assert len(changes) == 3
    assert all(change is not None and 0.99 <= change <= 8.001 for change in changes)
    assert max(change or 0 for change in changes) > 2.5


def test_projection_stays_around_the_original(model: DiffusionModel) -> None:
    result = metacloak(model, step_levels=5.0, eps_levels=3.0).protect(pictures(1), seeds=[1])
    assert result.facts[0].linf_levels == 3


def test_flips_are_drawn_per_image_and_step(model: DiffusionModel, pictured: list[Tensor]) -> None:
    images = pictures(1).repeat(6, 1, 1, 1)
    metacloak(model, blur_size=0, step_levels=0.001).protect(images, seeds=range(6))
    flipped = torch.stack([(step.flip(-1) - images).abs().amax((1, 2, 3)) < 0.01 for step in pictured])
    plain = torch.stack([(step - images).abs().amax((1, 2, 3)) < 0.01 for step in pictured])
    assert (flipped ^ plain).all()
    assert (flipped.any(1) & plain.any(1)).any()
    assert (flipped.any(0) & plain.any(0)).all()


def test_blur_of_every_picture_is_drawn(model: DiffusionModel, pictured: list[Tensor]) -> None:
    images = pictures(1)
    metacloak(model, flip=False, step_levels=0.001).protect(images, seeds=[1])
    widest = (blur(images, 7, 2.0) - images).norm()
    sizes = torch.stack([(step - images).norm() for step in pictured]) / widest
    assert sizes.max() <= 1.001
    assert sizes.std() > 0.1


def test_extended_transforms_change_the_result(model: DiffusionModel) -> None:
    small = {"passes": 1, "snapshots": 1}
    plain = metacloak(model, **small).protect(pictures(1), seeds=[1]).images
    for change in ({"resize_low": 0.5}, {"jpeg_low": 50}):
        other = metacloak(model, **small, **change).protect(pictures(1), seeds=[1])
        assert other.facts[0].failed is None
        assert not torch.equal(other.images, plain)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pgd_steps": 0}, "pgd_steps"),
        ({"training_steps": 0}, "training_steps"),
        ({"snapshots": 0}, "snapshots"),
        ({"snapshots": 6}, "snapshots"),
        ({"passes": 0}, "passes"),
        ({"rounds": 0}, "rounds"),
        ({"unroll_steps": -1}, "unroll_steps"),
        ({"blur_size": 4}, "blur_size"),
        ({"resize_low": 0.0}, "resize_low"),
        ({"jpeg_low": 0}, "jpeg_low"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MetaCloakConfig.from_dict({**SMALL, **change})

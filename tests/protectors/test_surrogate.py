"""Surrogates: independent of each other, real clipping, and a model that is what it was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from protectors.diffusion import DiffusionModel, load_model
from protectors.objectives import draw, latent_denoising_loss
from protectors.randomness import normal, streams
from protectors.surrogate import FullSurrogate, LoraSurrogates, Surrogates, group_seed, make_surrogates
from tests.protectors.tiny import save_tiny_model

PROMPT = "a photo"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("tiny"))))


def lesson(model: DiffusionModel, seeds: list[int], surrogates: Surrogates) -> Callable[[int], Tensor]:
    """The denoising loss on one fixed latent per surrogate, with draws from the seed alone."""
    images = torch.zeros(len(seeds), 3, 32, 32)
    latents = normal(streams(seeds, "latents"), model.latent_shape(images))
    generators = streams(seeds, "lesson")

    def loss(step: int) -> Tensor:
        draws = draw(model, images, generators)
        return latent_denoising_loss(model, latents, surrogates.embed([PROMPT] * len(seeds)), draws)

    return loss


def trained(model: DiffusionModel, seeds: list[int], **options: Any) -> list[Tensor]:
    with LoraSurrogates(model, seeds, train_text_encoder=True) as surrogates, surrogates.owned(range(len(seeds))):
        surrogates.fit(lesson(model, seeds, surrogates), steps=3, rate=1e-2, **options)
        return list(surrogates.state())


def predict(model: DiffusionModel, rows: int = 2) -> Tensor:
    noisy = torch.linspace(-1, 1, 4 * 16 * 16).view(1, 4, 16, 16).expand(rows, -1, -1, -1)
    t = torch.full((rows,), 500)
    with torch.no_grad():
        return model.predict(noisy, t, model.embed_prompts([PROMPT] * rows))


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_every_surrogate_trains_as_if_it_were_alone(model: DiffusionModel, clip: float | None) -> None:
    together = trained(model, [1, 2], clip=clip)
    for place, seed in enumerate([1, 2]):
        for both, single in zip(together, trained(model, [seed], clip=clip), strict=True):
            torch.testing.assert_close(both[place], single[0], rtol=1e-3, atol=1e-4)


def test_untrained_surrogates_are_the_model(model: DiffusionModel) -> None:
    before = predict(model)
    with LoraSurrogates(model, [1, 2]) as surrogates, surrogates.owned([1, 0]):
        assert torch.equal(predict(model), before)


def train_and_stop(model: DiffusionModel, kind: Any) -> None:
    before = predict(model, 1)
    with make_surrogates(kind, model, [1], train_text_encoder=True) as surrogates, surrogates.owned([0]):
        untrained = lesson(model, [1], surrogates)(0).item()
        first = surrogates.state()
        surrogates.fit(lesson(model, [1], surrogates), steps=20, rate=1e-2)
        assert lesson(model, [1], surrogates)(0).item() < untrained
        assert not torch.equal(predict(model, 1), before)
        surrogates.load(first)
        assert torch.equal(predict(model, 1), before)
        surrogates.fit(lesson(model, [1], surrogates), steps=1, rate=1e-2)
        raise RuntimeError("stopped")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_learns_and_the_model_comes_back(model: DiffusionModel, kind: Any) -> None:
    before = predict(model, 1)
    with pytest.raises(RuntimeError, match="stopped"):
        train_and_stop(model, kind)
    assert torch.equal(predict(model, 1), before)
    for network in (model.unet, model.vae, model.text_encoder):
        for parameter in network.parameters():
            assert parameter.grad is None
            assert not parameter.requires_grad


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_clipping_limits_the_norm_that_the_optimizer_sees(
    model: DiffusionModel, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def step(optimizer: torch.optim.AdamW) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        seen.append(float(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with make_surrogates(kind, model, [1]) as surrogates, surrogates.owned([0]):
        for clip in (None, 1e-3):
            surrogates.fit(lesson(model, [1], surrogates), steps=1, rate=1e-2, clip=clip)
    assert seen[0] > 2e-3
    assert seen[1] == pytest.approx(1e-3, rel=1e-3)


def test_misuse_is_refused(model: DiffusionModel) -> None:
    with LoraSurrogates(model, [1]), pytest.raises(RuntimeError, match="owned"):
        predict(model, 1)
    with pytest.raises(ValueError, match="one subject at a time"):
        make_surrogates("full", model, [1, 2])
    with FullSurrogate(model) as surrogate, pytest.raises(ValueError, match="one subject"), surrogate.owned([0, 1]):
        pass


def test_a_groups_seed_knows_no_order() -> None:
    assert group_seed([3, 1]) == group_seed([1, 3]) != group_seed([1, 2])

"""IMMA: which weights move, which way, where the gradient is taken, and what goes on from update to update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protectors import dreambooth, objectives
from protectors.diffusion import DiffusionModel
from protectors.dpo import squared_error
from protectors.imma import IMMA, IMMAConfig
from protectors.learning_to_protect import ProtectionLoss, Sample
from protectors.model_base import ProtectedModel, Study
from tests.protectors.model_runs import (
    adamw_once,
    concept,
    copied,
    distance,
    small_model,
    squared_error64,
    unet64,
)

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 1e-3
SMALL = IMMAConfig(steps=2, rate=RATE, attacker_rates=(RATE,))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DiffusionModel]:
    root = tmp_path_factory.mktemp("models")
    return {kind: small_model(root / kind, prediction_type=kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture
def model(models: dict[str, DiffusionModel]) -> DiffusionModel:
    return models["epsilon"]


class Watched(IMMA):
    """Remembers where and on what each gradient was taken, what came of it, and how many rows passed the UNet."""

    def __init__(self, config: IMMAConfig, model: DiffusionModel) -> None:
        super().__init__(config, model)
        self.visits: list[tuple[Sample, list[Tensor]]] = []
        self.starts: list[list[Tensor]] = []
        self.gradients: list[list[Tensor]] = []
        self.memories: list[dict[str, Tensor]] = []
        self.rows: list[int] = []

    def _accumulate(self, study: Study, step: int, gradient: tuple[Tensor, ...]) -> dict[str, float]:
        self.starts.append(copied(study.copy.parameters))
        handle = self.model.unet.register_forward_pre_hook(lambda _, inputs: self.rows.append(len(inputs[0])))
        values = super()._accumulate(study, step, gradient)
        handle.remove()
        self.gradients.append(copied(gradient))
        self.memories.append({name: value.clone() for name, value in study.memory.items()})
        return values

    def _loss(self, study: Study, sample: Sample) -> ProtectionLoss:
        self.visits.append((sample, copied(study.copy.parameters)))
        return super()._loss(study, sample)


def run(model: DiffusionModel, **changes: Any) -> tuple[Watched, ProtectedModel]:
    watched = Watched(SMALL.replace(**changes), model)
    return watched, watched.protect([concept()], seed=7)


def immunized(model: DiffusionModel) -> list[bool]:
    return [".attn2." in name for name, _ in model.unet.named_parameters()]


def chosen(tensors: list[Tensor], flags: list[bool], value: bool = True) -> list[Tensor]:
    return [tensor for tensor, flag in zip(tensors, flags, strict=True) if flag is value]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_gradient_is_up_the_loss_of_the_adapted_model(models: dict[str, DiffusionModel], kind: str) -> None:
    model = models[kind]
    watched, _ = run(model, batch=2)
    flags = immunized(model)
    for (sample, weights), gradient in zip(watched.visits, watched.gradients, strict=True):
        unet = unet64(model, weights)
        loss = squared_error64(model, unet, sample.latents, sample.embeddings, sample.draws).mean()
        exact = [-part for part in torch.autograd.grad(loss, list(unet.parameters()))]
        assert distance(chosen(gradient, flags), chosen(exact, flags)) < 1e-4
        assert not any(part.any() for part in chosen(gradient, flags, False))


def test_it_is_taken_one_step_of_the_adaptation_away_from_the_immunized_weights(model: DiffusionModel) -> None:
    watched, _ = run(model)
    for start, (_, weights) in zip(watched.starts, watched.visits, strict=True):
        # AdamW's first step is of the length of the rate wherever there is a gradient.
        change = max(float((a - b).abs().max()) for a, b in zip(weights, start, strict=True))
        assert 0.3 * RATE < change < 1.2 * RATE
    # The adaptation of the second update begins at the immunized weights, not where the first one ended.
    moved = adamw_once(watched.starts[0], watched.gradients[0], RATE)
    flags = immunized(model)
    changes = [[a - b for a, b in zip(ends, watched.starts[0], strict=True)] for ends in (watched.starts[1], moved)]
    assert distance(*(chosen(change, flags) for change in changes)) < 1e-3


def test_only_cross_attention_moves_unless_all_may(model: DiffusionModel) -> None:
    given = copied(model.unet.parameters())
    for scope, expected in (("cross_attention", immunized(model)), ("all", [True] * len(given))):
        _, result = run(model, immunized=scope)
        pairs = zip(result.weights.values(), given, strict=True)
        assert [not torch.equal(weight, before) for weight, before in pairs] == expected
    assert 0 < sum(immunized(model)) < len(given)


def test_an_update_makes_the_subject_harder_to_denoise(model: DiffusionModel) -> None:
    watched, result = run(model, steps=1, batch=8, rate=1e-5, attacker_rates=(0.0,))
    ((sample, _),) = watched.visits
    before, after = (
        squared_error(of, sample.latents, sample.embeddings, sample.draws).mean() for of in (model, result.on(model))
    )
    assert after > before
    assert result.facts.curves["adaptation"][0] == pytest.approx(before.item(), rel=1e-5)


def test_an_update_costs_one_pass_for_each_level(model: DiffusionModel) -> None:
    watched, result = run(model, batch=2)
    assert watched.rows == [2, 2] * SMALL.steps
    assert set(result.facts.curves) == {"personalization", "adaptation"}
    assert run(model, batch=2, one_pass=True, attackers=("lora",))[0].rows == watched.rows
    kept, result = run(model, batch=2, preservation_weight=1.0, prior_weight=1.0)
    assert kept.rows == [2, 2, 4] * SMALL.steps
    assert set(result.facts.curves) == {"personalization", "adaptation", "prior"}


def test_preservation_adds_the_gradient_of_the_class(model: DiffusionModel) -> None:
    plain, kept = (run(model, steps=1, preservation_weight=weight)[0] for weight in (0.0, 0.5))
    sample, weights = kept.visits[0]
    assert torch.equal(sample.latents[:1], plain.visits[0][0].latents)
    unet = unet64(model, weights)
    prior = squared_error64(model, unet, sample.latents, sample.embeddings, sample.draws)[1:].mean()
    exact = torch.autograd.grad(0.5 * prior, list(unet.parameters()))
    added = [a - b for a, b in zip(kept.gradients[0], plain.gradients[0], strict=True)]
    flags = immunized(model)
    assert distance(chosen(added, flags), chosen(list(exact), flags)) < 1e-3


def test_low_rank_deltas_go_on_from_update_to_update(model: DiffusionModel) -> None:
    watched, _ = run(model, steps=3, attackers=("lora",), attacker_rates=(1e-2,))
    # B begins at zero and moves by about the rate in each step.
    lengths = [float(memory["0/0/delta/1"].abs().max()) for memory in watched.memories]
    assert lengths == pytest.approx([0.01, 0.02, 0.03], rel=0.25)
    for start, (_, weights) in zip(watched.starts, watched.visits, strict=True):
        assert all(torch.equal(*pair) for pair in zip(start, weights, strict=True))


def test_a_resumed_run_gives_the_weights_of_an_undisturbed_one(model: DiffusionModel, tmp_path: Path) -> None:
    config = SMALL.replace(steps=4, attackers=("lora", "cross_attention"), attacker_rates=(1e-2, 1e-3))
    straight = IMMA(config, model).protect([concept()], seed=3)

    def progress(done: int, total: int) -> None:
        if done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        IMMA(config, model).protect([concept()], seed=3, progress=progress, checkpoint=tmp_path, checkpoint_every=1)
    watched = Watched(config, model)
    resumed = watched.protect([concept()], seed=3, checkpoint=tmp_path)
    assert len(watched.visits) == 1
    assert all(torch.equal(weight, straight.weights[name]) for name, weight in resumed.weights.items())
    assert resumed.facts == straight.facts


def test_the_levels_take_draws_of_their_own(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    noises: list[Tensor] = []
    real = objectives.latent_denoising_loss

    def seen(*arguments: Any) -> Tensor:
        noises.append(arguments[3].noise)
        return real(*arguments)

    monkeypatch.setattr(dreambooth, "latent_denoising_loss", seen)
    watched, _ = run(model)
    for lower, (sample, _) in zip(noises, watched.visits, strict=True):
        assert not torch.equal(lower, sample.draws.noise)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="inner_steps"):
        SMALL.replace(inner_steps=0)
    with pytest.raises(ValueError, match="immunized"):
        SMALL.replace(immunized="keys")

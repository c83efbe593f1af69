"""APDM's updates: what is summed, at which weights, and that nothing of the attacker's gradient is in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from protectors import dreambooth
from protectors.apdm import APDMConfig
from protectors.diffusion import DiffusionModel
from protectors.dpo import squared_error
from protectors.model_base import ProtectedModel
from tests.protectors.model_runs import (
    RATE,
    SMALL,
    Watched,
    adamw_once,
    concept,
    copied,
    distance,
    protection64,
    small_model,
    squared_error64,
    unet64,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DiffusionModel]:
    root = tmp_path_factory.mktemp("models")
    return {kind: small_model(root / kind, prediction_type=kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture
def model(models: dict[str, DiffusionModel]) -> DiffusionModel:
    return models["epsilon"]


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the attacker's losses were taken on, subject and class in turn, and the weights at that moment."""
    seen: list[tuple[Any, ...]] = []
    real = dreambooth.latent_denoising_loss

    def watched(model: DiffusionModel, latents: Tensor, embeddings: Tensor, draws: Any) -> Tensor:
        seen.append((latents, embeddings, draws, copied(model.unet.parameters())))
        return real(model, latents, embeddings, draws)

    monkeypatch.setattr(dreambooth, "latent_denoising_loss", watched)
    return seen


def run(model: DiffusionModel, **changes: Any) -> tuple[Watched, ProtectedModel]:
    protector = Watched(SMALL.replace(**changes), model)
    return protector, protector.protect([concept()], seed=7)


def sum64(model: DiffusionModel, visits: list[Any], config: APDMConfig) -> list[Tensor]:
    """The protection gradients at the recorded weights and samples, in float64."""
    parts = []
    for sample, weights in visits:
        unet = unet64(model, weights)
        parts.append(torch.autograd.grad(protection64(model, unet, sample, config), list(unet.parameters())))
    return [torch.stack(part).sum(0) for part in zip(*parts, strict=True)]


def personal64(model: DiffusionModel, lessons: list[tuple[Any, ...]]) -> list[Tensor]:
    """Sum of grad L_per at the weights before each of the attacker's steps."""
    parts = []
    for latents, embeddings, draws, weights in lessons:
        unet = unet64(model, weights)
        loss = squared_error64(model, unet, latents, embeddings, draws).mean()
        parts.append(torch.autograd.grad(loss, list(unet.parameters())))
    return [torch.stack(part).sum(0) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize(("kind", "point"), [("epsilon", "after"), ("v_prediction", "after"), ("epsilon", "before")])
def test_the_sum_is_that_of_the_protection_gradients(models: dict[str, DiffusionModel], kind: str, point: str) -> None:
    changes = {"inner_steps": 2, "batch": 2, "beta": 2.0, "preservation_weight": 0.5}
    watched, _ = run(models[kind], gradient_point=point, **changes)
    config = watched.config
    for step in range(config.steps):
        visits = watched.visits[step * config.inner_steps : (step + 1) * config.inner_steps]
        assert distance(watched.gradients[step], sum64(models[kind], visits, config)) < 1e-4


def test_the_attacker_takes_adamw_steps_on_his_own_loss_from_the_protected_weights(
    model: DiffusionModel, lessons: list[tuple[Any, ...]]
) -> None:
    watched, result = run(model)
    for step, start in enumerate(watched.starts):
        first = lessons[step * 2 * SMALL.inner_steps :][:2]
        assert all(torch.equal(a, b) for a, b in zip(first[0][3], start, strict=True))
        moved = adamw_once(start, personal64(model, first), RATE)
        after = watched.visits[step * SMALL.inner_steps][1]
        changes = [[a - b for a, b in zip(ends, start, strict=True)] for ends in (after, moved)]
        # A gradient near AdamW's epsilon of 1e-8 is not the same in float32.
        assert distance(*changes) < 1e-2
    assert not torch.equal(watched.starts[0][0], watched.starts[1][0])
    assert result.facts.curves["personalization"][0] > 0


def test_each_attack_starts_at_the_protected_weights_which_moved_once(model: DiffusionModel) -> None:
    watched, _ = run(model)
    first, second = watched.starts
    assert all(torch.equal(a, b) for a, b in zip(first, model.unet.parameters(), strict=True))
    moved = adamw_once(first, watched.gradients[0], RATE)
    changes = [[a - b for a, b in zip(ends, first, strict=True)] for ends in (second, moved)]
    assert distance(*changes) < 1e-3


def test_the_leak_adds_exactly_the_attackers_gradients(model: DiffusionModel, lessons: list[tuple[Any, ...]]) -> None:
    plain, _ = run(model, steps=1)
    expected = personal64(model, lessons)
    leaking, _ = run(model, steps=1, compat_grad_leak=True)
    leaked = [a - b for a, b in zip(leaking.gradients[0], plain.gradients[0], strict=True)]
    assert distance(leaked, expected) < 1e-3
    assert distance(leaking.gradients[0], plain.gradients[0]) > 0.1


def test_before_and_after_differ_by_the_step_alone(model: DiffusionModel) -> None:
    before, after = (run(model, steps=1, gradient_point=point)[0] for point in ("before", "after"))
    assert all(torch.equal(a, b) for a, b in zip(before.visits[0][1], before.starts[0], strict=True))
    for (early, now), (late, then) in zip(before.visits[1:], after.visits[:-1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))
        assert not torch.equal(early.draws.noise, late.draws.noise)


def test_an_attacker_who_stands_still_leaves_one_adamw_step(model: DiffusionModel) -> None:
    watched, result = run(model, steps=1, inner_steps=2, attacker_rates=(0.0,))
    start = watched.starts[0]
    assert all(torch.equal(a, b) for _, weights in watched.visits for a, b in zip(weights, start, strict=True))
    exact = adamw_once(start, sum64(model, watched.visits, watched.config), RATE)
    changes = [[a - b for a, b in zip(ends, start, strict=True)] for ends in (list(result.weights.values()), exact)]
    assert distance(*changes) < 1e-2


def test_without_attack_the_gradient_is_taken_at_the_protected_weights(model: DiffusionModel) -> None:
    watched, result = run(model, inner_steps=0)
    assert len(watched.visits) == SMALL.steps
    for (_, weights), start in zip(watched.visits, watched.starts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, start, strict=True))
    assert "personalization" not in result.facts.curves


@pytest.mark.parametrize(("attacker", "rate"), [("cross_attention", 1e-2), ("lora", 1e-1)])
def test_other_attackers_train_their_own_and_all_weights_are_protected(
    model: DiffusionModel, attacker: str, rate: float
) -> None:
    watched, _ = run(model, steps=1, attackers=(attacker,), attacker_rates=(rate,))
    names = [name for name, _ in model.unet.named_parameters()]
    pairs = zip(names, watched.visits[-1][1], watched.starts[0], strict=True)
    trained = {name for name, now, before in pairs if not torch.equal(now, before)}
    expected = {name for name in names if "attn2.to_k." in name or "attn2.to_v." in name}
    assert trained == (expected if attacker == "cross_attention" else set())
    assert all(part.abs().sum() > 0 for part in watched.gradients[0])
    # As if the attacker were not there: what he did must be in the gradients.
    exact = sum64(model, watched.visits, watched.config)
    far = distance(watched.gradients[0], exact)
    assert far < 1e-4 if attacker == "cross_attention" else far > 1e-3
    assert not model.unet.conv_in._forward_hooks


def test_reference_and_given_model_never_change(model: DiffusionModel) -> None:
    networks = (model.vae, model.unet, model.text_encoder)
    before = [copied(network.parameters()) for network in networks]
    watched, result = run(model)
    for reference in watched.references:
        assert all(torch.equal(a, b) for a, b in zip(reference, before[1], strict=True))
    for network, weights in zip(networks, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), weights, strict=True))
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(result.weights.values(), before[1], strict=True))


def test_pairs_share_timestep_and_noise_and_class_images_do_not(model: DiffusionModel) -> None:
    watched, _ = run(model, steps=1, inner_steps=6, batch=2)
    for sample, _ in watched.visits:
        positive, negative, general = (sample.rows(part, part + 1) for part in range(3))
        assert torch.equal(positive.draws.t, negative.draws.t)
        assert torch.equal(positive.draws.noise, negative.draws.noise)
        assert torch.equal(positive.embeddings, negative.embeddings)
        assert not torch.equal(positive.embeddings, general.embeddings)
        assert not torch.equal(positive.draws.noise, general.draws.noise)
    assert len({tuple(sample.draws.t.tolist()) for sample, _ in watched.visits}) == 6


def test_one_inner_step_costs_five_samples_and_two_of_the_reference(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    in_loop: list[str] = []

    class Counted(Watched):
        def _accumulate(self, study: Any, step: int, gradient: Any) -> dict[str, float]:
            monkeypatch.setattr(model, "encode_moments", lambda images: in_loop.append("vae"))
            monkeypatch.setattr(model, "encode_prompts", lambda prompts: in_loop.append("text"))
            handles = [
                unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
                for unet in (model.unet, study.reference.unet)
            ]
            values = super()._accumulate(study, step, gradient)
            for handle in handles:
                handle.remove()
            return values

    Counted(SMALL.replace(steps=1), model).protect([concept()], seed=1)
    assert in_loop == []
    assert sum(rows) == 7 * SMALL.inner_steps
    assert rows.count(3) == rows.count(2) == SMALL.inner_steps


def test_a_step_prefers_the_positive(model: DiffusionModel) -> None:
    """From theta = phi, a small step against the gradient lowers the mean margin on the very same draws."""
    watched, result = run(model, steps=1, rate=1e-5, inner_steps=0, preservation_weight=0.0)
    ((sample, _),) = watched.visits

    def errors(of: DiffusionModel) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return squared_error(of, sample.latents, sample.embeddings, sample.draws).chunk(3)

    before, after = errors(model), errors(result.on(model))
    assert (after[0] - before[0]).mean() < (after[1] - before[1]).mean()


def test_at_the_given_weights_the_loss_is_log_two(model: DiffusionModel) -> None:
    _, result = run(model, steps=1, inner_steps=0)
    assert result.facts.curves["dpo"][0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert result.facts.curves["margin"][0] == pytest.approx(0, abs=1e-6)


def test_bf16_and_checkpointing_change_memory_and_little_else(model: DiffusionModel) -> None:
    plain, _ = run(model, steps=1, inner_steps=1)
    kept, _ = run(model, steps=1, inner_steps=1, gradient_checkpointing=True)
    assert distance(kept.gradients[0], plain.gradients[0]) < 1e-5
    assert not model.unet.is_gradient_checkpointing
    half, result = run(model, steps=1, inner_steps=1, bf16=True)
    assert 0 < distance(half.gradients[0], plain.gradients[0]) < 0.1
    assert all(part.dtype == torch.float32 for part in half.gradients[0])
    assert all(weight.dtype == torch.float32 for weight in result.weights.values())

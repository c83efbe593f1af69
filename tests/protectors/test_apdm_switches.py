"""APDM's open parameters and the released code's ways: each does what its field says, and nothing at its default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protectors import dreambooth, objectives
from protectors.apdm import APDM, APDMConfig
from protectors.concepts import attacker_words
from protectors.constraints import to_8bit
from protectors.diffusion import DiffusionModel
from protectors.model_base import Study
from protectors.naive import Naive
from protectors.objectives import Draws
from protectors.protected_weights import ProtectedWeights
from protectors.randomness import normal, streams
from protectors.surrogate import FullSurrogate, LoraSurrogates, Surrogates
from tests.protectors.model_runs import SMALL, Watched, concept, copied, distance, small_model

pytestmark = pytest.mark.usefixtures("one_thread")

Lesson = tuple[Tensor, Draws]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return small_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch) -> list[Lesson]:
    """What each pass of the attacker's was taken on."""
    seen: list[Lesson] = []
    real = objectives.latent_denoising_loss

    def watched(model: DiffusionModel, latents: Tensor, embeddings: Tensor, draws: Draws) -> Tensor:
        seen.append((latents, draws))
        return real(model, latents, embeddings, draws)

    monkeypatch.setattr(dreambooth, "latent_denoising_loss", watched)
    return seen


def run(model: DiffusionModel, **changes: Any) -> Watched:
    protector = Watched(SMALL.replace(**{"steps": 1, **changes}), model)
    protector.protect([concept()], seed=7)
    return protector


def test_at_their_default_they_are_not_part_of_what_names_a_run() -> None:
    late = ("outer_clip", "vae_sample", "compat_prompts", "accumulation", "inner_state_reset", "t_sharing", "one_pass")
    assert not set(late) & set(APDMConfig().to_dict())
    assert APDMConfig().replace(t_sharing="code").to_dict()["t_sharing"] == "code"


def test_the_extension_is_fast_with_other_words_and_attackers_alone() -> None:
    plain, extended = (APDM.presets[name].to_dict() for name in ("fast", "extended"))
    changed = {name for name in plain.keys() | extended.keys() if plain.get(name) != extended.get(name)}
    assert changed == {"identifiers", "templates", "attackers", "attacker_rates"}
    # Class images are drawn under the first template.
    assert extended["templates"][0] == plain["templates"][0]


@pytest.mark.parametrize("sharing", ["independent", "code"])
def test_subject_and_class_share_their_timestep_and_never_their_noise(
    model: DiffusionModel, lessons: list[Lesson], sharing: str
) -> None:
    run(model, t_sharing=sharing, batch=2, inner_steps=5)
    pairs = list(zip(lessons[::2], lessons[1::2], strict=True))
    assert len(pairs) == 5
    same = [torch.equal(subject.t, general.t) for (_, subject), (_, general) in pairs]
    assert same == [sharing == "code"] * 5
    assert not any(torch.equal(subject.noise, general.noise) for (_, subject), (_, general) in pairs)


@pytest.mark.parametrize("attacker", ["full", "lora"])
def test_one_pass_gives_the_same_up_to_rounding(model: DiffusionModel, lessons: list[Lesson], attacker: str) -> None:
    options = {"attackers": (attacker,), "batch": 2, "gradient_checkpointing": True}
    two, one = (run(model, one_pass=flag, **options) for flag in (False, True))
    # Passes: of two samples each, then of four.
    assert [len(latents) for latents, _ in lessons] == [2] * 6 + [4] * 3
    torch.testing.assert_close(lessons[6][0], torch.cat([lessons[0][0], lessons[1][0]]))
    assert 0 < distance(one.gradients[0], two.gradients[0]) < 1e-3


def test_class_images_without_weight_cost_no_pass_and_change_no_draw(
    model: DiffusionModel, lessons: list[Lesson]
) -> None:
    run(model, inner_steps=3)
    weighed = lessons[::2]
    del lessons[:]
    run(model, inner_steps=3, prior_weight=0.0)
    assert len(lessons) == 3
    for (latents, draws), (others, theirs) in zip(lessons, weighed, strict=True):
        assert torch.equal(latents, others)
        assert torch.equal(draws.noise, theirs.noise)


@pytest.mark.parametrize("point", ["after", "before"])
def test_the_mean_is_the_sum_over_the_number_of_gradients(model: DiffusionModel, point: str) -> None:
    total, mean = (run(model, accumulation=kind, gradient_point=point) for kind in ("sum", "mean"))
    for part, share in zip(total.gradients[0], mean.gradients[0], strict=True):
        torch.testing.assert_close(share, part / SMALL.inner_steps)


def test_without_attack_the_mean_is_the_one_gradient(model: DiffusionModel) -> None:
    total, mean = (run(model, accumulation=kind, inner_steps=0) for kind in ("sum", "mean"))
    assert all(torch.equal(*pair) for pair in zip(total.gradients[0], mean.gradients[0], strict=True))


def surrogate(kind: str, model: DiffusionModel) -> Surrogates:
    return FullSurrogate(model) if kind == "full" else LoraSurrogates(model, [1])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_in_two_parts_with_carried_moments_is_training_in_one(model: DiffusionModel, kind: str) -> None:
    """A loss that depends on the step, so that the moments matter."""
    shape = (4, 8, 8)
    noise = normal(streams(range(5), "test"), shape)
    words = model.embed_prompts(["a dog"])

    def train(parts: Sequence[int], moments: dict[str, Tensor] | None) -> list[Tensor]:
        with surrogate(kind, model) as trained, trained.owned([0]):
            first = 0
            for steps in parts:

                def loss(step: int, first: int = first) -> Tensor:
                    latents = noise[[first + step]]
                    return (model.predict(latents, torch.tensor([500]), words) - latents).square().mean().view(1)

                trained.fit(loss, steps=steps, rate=1e-2, moments=moments)
                first += steps
            return copied(trained.parameters)

    whole, carried, fresh = train([5], None), train([3, 2], {}), train([3, 2], None)
    assert all(torch.equal(*pair) for pair in zip(whole, carried, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(whole, fresh, strict=True))


class Attacks(APDM):
    """Remembers the low-rank deltas and the step count of AdamW with which each attack begins and ends."""

    def __init__(self, config: APDMConfig, model: DiffusionModel) -> None:
        super().__init__(config, model)
        self.seen: list[dict[str, Tensor]] = []

    def _accumulate(self, study: Study, step: int, gradient: tuple[Tensor, ...]) -> dict[str, float]:
        values = super()._accumulate(study, step, gradient)
        self.seen.append({name: value.clone() for name, value in study.memory.items()})
        return values


def test_each_attacker_of_each_concept_goes_on_with_what_is_his_own(model: DiffusionModel, tmp_path: Path) -> None:
    config = SMALL.replace(
        steps=4,
        inner_steps=1,
        attackers=("full", "lora"),
        attacker_rates=(1e-3, 1e-2),
        inner_state_reset="carried",
    )
    concepts = [concept(), concept(2, seed=5, class_word="cat")]
    attacks = Attacks(config, model)
    straight = attacks.protect(concepts, seed=3)
    counts = [{name: int(value) for name, value in seen.items() if name.endswith("step/0")} for seen in attacks.seen]
    assert counts[0] == {"0/0/step/0": 1}
    assert counts[-1] == {f"{place}/{number}/step/0": 2 for place in (0, 1) for number in (0, 1)}
    # The same A, tuned further: a new one would be of the size of the first.
    before, after = (attacks.seen[turn]["0/1/delta/0"] for turn in (2, 6))
    assert 0 < (after - before).norm() < 0.2 * before.norm()

    class Stopped(Exception):
        pass

    def progress(done: int, total: int) -> None:
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        APDM(config, model).protect(concepts, seed=3, progress=progress, checkpoint=tmp_path, checkpoint_every=5)
    resumed = APDM(config, model).protect(concepts, seed=3, checkpoint=tmp_path)
    assert all(torch.equal(weight, straight.weights[name]) for name, weight in resumed.weights.items())


def test_the_gradient_of_an_update_is_clipped_as_a_whole() -> None:
    start = {"a": torch.zeros(3), "b": torch.zeros(4)}
    for length, expected in ((10.0, 2.0), (1.0, 1.0)):
        memory: dict[str, Tensor] = {}
        weights = ProtectedWeights(start, rate=lambda _: 1e-3, clip=2.0, memory=memory)
        gradient = torch.arange(1.0, 8.0)
        gradient *= length / gradient.norm()
        parts = (gradient[:3].clone(), gradient[3:].clone())
        weights.update(parts, {"loss": 1.0})
        assert torch.cat(parts).norm() == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(torch.cat(parts), gradient * expected / length)


def test_a_run_clips_at_its_own_field(model: DiffusionModel) -> None:
    # Far below AdamW's epsilon nothing moves but by decay, of 1 % of the rate.
    result = APDM(SMALL.replace(steps=1, outer_clip=1e-20), model).protect([concept()], seed=1)
    given = dict(model.unet.named_parameters())
    for name, weight in result.weights.items():
        torch.testing.assert_close(weight, given[name] * (1 - 0.01 * SMALL.rate), rtol=1e-6, atol=1e-9)


def test_the_rate_falls_in_a_line_over_the_last_updates(model: DiffusionModel) -> None:
    # Again by decay alone: at the full rate, three times, and at half of it.
    result = APDM(SMALL.replace(steps=4, rate=1.0, rate_decay=0.5, outer_clip=1e-20), model).protect(
        [concept()], seed=1
    )
    given = dict(model.unet.named_parameters())
    for name, weight in result.weights.items():
        torch.testing.assert_close(weight, given[name] * 0.99**3 * 0.995, rtol=1e-5, atol=1e-7)


def test_the_mode_has_no_noise_of_the_posterior(model: DiffusionModel, lessons: list[Lesson]) -> None:
    watched = run(model, vae_sample="mode", inner_steps=4)
    with torch.no_grad():
        # As a concept has them: rounded to 8 bit.
        means = model.mean_latents(to_8bit(concept().images))
    negatives = [sample.latents[[1]] for sample, _ in watched.visits]
    subjects = [latents for latents, _ in lessons[::2]]
    for latents in negatives + subjects:
        assert any(torch.equal(latents[0], mean) for mean in means)
    sampled = run(model, inner_steps=4)
    assert not any(torch.equal(sample.latents[1], mean) for sample, _ in sampled.visits for mean in means)


def test_compat_prompts_have_quotes_and_underscores(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = attacker_words("toy cat", ("sks",), ("a photo of {}",), compat=True)
    assert (words.instance, words.general) == ('"a_photo_of_sks_toy_cat"', '"a_photo_of_toy_cat"')
    seen: list[str] = []
    real = model.embed_prompts
    monkeypatch.setattr(model, "embed_prompts", lambda prompts: seen.extend(prompts) or real(prompts))
    run(model, compat_prompts=True)
    assert set(seen) - {""} == {'"a_photo_of_sks_dog"', '"a_photo_of_dog"'}


@pytest.mark.parametrize("attacker", ["lora", "cross_attention"])
def test_naive_can_stand_on_the_path_of_every_attacker(model: DiffusionModel, attacker: str) -> None:
    config = Naive.presets["fast"].replace(
        steps=1, inner_steps=2, batch=2, class_images=2, attackers=(attacker,), attacker_rates=(1e-2,)
    )
    result = Naive(config, model).protect([concept()], seed=1)
    given = dict(model.unet.named_parameters())
    assert all(not torch.equal(weight, given[name]) for name, weight in result.weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outer_clip": 0.0}, "outer_clip"),
        ({"vae_sample": "mean"}, "vae_sample"),
        ({"accumulation": "max"}, "accumulation"),
        ({"t_sharing": "shared"}, "t_sharing"),
        ({"inner_state_reset": "carried", "inner_steps": 0}, "inner_state_reset"),
    ],
)
def test_what_cannot_work_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APDMConfig.from_dict({**SMALL.to_dict(), **change})

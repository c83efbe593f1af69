"""FSMG and ASPL, and the DreamBooth training that all methods on surrogates share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor

from protectors.aspl import ASPL, ASPLConfig
from protectors.base import Batch
from protectors.diffusion import DiffusionModel, load_model
from protectors.dreambooth import (
    ClassLatents,
    DreamBooth,
    class_latents,
    class_prompts,
    draw_class_latents,
    instance_prompts,
)
from protectors.fsmg import FSMG, FSMGConfig
from protectors.metacloak import MetaCloak, MetaCloakConfig
from protectors.model_files import ModelError
from protectors.objectives import Draws, denoising_loss, draw
from protectors.pgd import pgd
from protectors.randomness import streams
from protectors.simac import SimAC, SimACConfig
from protectors.subject import SubjectProtector
from protectors.surrogate import Surrogates, make_surrogates, subject_seeds
from tests.protectors.tiny import save_tiny_model

SMALL = {"pgd_steps": 2, "rounds": 2, "clean_steps": 1, "perturbed_steps": 1, "step_levels": 4.0, "eval_draws": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("tiny"))))


def pictures(count: int) -> Tensor:
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (images * 127 + 64).round() / 255


def batch_of(groups: tuple[tuple[int, ...], ...], prompts: tuple[str, ...] | None = None) -> Batch:
    count = sum(map(len, groups))
    return Batch(originals=pictures(count), seeds=tuple(range(count)), prompts=prompts, groups=groups)


def school_of(
    model: DiffusionModel,
    surrogates: Surrogates,
    batch: Batch,
    class_latents: ClassLatents | None = None,
    **changes: Any,
) -> DreamBooth:
    return DreamBooth(surrogates, batch, ASPLConfig(**changes), class_latents)


def test_paper_presets_convert_the_published_numbers() -> None:
    fsmg, aspl = FSMG.presets["paper"], ASPL.presets["paper"]
    for config in (fsmg, aspl):
        assert (config.eps_levels, config.step_levels) == pytest.approx((0.05 * 127.5, 0.005 * 127.5))
        assert (config.surrogate, config.learning_rate, config.clip_norm) == ("full", 5e-7, 1.0)
        assert (config.prior_images, config.prior_weight, config.random_start) == (200, 1.0, False)
        assert config.train_text_encoder
    assert (fsmg.steps, fsmg.training_steps, fsmg.train_batch) == (100, 1000, 2)
    assert (aspl.rounds, aspl.pgd_steps, aspl.clean_steps, aspl.perturbed_steps) == (50, 6, 3, 3)


@pytest.mark.parametrize("preset", ["paper", "fast", "strong"])
@pytest.mark.parametrize("method", [FSMG, ASPL])
def test_presets_keep_whole_levels(method: type[FSMG | ASPL], preset: str, model: DiffusionModel) -> None:
    """The budget of every preset, with one long step."""
    short: dict[str, Any] = {"step_levels": 20.0, "prior_images": 0, "eval_draws": 1}
    short |= {"steps": 1, "training_steps": 1} if method is FSMG else {"pgd_steps": 1, "rounds": 1}
    config = method.presets[preset].replace(**short)
    result = method(config, model).protect(pictures(1), seeds=[1])  # type: ignore[arg-type]
    assert result.facts[0].linf_levels == math.floor(config.eps_levels)


def test_every_image_has_its_turn_however_short_the_blocks_are(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public loader begins each block at the first image again and never reaches the others."""
    seen: list[int] = []
    values = [0.1, 0.3, 0.5, 0.7, 0.9]
    images = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    batch = Batch(originals=images, seeds=(4, 3, 2, 1, 0), groups=((4, 3, 2, 1, 0),))
    with torch.no_grad():
        means = model.encode_moments(images)[0]
    latents = model.latents

    def spy(moments: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
        seen.append(int((means - moments[0]).abs().flatten(1).sum(1).argmin()))
        return latents(moments, noise)

    monkeypatch.setattr(model, "latents", spy)
    with make_surrogates("lora", model, subject_seeds(batch)) as surrogates:
        school = school_of(model, surrogates, batch, train_text_encoder=False)
        for _ in range(5):
            school.train(steps=2)
            school.train(images, steps=1)
    originals, perturbed = [row for place, row in enumerate(seen) if place % 3 < 2], seen[2::3]
    assert Counter(originals[:5]) == Counter(range(5)) == Counter(originals[5:]) == Counter(perturbed)
    assert originals[:5] != originals[5:]


def test_no_steps_encode_nothing_and_the_originals_are_encoded_once(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, seen = batch_of(((0,),)), []
    encode = model.encode_moments
    monkeypatch.setattr(model, "encode_moments", lambda images: seen.append(images) or encode(images))
    with make_surrogates("lora", model, subject_seeds(batch)) as surrogates:
        school = school_of(model, surrogates, batch)
        school.train(steps=0)
        school.train(batch.originals, steps=0)
        assert not seen
        school.train(steps=1)
        school.train(steps=1)
    assert len(seen) == 1


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_that_of_the_paper(prior: bool, prediction_type: str, tmp_path: Any) -> None:
    """Against an own computation in float64 from the same draws."""
    model = load_model(str(save_tiny_model(tmp_path / "model", prediction_type=prediction_type)))
    batch = batch_of(((0,), (1,)), prompts=("one", "two"))
    shape = model.latent_shape(batch.originals)
    class_latents = {word: torch.randn(1, *shape) for word in ("one", "two")} if prior else None
    with make_surrogates("lora", model, subject_seeds(batch), train_text_encoder=True) as surrogates:
        school = school_of(
            model, surrogates, batch, class_latents, train_batch=2, prior_weight=0.5, prior_images=int(prior)
        )
        with torch.no_grad(), surrogates.owned([0, 0, 1, 1]):
            loss = school.loss(model.encode_moments(batch.originals), school.original_decks)
    twin = streams(subject_seeds(batch), "dreambooth")
    torch.randperm(1, generator=twin[0]), torch.randperm(1, generator=twin[0])
    torch.randperm(1, generator=twin[1]), torch.randperm(1, generator=twin[1])
    rows = [twin[0], twin[0], twin[1], twin[1]]
    for network in (model.vae, model.unet, model.text_encoder):
        network.double()
    mean, logvar = (part[[0, 0, 1, 1]] for part in exact_moments(model, batch.originals))
    draws = draw(model, batch.originals, rows)
    expected = exact_loss(
        model, mean + (logvar / 2).exp() * draws.posterior, ["sks one", "sks one", "sks two", "sks two"], draws
    )
    if class_latents is not None:
        for generator in rows:
            torch.randperm(1, generator=generator)
        draws = draw(model, batch.originals, rows)
        words = ["one", "one", "two", "two"]
        drawn = torch.cat([class_latents[word] for word in words]).double()
        expected = expected + 0.5 * exact_loss(model, drawn, words, draws)
    torch.testing.assert_close(loss.double(), expected.view(2, 2).mean(1), rtol=1e-4, atol=0)


def exact_moments(model: DiffusionModel, images: Tensor) -> tuple[Tensor, Tensor]:
    posterior = model.vae.encode(images.double() * 2 - 1).latent_dist
    return posterior.mean.detach(), posterior.logvar.detach()


def exact_loss(model: DiffusionModel, latents: Tensor, prompts: list[str], draws: Draws) -> Tensor:
    """|| UNet(sqrt(abar) z + sqrt(1 - abar) n, t, c) - target ||^2 per element, in double precision."""
    abar = model.alphas_cumprod.double()[draws.t].view(-1, 1, 1, 1)
    noise = draws.noise.double()
    tokens = model.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        states = model.text_encoder(tokens).last_hidden_state
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        prediction = model.unet(noisy, draws.t, encoder_hidden_states=states).sample
    target = noise if model.prediction_type == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * latents
    return ((prediction - target) ** 2).mean((1, 2, 3))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_lowers_the_loss_of_its_subject(model: DiffusionModel, kind: Any) -> None:
    batch = batch_of(((0, 1),))
    with torch.no_grad():
        moments = model.encode_moments(batch.originals)

    def held_out() -> float:
        judge = school_of(model, surrogates, batch, train_batch=32)
        with torch.no_grad(), surrogates.owned([0] * 32):
            return judge.loss(moments, judge.original_decks).item()

    with make_surrogates(kind, model, [1], train_text_encoder=True) as surrogates:
        before = held_out()
        school_of(model, surrogates, batch, learning_rate=5e-3).train(steps=20)
        assert held_out() < 0.95 * before


def test_clipping_is_real(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the public code the gradient's norm is taken over an exhausted iterator, so that nothing is clipped."""
    limits: list[float | None] = []
    fit = Surrogates.fit

    def spy(self: Surrogates, loss: Callable[[int], Tensor], **options: Any) -> None:
        limits.append(options["clip"])
        fit(self, loss, **options)

    monkeypatch.setattr(Surrogates, "fit", spy)
    ASPL(ASPLConfig(**SMALL, clip_norm=0.25), model).protect(pictures(1), seeds=[1])
    assert limits == [0.25] * 3


def test_class_latents_are_drawn_once_and_by_the_untrained_model(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []

    def spy(*given: Any) -> Tensor:
        drawn.append(draw_class_latents(*given))
        return drawn[-1]

    monkeypatch.setattr("protectors.dreambooth.draw_class_latents", spy)
    monkeypatch.setattr("protectors.dreambooth._SAMPLING_STEPS", 2)
    monkeypatch.setattr("protectors.dreambooth._SAMPLED_TOGETHER", 1)
    monkeypatch.setattr(DiffusionModel, "base_size", 32)
    config = ASPLConfig(**{**SMALL, "pgd_steps": 1}, prior_images=2, learning_rate=0.1)
    first, again = (ASPL(config, model).protect(pictures(1), seeds=[1]) for _ in range(2))
    ASPL(config, model).protect(torch.rand(1, 3, 16, 24), seeds=[1])  # another size is taught with the same ones
    assert torch.equal(first.images, again.images)
    (latents,) = drawn
    assert latents.shape == (2, 4, 16, 16)  # those of the model's own size
    assert latents.isfinite().all()
    assert torch.equal(latents, draw_class_latents(model, "a photo of person", 2))
    class_latents(model, "a photo of dog", 1)
    assert len(drawn) == 2
    without = ASPL(config.replace(prior_images=0), model).protect(pictures(1), seeds=[1])
    assert not torch.equal(first.images, without.images)


def test_few_class_latents_are_kept(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def draw(model: DiffusionModel, prompt: str, count: int) -> Tensor:
        drawn.append(prompt)
        return torch.full((count, 4, 2, 2), float(len(drawn)))

    monkeypatch.setattr("protectors.dreambooth.draw_class_latents", draw)
    monkeypatch.setattr("protectors.dreambooth._KEPT", 2)
    monkeypatch.setattr("protectors.dreambooth._drawn", WeakKeyDictionary())
    for prompt in ("one", "two", "one", "three", "one"):
        class_latents(model, prompt, 1)
    assert drawn == ["one", "two", "three"]  # a third prompt drives out the one that was not asked for the longest
    assert class_latents(model, "one", 1).unique() == 1
    assert class_latents(model, "two", 1).unique() == 4


def test_class_latents_follow_the_samplers_equations(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of DDIM from the last timestep is the guided estimate of x0, taken to the first noise level."""
    monkeypatch.setattr("protectors.dreambooth._SAMPLING_STEPS", 1)
    shape = (4, 32, 32)
    latents = draw_class_latents(model, "person", 1)
    (generator,) = streams([0], "class images")
    noise = torch.randn((1, *shape), generator=generator)
    t = torch.tensor([999])
    with torch.no_grad():
        guided, free = (model.predict(noise, t, model.embed_prompts([text])) for text in ("person", ""))
    prediction = free + 7.5 * (guided - free)
    torch.testing.assert_close(latents, model.predict_x0(noise, prediction, t), rtol=1e-3, atol=1e-3)


METHODS: list[tuple[type[SubjectProtector[Any]], Any]] = [
    (ASPL, ASPLConfig(**SMALL)),
    (FSMG, FSMGConfig(steps=2, training_steps=2, step_levels=4.0, eval_draws=1)),
    (SimAC, SimACConfig(**SMALL, selection_rounds=1)),
    (MetaCloak, MetaCloakConfig(pgd_steps=1, training_steps=2, snapshots=2, passes=1, rounds=2, eval_draws=1)),
]


@pytest.mark.parametrize(("method", "config"), METHODS)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_subject_does_not_feel_the_others(method: Any, config: Any, kind: str, model: DiffusionModel) -> None:
    protector = method(config.replace(surrogate=kind, learning_rate=1e-3), model)
    images, seeds = pictures(3), [5, 6, 7]
    calls: list[tuple[int, int]] = []
    both = protector.protect(
        images, seeds=seeds, groups=["a", "b", "a"], progress=lambda *call: calls.append(call)
    ).images
    pair = protector.protect(images[[2, 0]], seeds=[7, 5], groups=["a", "a"]).images
    alone = protector.protect(images[1:2], seeds=[6]).images
    assert (both[[2, 0]] != pair).float().mean() < 0.01
    assert (both[1:2] != alone).float().mean() < 0.01
    single = protector.protect(images[:1], seeds=[5]).images
    assert (single != both[:1]).any()  # the other image of the subject is learnt too
    total = protector.steps * (2 if kind == "full" else 1)
    assert calls == [(number + 1, total) for number in range(total)]


def test_an_image_that_fails_leaves_its_group_and_the_others_alone(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first image's gradient breaks at the first step; its subject is then taught the original."""
    true_loss = denoising_loss

    def broken(model: DiffusionModel, images: Tensor, embeddings: Tensor, draws: Draws) -> Tensor:
        factor = torch.ones(len(images))
        factor[0] = torch.nan
        return true_loss(model, images, embeddings, draws) * factor

    # Two steps on the images as they are: both of the subject have their turn.
    protector = ASPL(ASPLConfig(**{**SMALL, "perturbed_steps": 2}, learning_rate=1e-2), model)
    images, groups = pictures(3), ["a", "b", "a"]
    whole = protector.protect(images, seeds=[5, 6, 7], groups=groups)
    monkeypatch.setattr("protectors.aspl.denoising_loss", broken)
    result = protector.protect(images, seeds=[5, 6, 7], groups=groups)
    assert [fact.failed is None for fact in result.facts] == [False, True, True]
    assert torch.equal(result.images[0], images[0])
    assert torch.equal(result.images[1], whole.images[1])
    assert (result.images[2] != images[2]).any()


def test_aspl_alternates_as_published(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy learns clean images and is thrown away; the surrogate learns perturbed ones; x0 never moves."""
    events: list[tuple[str, Tensor, list[Tensor], list[Tensor]]] = []
    train = DreamBooth.train

    def spy_train(self: DreamBooth, images: Tensor | None = None, *, steps: int) -> None:
        before = list(self.surrogates.state())
        train(self, images, steps=steps)
        seen = self.batch.originals if images is None else images.clone()
        events.append(("clean" if images is None else "perturbed", seen, before, list(self.surrogates.state())))

    def spy_pgd(loss: Any, originals: Tensor, plan: Any, **options: Any) -> Tensor:
        result = pgd(loss, originals, plan, **options)
        events.append(("pgd", result, [originals], [options["start"]]))
        return result

    monkeypatch.setattr(DreamBooth, "train", spy_train)
    monkeypatch.setattr("protectors.subject.pgd", spy_pgd)
    images = pictures(2)
    ASPL(ASPLConfig(**{**SMALL, "eps_levels": 6.0}), model).protect(images, seeds=[1, 2], groups=["a", "a"])
    # Nothing is trained after the last climb.
    assert [event[0] for event in events] == ["clean", "pgd", "perturbed", "clean", "pgd"]
    first, climb, perturbed, second, last = events
    assert torch.equal(first[1], images)
    assert torch.equal(second[1], images)
    assert torch.equal(perturbed[1], climb[1])
    assert all(torch.equal(a, b) for a, b in zip(perturbed[2], first[2], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(perturbed[3], first[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second[2], perturbed[3], strict=True))
    for event, before in ((climb, images), (last, climb[1])):
        assert torch.equal(event[2][0], images)
        torch.testing.assert_close(images + event[3][0], before)
        assert (event[1] - images).abs().max() * 255 <= 6.001
    assert (last[1] - images).abs().max() * 255 > 5.9


def test_fsmg_trains_before_it_attacks_and_then_no_more(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Tensor] = []
    climb = SubjectProtector._climb

    def spy(self: Any, school: DreamBooth, *rest: Any, **options: Any) -> Tensor:
        states.append(torch.cat([part.flatten() for part in school.surrogates.state()]))
        result = climb(self, school, *rest, **options)
        states.append(torch.cat([part.flatten() for part in school.surrogates.state()]))
        return result

    monkeypatch.setattr(SubjectProtector, "_climb", spy)
    FSMG(FSMGConfig(steps=2, training_steps=3, eval_draws=1), model).protect(pictures(1), seeds=[1])
    with make_surrogates("lora", model, subject_seeds(batch_of(((0,),))), train_text_encoder=True) as fresh:
        ups = [part.flatten() for part in fresh.state()[1::2]]
    assert all(part.eq(0).all() for part in ups)
    assert len(states) == 2
    assert torch.equal(states[0], states[1])
    assert states[0].count_nonzero() > torch.cat([part.flatten() for part in fresh.state()]).count_nonzero()


def test_a_prompt_of_the_caller_is_the_class_and_gets_the_identifier(model: DiffusionModel) -> None:
    outputs = [
        ASPL(ASPLConfig(**SMALL, class_prompt=default), model).protect(pictures(1), seeds=[1], prompts=given).images
        for default, given in (("a dog", None), ("ignored", ["a dog"]), ("another", None))
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    batch = batch_of(((0,), (1,)), prompts=("a photo of a dog", "person"))
    assert instance_prompts(batch, ASPLConfig()) == ("a photo of a sks dog", "sks person")
    assert class_prompts(batch, ASPLConfig()) == batch.prompts


def test_random_start_is_drawn_per_image(model: DiffusionModel) -> None:
    config = ASPLConfig(**{**SMALL, "pgd_steps": 1, "step_levels": 0.01}, random_start=True)
    images = pictures(1).repeat(2, 1, 1, 1)
    output = ASPL(config, model).protect(images, seeds=[1, 2]).images
    assert not torch.equal(output[0], output[1])
    assert (output - images).abs().max() * 255 > 6


@pytest.mark.parametrize(
    "change",
    [
        {"pgd_steps": 0},
        {"step_levels": 0.0},
        {"eval_draws": 0},
        {"learning_rate": 0.0},
        {"clip_norm": 0.0},
        {"train_batch": 0},
        {"prior_images": -1},
        {"prior_weight": -1.0},
        {"rounds": 0},
        {"clean_steps": -1},
        {"perturbed_steps": -1},
        {"surrogate": "some"},
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        ASPLConfig(**change)
    for name in ("steps", "training_steps"):
        with pytest.raises(ValueError, match=f"^{name}=0"):
            FSMGConfig.from_dict({name: 0})


def test_full_surrogate_needs_float32(model: DiffusionModel, tmp_path: Any) -> None:
    half = load_model(str(save_tiny_model(tmp_path / "half")), dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="float32"):
        ASPL(ASPLConfig(**SMALL, surrogate="full"), half)
    assert ASPL(ASPLConfig(**SMALL), half).protect(pictures(1), seeds=[1]).facts[0].failed is None

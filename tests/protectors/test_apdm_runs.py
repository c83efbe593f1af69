"""Whole runs of APDM: resumed, broken, in another order, on several concepts, under several words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from protectors import concepts
from protectors.apdm import APDM, APDMConfig
from protectors.concepts import Concept, attacker_words
from protectors.diffusion import DiffusionModel
from protectors.learning_to_protect import ProtectionLoss, Sample
from protectors.model_base import ProtectedModel, Study
from protectors.protected_weights import NotFiniteError
from protectors.randomness import normal, streams
from tests.protectors.model_runs import SMALL, Watched, concept, copied, small_model

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = SMALL.replace(inner_steps=1, steps=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return small_model(tmp_path_factory.mktemp("models") / "tiny")


def same(one: ProtectedModel, other: ProtectedModel) -> bool:
    return all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


class Killed(Exception):
    """Stands for whatever ends a process."""


def killed_after(done: int) -> Any:
    def progress(step: int, total: int) -> None:
        if step == done:
            raise Killed

    return progress


def test_a_resumed_run_gives_the_weights_of_an_undisturbed_one(model: DiffusionModel, tmp_path: Path) -> None:
    config = FAST.replace(attackers=("full", "lora"), attacker_rates=(1e-3, 1e-2), identifiers=("sks", "ktn"))
    concepts = [concept(), concept(2, seed=5, class_word="cat")]
    straight = APDM(config, model).protect(concepts, seed=3)
    for done in (3, 6):
        with pytest.raises(Killed):
            APDM(config, model).protect(
                concepts, seed=3, progress=killed_after(done), checkpoint=tmp_path, checkpoint_every=2
            )
    resumed = APDM(config, model).protect(concepts, seed=3, checkpoint=tmp_path)
    assert same(resumed, straight)
    assert resumed.facts == straight.facts
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_a_finished_run_is_not_done_again_and_another_one_is_refused(model: DiffusionModel, tmp_path: Path) -> None:
    first = APDM(FAST, model).protect([concept()], seed=3, checkpoint=tmp_path)
    watched = Watched(FAST, model)
    assert same(watched.protect([concept()], seed=3, checkpoint=tmp_path), first)
    assert watched.visits == []
    for other, subject, seed, differs in (
        (FAST.replace(beta=2.0), concept(), 3, "beta"),
        (FAST, concept(), 4, "seed"),
        (FAST, concept(seed=1), 3, "concepts"),
    ):
        with pytest.raises(ValueError, match=differs):
            APDM(other, model).protect([subject], seed=seed, checkpoint=tmp_path)


def test_a_checkpoint_on_other_class_images_is_refused(
    model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another kind of processor; with given positives nothing else of the concept tells."""
    images = concept().images
    subject = Concept(images=images, class_word="dog", positives=torch.zeros(3, *model.latent_shape(images)))
    APDM(FAST.replace(steps=1), model).protect([subject], seed=3, checkpoint=tmp_path)
    real = concepts.class_latents
    monkeypatch.setattr(concepts, "class_latents", lambda *asked: real(*asked) * (1 + 1e-6))
    with pytest.raises(ValueError, match="concepts"):
        APDM(FAST.replace(steps=1), model).protect([subject], seed=3, checkpoint=tmp_path)


class Breaking(APDM):
    """Its loss is not finite from the third update on."""

    def _loss(self, study: Study, sample: Sample) -> ProtectionLoss:
        loss = super()._loss(study, sample)
        broken = self.broken = getattr(self, "broken", 0) + 1
        factor = torch.nan if broken > 2 else 1.0
        return ProtectionLoss(total=loss.total * factor, parts=loss.parts)


def test_what_is_not_finite_stops_the_run_at_the_last_good_checkpoint(model: DiffusionModel, tmp_path: Path) -> None:
    before = copied(model.unet.parameters())
    straight = APDM(FAST, model).protect([concept()], seed=3)
    with pytest.raises(NotFiniteError, match="update 3: gradient"):
        Breaking(FAST, model).protect([concept()], seed=3, checkpoint=tmp_path, checkpoint_every=1)
    assert all(torch.equal(a, b) for a, b in zip(model.unet.parameters(), before, strict=True))
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 2
    assert same(APDM(FAST, model).protect([concept()], seed=3, checkpoint=tmp_path), straight)


def test_an_attacker_who_diverges_is_noticed(model: DiffusionModel) -> None:
    with pytest.raises(NotFiniteError, match="update 1"):
        APDM(SMALL.replace(attacker_rates=(1e30,)), model).protect([concept()], seed=3)


@pytest.mark.parametrize("given", [False, True])
def test_the_order_of_the_images_makes_no_difference(model: DiffusionModel, given: bool) -> None:
    images = concept(4).images
    positives = normal(streams([1, 2, 3, 4], "positives"), model.latent_shape(images)) if given else None
    results = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        moved = None if positives is None else positives[order]
        subject = Concept(images=images[order], class_word="dog", positives=moved)
        results.append(APDM(FAST, model).protect([subject], seed=3))
    assert same(*results)
    assert results[0].facts == results[1].facts
    assert len(set(results[0].facts.pairs[0])) == 4


def test_a_pair_is_an_image_and_the_positive_at_its_place(model: DiffusionModel) -> None:
    """Whatever the order, a negative meets only the positive that it was given with."""
    images = torch.stack([torch.full((3, 16, 16), level / 255) for level in (10, 90, 170, 250)])
    channels = model.latent_shape(images)
    positives = torch.stack([torch.full(channels, float(number)) for number in range(4)])
    watched = Watched(FAST.replace(inner_steps=8), model)
    watched.protect([Concept(images=images, class_word="dog", positives=positives)], seed=1)
    with torch.no_grad():
        moments = model.encode_moments(images)
    met = set()
    for sample, _ in watched.visits:
        number = int(sample.latents[0, 0, 0, 0])
        draws = sample.rows(1, 2).draws
        expected = model.latents((moments[0][[number]], moments[1][[number]]), draws.posterior)
        torch.testing.assert_close(sample.latents[1:2], expected)
        met.add(number)
    assert met == {0, 1, 2, 3}


def test_positives_are_drawn_beside_the_class_set(model: DiffusionModel) -> None:
    watched = Watched(FAST.replace(inner_steps=6), model)
    watched.protect([concept()], seed=1)
    samples = [sample.latents for sample, _ in watched.visits]
    positives, general = ({latents[row].numpy().tobytes() for latents in samples} for row in (0, 2))
    assert len(positives) == len(general) == 3
    assert not positives & general


def test_seed_decides(model: DiffusionModel) -> None:
    first, again, other = (APDM(FAST, model).protect([concept()], seed=seed) for seed in (3, 3, 3 + 2**32))
    assert same(first, again)
    assert first.facts == again.facts
    assert not same(first, other)


def test_concepts_take_turns_and_words_are_drawn_for_each_attack(model: DiffusionModel) -> None:
    config = FAST.replace(
        inner_steps=2, steps=6, identifiers=("sks", "ktn"), templates=("a photo of {}", "my {} at home")
    )
    watched = Watched(config, model)
    result = watched.protect([concept(), concept(seed=1, class_word="toy cat")], seed=3)
    assert result.facts.steps == 12
    assert len(result.facts.pairs) == 2
    used = []
    for low in range(0, 24, 2):
        first, second = (sample.embeddings for sample, _ in watched.visits[low : low + 2])
        assert torch.equal(first, second)  # one attacker, one prompt
        (word,) = [
            (class_word, words.instance)
            for class_word in ("dog", "toy cat")
            for words in attacker_words(class_word, config.identifiers, config.templates)
            if torch.equal(model.embed_prompts([words.instance, words.general]), first[1:])
        ]
        used.append(word)
    assert [class_word for class_word, _ in used] == ["dog", "toy cat"] * 6
    assert len({prompt for _, prompt in used}) > 4


def test_prompts_are_plain_and_the_identifier_goes_before_the_whole_class_word() -> None:
    (words,) = attacker_words("stuffed animal", ("sks",), ("a photo of {}",))
    assert (words.instance, words.general) == ("a photo of sks stuffed animal", "a photo of stuffed animal")
    (odd,) = attacker_words("{0} cat", ("{x}",), ("a {x} {}",))
    assert (odd.instance, odd.general) == ("a {x} {x} {0} cat", "a {x} {0} cat")
    for preset in APDM.presets.values():
        for words in attacker_words("dog", preset.identifiers, preset.templates):
            assert not set("\"'_") & set(words.instance + words.general)


def test_attackers_train_under_the_drawn_prompt(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []
    real = model.embed_prompts
    monkeypatch.setattr(model, "embed_prompts", lambda prompts: seen.append(tuple(prompts)) or real(prompts))
    config = FAST.replace(steps=1, templates=("one {} here",))
    APDM(config, model).protect([concept(class_word="toy cat")], seed=3)
    # Prompts are warmed, dealt for three rows, and then embedded for the subject and the class.
    assert seen[-2:] == [("one sks toy cat here",), ("one toy cat here",)]


def test_drift_and_largest_change_are_of_the_saved_weights(model: DiffusionModel) -> None:
    result = APDM(FAST, model).protect([concept()], seed=3)
    given = dict(model.unet.named_parameters())
    changes = torch.cat([(weight - given[name]).flatten() for name, weight in result.weights.items()])
    whole = torch.cat([weight.flatten() for weight in given.values()])
    assert result.facts.largest_change == pytest.approx(changes.abs().max().item(), rel=1e-4)
    assert result.facts.drift == pytest.approx((changes.norm() / whole.norm()).item(), rel=1e-3)
    assert 0 < result.facts.largest_change <= FAST.steps * FAST.rate * 1.01
    assert {len(curve) for curve in result.facts.curves.values()} == {FAST.steps}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"inner_steps": -1}, "inner_steps"),
        ({"attackers": ()}, "attackers"),
        ({"attacker_rates": (1e-3, 1e-3)}, "attacker_rates"),
        ({"identifiers": ()}, "identifiers"),
        ({"templates": ("a photo",)}, "templates"),
        ({"templates": ("{} and {}",)}, "templates"),
        ({"inner_steps": 0, "gradient_point": "before"}, "gradient_point"),
        ({"compat_grad_leak": True, "attackers": ("lora",)}, "compat_grad_leak"),
        ({"eps_levels": 8.0}, "no field 'eps_levels'"),
    ],
)
def test_what_cannot_work_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APDMConfig.from_dict({**SMALL.to_dict(), **change})

"""The anchored method: its loss from the equations, long attacks, and what it holds on to."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protectors.anchored import Anchored, AnchoredConfig
from protectors.apdm import APDM
from protectors.concepts import Words
from protectors.constraints import to_8bit
from protectors.diffusion import DiffusionModel
from protectors.dreambooth import class_latents
from protectors.learning_to_protect import ProtectionLoss, Sample
from protectors.model_base import Study
from protectors.retention import CachedKept, Kept, cache_kept, retention_loss
from tests.protectors.model_runs import RATE, concept, copied, distance, small_model, unet64
from tests.protectors.model_runs import SMALL as APDM_SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = AnchoredConfig(
    steps=2,
    rate=RATE,
    inner_steps=2,
    attack_length=4,
    attacker_rates=(RATE,),
    batch=2,
    class_images=3,
    kept_images=2,
    retention_batch=2,
    crops=0,
)
WORDS = Words(instance="a photo of sks dog", general="a photo of dog")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return small_model(tmp_path_factory.mktemp("models") / "tiny")


class Watched(Anchored):
    """Remembers weights and samples of each gradient, the loss there, and the weights that each update began with."""

    def __init__(self, config: AnchoredConfig, model: DiffusionModel) -> None:
        super().__init__(config, model)
        self.starts: list[list[Tensor]] = []
        self.visits: list[tuple[Sample, list[Tensor], float]] = []
        self.references: list[list[Tensor]] = []
        self.memories: list[dict[str, Tensor]] = []
        self.kept: CachedKept | None = None

    def _accumulate(self, study: Study, step: int, gradient: tuple[Tensor, ...]) -> dict[str, float]:
        self.starts.append(copied(study.copy.parameters))
        values = super()._accumulate(study, step, gradient)
        self.references.append(copied(study.reference.unet.parameters()))
        self.memories.append({name: value.clone() for name, value in study.memory.items()})
        return values

    def _loss(self, study: Study, sample: Sample) -> ProtectionLoss:
        self.kept = study.kept
        loss = super()._loss(study, sample)
        self.visits.append((sample, copied(study.copy.parameters), float(loss.total.detach())))
        return loss


def run(model: DiffusionModel, **changes: Any) -> Watched:
    watched = Watched(SMALL.replace(**changes), model)
    watched.protect([concept()], seed=7)
    return watched


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_equations(tmp_path: Path, prediction_type: str) -> None:
    model = small_model(tmp_path / "tiny", prediction_type=prediction_type)
    watched = run(model, repulsion=3.0, pairs_by_error=0.75)
    assert watched.kept is not None
    errors = watched.kept.errors.double()
    for sample, weights, loss in watched.visits:
        draws, z, noise = sample.draws, sample.latents.double(), sample.draws.noise.double()
        abar = model.alphas_cumprod.double()[draws.t].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * z + (1 - abar).sqrt() * noise
        truth = abar.sqrt() * noise - (1 - abar).sqrt() * z if prediction_type == "v_prediction" else noise
        with torch.no_grad():
            given, found = (
                unet64(model, held)(noisy, draws.t, words.double()).sample
                for held, words in ((None, sample.given), (weights, sample.embeddings))
            )
        own = errors[draws.t * 10 // model.schedule.timesteps]
        weights = (0.25 + 0.75 * errors[5:].mean() / own).view(-1, 1, 1, 1)
        anchor = (weights * (found - given).square())[:2].mean()
        repulsion = (weights * (found - given - 3 * (given - truth)).square())[2:].mean()
        assert loss == pytest.approx(float(anchor + repulsion), rel=1e-4)


def test_pairs_are_class_images_and_images_of_the_subject_in_the_noisier_half(model: DiffusionModel) -> None:
    watched = run(model, steps=4)
    general = class_latents(model, WORDS.general, 3 + 3)[:3]
    for sample, *_ in watched.visits:
        assert len(sample.latents) == 4
        assert bool((sample.draws.t >= model.schedule.timesteps // 2).all())
        assert torch.equal(sample.draws.noise[:2], sample.draws.noise[2:])
        assert all(any(torch.equal(latent, drawn) for drawn in general) for latent in sample.latents[:2])


def test_an_attack_goes_on_over_the_updates_and_a_new_one_begins_in_time(model: DiffusionModel) -> None:
    """4 steps of the attacker are two updates; he keeps what he has changed, on top of the protected weights."""
    watched = run(model, steps=3, rate=1e-9)
    # At this rate the protected weights stay, so that the distance from them is what the attacker did.
    lengths = [distance(weights, start) for (_, weights, _), start in zip(watched.visits, watched.starts, strict=True)]
    assert lengths[1] > 1.3 * lengths[0]
    assert lengths[2] < 1.2 * lengths[0]
    counts = [int(memory["0/0/step/0"]) for memory in watched.memories]
    assert counts == [2, 4, 2]


def test_what_an_attacker_changed_stands_on_the_weights_as_they_are_by_then(model: DiffusionModel) -> None:
    watched = run(model, steps=2, attacker_rates=(1e-12,), rate=1e-2)
    # He does next to nothing, so the gradient is taken where the update begins: not where the last one began.
    for (_, weights, _), start in zip(watched.visits, watched.starts, strict=True):
        assert distance(weights, start) < 1e-6
    assert distance(*watched.starts) > 1e-3


def test_a_resumed_run_in_the_middle_of_an_attack_gives_the_same_weights(model: DiffusionModel, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def progress(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    config = SMALL.replace(
        steps=8, attackers=("full", "lora"), attacker_rates=(RATE, 1e-2), identifiers=("sks", "ktn", "t@t")
    )
    straight = Anchored(config, model).protect([concept()], seed=3)
    with pytest.raises(Killed):
        Anchored(config, model).protect([concept()], seed=3, progress=progress, checkpoint=tmp_path, checkpoint_every=3)
    resumed = Anchored(config, model).protect([concept()], seed=3, checkpoint=tmp_path)
    assert all(torch.equal(weight, straight.weights[name]) for name, weight in resumed.weights.items())


def test_an_attacker_keeps_to_the_words_he_began_with(model: DiffusionModel) -> None:
    watched = run(model, steps=6, identifiers=("sks", "ktn", "t@t", "zwx"))
    words = [sample.given[0] for sample, *_ in watched.visits]
    assert all(torch.equal(one, two) for one, two in zip(words[::2], words[1::2], strict=True))
    assert any(not torch.equal(words[0], other) for other in words[2::2])


def test_he_trains_the_text_encoder_and_it_is_put_back(model: DiffusionModel) -> None:
    before = copied(model.text_encoder.parameters())
    watched = run(model, steps=3)
    assert all(torch.equal(*pair) for pair in zip(before, model.text_encoder.parameters(), strict=True))
    (expected,) = model.embed_prompts([WORDS.instance])
    changes = []
    for sample, *_ in watched.visits:
        assert all(torch.equal(row, expected) for row in sample.given)
        assert all(torch.equal(row, sample.embeddings[0]) for row in sample.embeddings)
        changes.append(float((sample.embeddings[0] - expected).norm()))
    # Of the second update he goes on, with the third a new attack begins.
    assert changes[1] > 1.3 * changes[0] > 0
    assert changes[2] < 1.2 * changes[0]
    frozen = run(model, attacker_text_encoder=False)
    assert all(torch.equal(sample.embeddings, sample.given) for sample, *_ in frozen.visits)


def test_retention_is_nothing_at_the_given_weights_and_grows_with_the_change(model: DiffusionModel) -> None:
    kept, general = cache_kept(model, None, drawn=2), class_latents(model, WORDS.general, 3)

    def loss(factor: float) -> float:
        before = copied(model.unet.parameters())
        reference = small_copy(model)
        with torch.no_grad():
            for weight in model.unet.parameters():
                weight.mul_(factor)
            found = float(retention_loss(model, reference, kept, general, WORDS, batch=2, by_error=0.5, seed=1))
            for weight, given in zip(model.unet.parameters(), before, strict=True):
                weight.copy_(given)
        return found

    assert loss(1.0) == 0.0
    assert 0 < loss(1.001) < loss(1.01)


def test_kept_pictures_come_with_the_errors_of_the_given_model_by_part_of_the_schedule(model: DiffusionModel) -> None:
    kept = cache_kept(model, None, drawn=2)
    steps, generator = model.schedule.timesteps, torch.Generator().manual_seed(5)
    t = torch.randint(steps // 10, (400,), generator=generator) + 9 * steps // 10
    latents = kept.latents[torch.randint(2, (400,), generator=generator)]
    noise = torch.randn(latents.shape, generator=generator)
    with torch.no_grad():
        found = model.predict(model.add_noise(latents, noise, t), t, model.embed_prompts([""] * 400))
        error = (found - model.target(latents, noise, t)).square().mean()
    assert float(kept.errors[9]) == pytest.approx(float(error), rel=0.1)


def test_weights_make_errors_relative_and_leave_their_mean() -> None:
    errors = torch.tensor([8.0, 4.0, 2.0, 1.0])
    kept = CachedKept(latents=torch.zeros(0), prompts=(), digest="", errors=errors)
    t = torch.tensor([0, 249, 250, 500, 999])
    torch.testing.assert_close(kept.weights(t, 1000, share=0.0), torch.ones(5))
    relative = kept.weights(t, 1000, share=1.0)
    torch.testing.assert_close(relative * errors[[0, 0, 1, 2, 3]], torch.full((5,), 3.75))
    torch.testing.assert_close(kept.weights(t, 1000, share=0.5), (1 + relative) / 2)
    torch.testing.assert_close(kept.weights(t[3:], 1000, share=1.0, start=0.5), torch.tensor([0.75, 1.5]))


def small_copy(model: DiffusionModel) -> DiffusionModel:
    reference = copy.copy(model)
    reference.unet = copy.deepcopy(model.unet)
    return reference


def test_retention_keeps_the_model_nearer_to_what_it_was(model: DiffusionModel) -> None:
    """As far as predictions on drawn pictures go; the weights may drift as they like."""
    kept, general = cache_kept(model, None, drawn=2), class_latents(model, WORDS.general, 3)
    changed = {}
    for weight in (1e-6, 100.0):
        config = SMALL.replace(steps=6, rate=1e-3, retention_weight=weight)
        protected = Anchored(config, model).protect([concept()], seed=3).on(model)
        losses = [
            float(retention_loss(protected, model, kept, general, WORDS, batch=2, by_error=0.5, seed=seed))
            for seed in range(8)
        ]
        changed[weight] = sum(losses)
    assert changed[100.0] < 0.7 * changed[1e-6]


def test_given_pictures_are_kept_instead_of_drawn_ones_under_their_own_prompts(
    model: DiffusionModel, tmp_path: Path
) -> None:
    images = concept(3, seed=4).images
    kept = Kept(images=images, prompts=("a cat", "a tree", ""))
    cached = cache_kept(model, kept, drawn=2)
    assert cached.prompts == kept.prompts
    torch.testing.assert_close(
        cached.latents, torch.cat([model.mean_latents(image[None]) for image in to_8bit(images)])
    )
    drawn = Anchored(SMALL, model).protect([concept()], seed=3)
    given = Anchored(SMALL, model).protect([concept()], seed=3, kept=kept, checkpoint=tmp_path)
    assert any(not torch.equal(weight, drawn.weights[name]) for name, weight in given.weights.items())
    with pytest.raises(ValueError, match="kept"):
        Anchored(SMALL, model).protect([concept()], seed=3, checkpoint=tmp_path)


def test_bad_pictures_to_keep_are_refused(model: DiffusionModel) -> None:
    images = concept(2).images
    for kept, message in (
        (Kept(images=images[..., :8], prompts=("", "")), "16, 16"),
        (Kept(images=images, prompts=("",)), "one each"),
        (Kept(images=images * 2, prompts=("", "")), "float32 in"),
    ):
        with pytest.raises(ValueError, match=message):
            Anchored(SMALL, model).protect([concept()], seed=3, kept=kept)
    with pytest.raises(ValueError, match="no use"):
        APDM(APDM_SMALL, model).protect([concept()], seed=3, kept=Kept(images=images, prompts=("", "")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repulsion": -1.0}, "repulsion"),
        ({"preservation_weight": 1.0}, "preservation_weight"),
        ({"attack_length": 1}, "attack_length"),
        ({"pairs_from": 1.0}, "pairs_from"),
        ({"retention_weight": 0.0}, "kept_images"),
        ({"retention_weight": 0.0, "kept_images": 0}, "retention_weight"),
        ({"retention_by_error": 1.5}, "retention_by_error"),
        ({"pairs_by_error": -0.5}, "pairs_by_error"),
        ({"rate_decay": 1.5}, "rate_decay"),
        ({"kept_images": 0}, "kept_images"),
        ({"retention_batch": 0}, "retention_batch"),
        ({"inner_state_reset": "carried"}, "attack_length"),
    ],
)
def test_what_cannot_work_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.replace(**change)

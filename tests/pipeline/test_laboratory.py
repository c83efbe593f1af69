"""The measurements of the reference models, on tiny random models and planted numbers.

Contract: 1. an interval belongs to its mean and does not depend on order; 2. a stored score is taken only by the
experiment that made it; 3. the photos that are compared with are never trained on.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessor, ViTModel

from pipeline.laboratory import autoencoder, denoiser, neighbours, personalization, purification
from pipeline.laboratory.autoencoder import EncoderAttack
from pipeline.laboratory.figures import Figure, bootstrap_interval, bootstrap_ratio
from pipeline.laboratory.personalization import CLEAN, NOISE, PROTECTED, Experiment, Scores, load_subjects
from pipeline.verify.attack_models import load_pipeline
from pipeline.verify.customizers.base import Customized, PriorImages, Sampling
from pipeline.verify.customizers.dreambooth import DreamBooth
from pipeline.verify.embed import Embedder, mean_similarity, mean_similarity_among
from protectors.model_files import ModelError
from tests.protectors.tiny import save_tiny_model

SMALL = DreamBooth(steps=1, rate=1e-3, batch=2, prior_images=1, sampling=Sampling(steps=1, guidance=2.0), bf16=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 32', '"sample_size": 16'))
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for subject, count in (("mug", 3), ("hat", 6)):
        for number in range(count):
            data = io.BytesIO()
            coarse = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(data, "PNG")
            row = {"asset_id": f"{subject}/{number}", "image": {"bytes": data.getvalue(), "path": ""}}
            rows.append(row | {"subject": subject, "subject_class": f"red {subject}"})
    file = tmp_path_factory.mktemp("subjects") / "subjects.parquet"
    pq.write_table(pa.Table.from_pylist(rows[::-1]), file)
    return file


# --- Numbers


def test_bars_and_intervals() -> None:
    figure = Figure(model="m", name="n", value=0.5, sample="s")
    assert figure.reached is None
    assert replace(figure, at_least=0.5).reached is True
    assert replace(figure, at_least=0.51).reached is False
    assert replace(figure, at_most=0.4).reached is False
    assert replace(figure, low=0.1, high=0.2).to_dict()["interval_95"] == [0.1, 0.2]
    values = np.random.default_rng(0).normal(3, 1, size=100)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.1)
    assert bootstrap_interval([2.0] * 5) == (2.0, 2.0)


def test_ratio_of_paired_sums() -> None:
    below = np.random.default_rng(0).uniform(1, 2, size=40)
    low, high = bootstrap_ratio(below * 0.4, below)
    assert (low, high) == (pytest.approx(0.4), pytest.approx(0.4))  # paired: the ratio is the same in every resample
    low, high = bootstrap_ratio([1.0, 1.0], [1.0, -1.0])
    assert (low, high) == (-np.inf, np.inf)  # a denominator that may vanish decides nothing


def test_images_of_one_subject_are_drawn_together() -> None:
    values, groups = [0.0] * 10 + [1.0] * 10, ["a"] * 10 + ["b"] * 10
    assert bootstrap_interval(values, groups) == (0.0, 1.0)
    low, high = bootstrap_interval(values)
    assert 0.2 < low < high < 0.8


def test_numbers_that_are_not_finite_stay_out_of_the_json() -> None:
    figure = Figure(model="m", name="n", value=np.nan, low=-np.inf, high=1.0, sample="s", at_least=0.0)
    assert figure.reached is False
    stored = json.dumps(figure.to_dict(), allow_nan=False)
    assert json.loads(stored)["interval_95"] == [None, 1.0]


def scores(name: str, before: float, real: float, **after: float) -> Scores:
    return Scores(subject=name, before=before, real=real, after=after)


def test_planted_effects_are_found() -> None:
    found = [
        scores(str(i), 0.2, 0.8, clean=0.5 + i / 100, noise=0.49 + i / 100, protected=0.3 + i / 200) for i in range(15)
    ]
    figures = {figure.name: figure for figure in personalization.personalization_figures(found)}
    assert figures["DreamBooth: subjects whose similarity rises, of 15"].value == 15
    share = figures["DreamBooth: mean rise as a share of the way from before to real"]
    assert share.value == pytest.approx(np.mean([0.3 + i / 100 for i in range(15)]) / 0.6)
    assert share.reached
    protected, noise = personalization.phenomenon_figures(found)
    clean = sum(0.3 + i / 100 for i in range(15))
    assert protected.value == pytest.approx(sum(0.2 + i / 200 for i in range(15)) / clean)
    assert noise.value == pytest.approx(0.01 * 15 / clean)
    assert protected.reached
    assert noise.reached
    assert protected.low is not None
    assert protected.low > 0
    few = personalization.phenomenon_figures(found[:9])
    assert [figure.reached for figure in few] == [False, False]  # a claim needs ten subjects


@pytest.mark.parametrize(("before", "real"), [(0.6, 0.8), (0.6, 0.5)])
def test_a_laboratory_where_personalization_fails_reaches_nothing(before: float, real: float) -> None:
    found = [scores(str(i), before, real, clean=before - 0.1, noise=before - 0.1, protected=0.1) for i in range(15)]
    figures = [*personalization.personalization_figures(found), *personalization.phenomenon_figures(found)]
    assert [figure.reached for figure in figures if figure.reached is not None] == [False] * 4


def test_an_effect_whose_interval_touches_zero_does_not_count() -> None:
    falls = [2.0, -0.6] * 6  # a mean of 0.7, by chance
    found = [scores(str(i), 0.2, 0.8, clean=0.5, noise=0.5, protected=0.5 - 0.3 * fall) for i, fall in enumerate(falls)]
    protected, _ = personalization.phenomenon_figures(found)
    assert protected.value == pytest.approx(0.7)
    assert protected.reached is (protected.low is not None and protected.low > 0)
    wider = [
        replace(score, after={**score.after, "protected": 0.5 - 0.3 * f})
        for score, f in zip(found, [9.0, *[-0.4] * 11], strict=True)
    ]
    protected, _ = personalization.phenomenon_figures(wider)
    assert protected.value > 0.3
    assert protected.reached is False


# --- Embedding


def test_embedder_gives_unit_vectors_that_do_not_depend_on_the_batch(embedder: Path) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 3, 48, 40)
    model = Embedder(embedder)
    vectors = model.embed(images)
    assert vectors.shape == (3, 16)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(vectors, torch.cat([model.embed(image[None]) for image in images]), atol=1e-5)
    assert mean_similarity(vectors, vectors) == pytest.approx(float((vectors.sum(0) / 3).square().sum()), abs=1e-5)
    pairs = [float(vectors[i] @ vectors[j]) for i in range(3) for j in range(3) if i != j]
    assert mean_similarity_among(vectors) == pytest.approx(np.mean(pairs), abs=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        mean_similarity_among(vectors[:1])


def test_a_vit_without_pooler_answers_with_its_first_token(tmp_path: Path) -> None:
    """As DINO is published: a pooler of random weights must not be taken."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(Embedder(tmp_path).embed(images), Embedder(tmp_path).embed(images))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no image embedder"):
        Embedder(tmp_path)


def test_nearest_neighbours_of_planted_groups() -> None:
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    assert neighbours.nearest_neighbour_hits(vectors, ["a", "a", "b", "b"]) == [1, 1, 1, 1]
    assert neighbours.nearest_neighbour_hits(vectors, ["a", "b", "a", "b"]) == [0, 0, 0, 0]
    red, blue = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    red[:, 0], blue[:, 2] = 0.9, 0.9
    histograms = neighbours.colour_histograms(torch.cat([red, blue]))
    assert torch.allclose(histograms @ histograms.T, torch.tensor([[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2).float())


# --- Personalization


def test_subjects_are_split_and_no_photo_is_on_both_sides(subjects: Path) -> None:
    hat, mug = load_subjects(subjects, 32)
    assert (hat.name, hat.class_word, len(hat.train), len(hat.others)) == ("hat", "red hat", 4, 2)
    assert (len(mug.train), len(mug.others)) == (2, 1)
    assert hat.train.shape[1:] == (3, 32, 32)
    everything = torch.cat([hat.train, hat.others]).flatten(1)
    assert len(everything.unique(dim=0)) == 6


def test_scores_are_stored_and_taken_by_the_same_experiment_only(
    model: Path, embedder: Path, subjects: Path, tmp_path: Path
) -> None:
    experiment = Experiment(model=model, embedder=embedder, dreambooth=SMALL, generated=1, protector_steps=1)
    store = tmp_path / "scores.jsonl"
    people = load_subjects(subjects, 32)
    seen: list[str] = []
    found = personalization.run(experiment, people, store, workers=1, done=lambda scores: seen.append(scores.subject))
    assert [scores.subject for scores in found] == seen == ["hat", "mug"]
    assert all(set(scores.after) == {CLEAN, NOISE, PROTECTED} for scores in found)
    assert all(len(set(scores.after.values())) == 3 for scores in found)  # the conditions differ
    again = personalization.run(experiment, people, store, workers=1, done=lambda scores: pytest.fail("done twice"))
    assert again == found
    other = replace(experiment, seed=1, conditions=(CLEAN,))
    changed = replace(people[0], train=people[0].train.flip(-1))
    assert len({other.fingerprint(people[0]), *(experiment.fingerprint(one) for one in (*people, changed))}) == 4
    assert personalization.run(other, people[:1], store, workers=1)[0].after[CLEAN] != found[0].after[CLEAN]
    assert len([json.loads(line) for line in store.read_text().splitlines()]) == 3


def test_photos_to_compare_with_are_never_trained_on(
    model: Path, embedder: Path, subjects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    customize = DreamBooth.customize

    def spy(
        self: DreamBooth, base: object, images: torch.Tensor, class_word: str, *, seed: int, priors: PriorImages
    ) -> Customized:
        seen.append(images)
        return customize(self, base, images, class_word, seed=seed, priors=priors)

    monkeypatch.setattr(DreamBooth, "customize", spy)
    (hat, _) = load_subjects(subjects, 32)
    experiment = Experiment(model=model, embedder=embedder, dreambooth=SMALL, generated=1, protector_steps=1)
    personalization.measure(experiment, hat)
    assert len(seen) == 3
    for images in seen:
        distances = (images[:, None] - hat.others[None]).abs().mean(dim=(2, 3, 4))
        assert distances.min() > 16 / 255  # further than any treatment goes


# --- Autoencoder, denoiser, pixel model


def test_the_encoder_attack_moves_latents_further_than_noise(model: Path) -> None:
    vae = load_pipeline(model).vae.requires_grad_(False)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    attacks = [
        autoencoder.fragility(vae, images, "2", EncoderAttack(levels=levels, steps=8), (None, 1.0)) for levels in (4, 8)
    ]
    (little, _), (much, ratio) = attacks
    assert 0 < little.value < much.value
    assert ratio.value > 1
    assert ratio.reached


def test_a_contact_sheet_holds_every_image(tmp_path: Path) -> None:
    images = torch.stack([torch.full((3, 16, 16), value) for value in (0.2, 0.4, 0.6, 0.8)])
    with Image.open(denoiser.contact_sheet(images, ["first", "second"], tmp_path / "new" / "sheet.png")) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[1] == 32
    for place, value in zip(((20, 8), (20, 24), (50, 8), (50, 24)), (51, 102, 153, 204), strict=True):
        assert pixels[place].tolist() == [value] * 3


def test_purification_with_a_model_that_knows_the_tiles() -> None:
    """An oracle that names the exact noise brings a flat grey tile back; one that sees none leaves it noisy."""
    unet = UNet2DModel(sample_size=16, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    pipeline = DDPMPipeline(unet=unet, scheduler=scheduler)
    tiles = torch.full((2, 3, 16, 16), 0.5)

    class Oracle(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, t: int) -> object:
            scale = (1 - scheduler.alphas_cumprod[t]).sqrt()
            return type("Output", (), {"sample": noisy / scale})  # the clean tile is 0 in [-1, 1]

    pipeline.unet = Oracle()
    assert (purification.purify(pipeline, tiles, 50, seed=0) - tiles).abs().max() < 0.01

    class Blind(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, t: int) -> object:
            return type("Output", (), {"sample": torch.zeros_like(noisy)})

    pipeline.unet = Blind()
    assert (purification.purify(pipeline, tiles, 50, seed=0) - tiles).std() > 0.05

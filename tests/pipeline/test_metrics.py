"""The metrics, beside other implementations and on planted images.

Contract: 1. a batch scores as its images do; 2. a failure is an error of one image, never a number; 3. no weights, no
number; 4. no face is a similarity of zero, a broken detector is an error.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from pipeline.errors import UserError
from pipeline.verify.embed import Embedder, mean_similarity
from pipeline.verify.metrics.base import Against, Facts, Metric, Outcome, Reference, measure
from pipeline.verify.metrics.distribution import FEWEST, cmmd, kid
from pipeline.verify.metrics.faces import FaceIdentity, detector_gate, face_figures
from pipeline.verify.metrics.fidelity import Colour, PixelChange, Structure, flat_blocks
from pipeline.verify.metrics.naturalness import (
    Brisque,
    SupportVectors,
)
from pipeline.verify.metrics.registry import INSTALLED, available_metrics, chosen_metrics
from pipeline.verify.metrics.similarity import PromptSimilarity, SubjectSimilarity
from protectors.model_files import ModelError
from tests.protectors.tiny import save_tokenizer


def pictures(count: int, side: int = 64, *, seed: int = 0) -> Tensor:
    """Smooth random pictures, uint8 `(count, 3, side, side)`."""
    noise = torch.rand((count, 3, side // 8, side // 8), generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, size=(side, side), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


def changed(images: Tensor, levels: int = 8, *, seed: int = 1) -> Tensor:
    """The pictures with uniform noise of at most so many levels."""
    noise = torch.randint(-levels, levels + 1, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = small | {"vocab_size": 200, "max_position_embeddings": 16, "eos_token_id": 189, "bos_token_id": 188}
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    save_tokenizer(folder / "tokenizer")
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / file.name)
    return folder


class Detector:
    """Finds a face where the red channel is bright; breaks where blue is."""

    how = "bright"

    def detect(self, image: Tensor) -> Tensor | None:
        if image[2].min() == 255:
            raise RuntimeError("broken")
        return image[:, 4:12, 4:12] if image[0].float().mean() > 100 else None


class Describer:
    """The mean colour as a unit vector around grey, so that cosines take both signs."""

    how, same = "cosine", 0.5

    def embed(self, faces: Tensor) -> Tensor:
        return F.normalize(faces.float().mean(dim=(2, 3)) - 128, dim=1)

    def likeness(self, vector: Tensor, known: Tensor) -> float:
        return max(0.0, float(vector @ F.normalize(known.mean(dim=0), dim=0)))


@pytest.fixture(scope="module")
def metrics(clip: Path) -> list[Metric]:
    vectors = SupportVectors(
        vectors=np.zeros((1, 36)), weights=np.ones(1), width=0.01, offset=0.0,
        lowest=np.zeros(36), highest=np.ones(36),
    )  # fmt: skip
    installed = (Brisque, FaceIdentity)  # in their place stand known ones
    given = [metric for metric in available_metrics({"clip": clip})[0] if not isinstance(metric, installed)]
    return [*given, Brisque(vectors), FaceIdentity(Detector(), Describer(), weights="none", licence="free")]


def test_metrics_do_not_depend_on_the_batch(metrics: list[Metric]) -> None:
    originals = pictures(5, 176)
    images = changed(originals)
    against = Against(originals=originals, photos=pictures(3, 176, seed=5), prompts=["a dog", "", "b", "cc", "a cat"])
    for metric in metrics:
        together = metric.score(images, against)
        assert set(together) == {facts.name for facts in metric.facts}
        for place in range(5):
            alone = metric.score(images[place : place + 1], against.only(place))
            for name, values in together.items():
                assert alone[name] == [pytest.approx(values[place], abs=1e-5)], name


def test_names_are_unique_and_facts_complete(metrics: list[Metric]) -> None:
    facts = [fact for metric in metrics for fact in metric.facts]
    assert len({fact.name for fact in facts}) == len(facts)
    assert all(fact.how and (fact.weights == "none" or len(fact.weights) == 64) for fact in facts)


def test_wrong_calls_are_refused(metrics: list[Metric]) -> None:
    images = pictures(2)
    for metric in metrics:
        if metric.needs is not Reference.NOTHING:
            with pytest.raises(ValueError, match=f"needs {metric.needs}"):
                metric.score(images)
        with pytest.raises(ValueError, match="uint8"):
            metric.score(images.float(), Against(originals=images, photos=images, prompts=["", ""]))
    with pytest.raises(ValueError, match="equal shapes"):
        PixelChange().score(images, Against(originals=images[:1]))
    with pytest.raises(ValueError, match="one per image"):
        next(m for m in metrics if m.needs is Reference.PROMPTS).score(images, Against(prompts=["a"]))
    with pytest.raises(ValueError, match="equal shapes"):
        measure(PixelChange(), images, Against(originals=images[:1]))


# Fidelity.


def test_pixel_change_by_hand() -> None:
    original = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    image = original.clone()
    image[0, 0, 0, 0], image[0, 1, 0, 0], image[0, 2, 1, 1] = 104, 98, 107
    scores = PixelChange().score(image, Against(originals=original))
    assert scores == {"linf_levels": [7], "mean_levels": [pytest.approx(13 / 12)], "changed_share": [0.5]}


def test_structure_agrees_with_scikit_image_and_torchmetrics() -> None:
    originals = pictures(2, 176)
    images = changed(originals, 20)
    scores = Structure().score(images, Against(originals=originals))
    for place, (image, original) in enumerate(zip(images.numpy(), originals.numpy(), strict=True)):
        assert scores["psnr"][place] == pytest.approx(peak_signal_noise_ratio(original, image), abs=1e-3)
        expected = structural_similarity(
            original, image, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert scores["ssim"][place] == pytest.approx(expected, abs=1e-4)
    whole = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0)(images.float() / 255, originals.float() / 255)
    assert np.mean(scores["ms_ssim"]) == pytest.approx(float(whole), abs=1e-5)


def test_equal_images_have_the_highest_fidelity() -> None:
    images = pictures(1, 176)
    against = Against(originals=images)
    assert Structure().score(images, against) == {
        "psnr": [pytest.approx(100)], "ssim": [pytest.approx(1)], "ms_ssim": [pytest.approx(1)],
    }  # fmt: skip
    assert set(v for values in Colour().score(images, against).values() for v in values) == {0.0}


@pytest.mark.parametrize(
    ("side", "names"), [(8, {"psnr"}), (175, {"psnr", "ssim"}), (176, {"psnr", "ssim", "ms_ssim"})]
)
def test_what_does_not_fit_is_left_out(side: int, names: set[str]) -> None:
    images = pictures(1, 176)[..., :side]
    assert set(Structure().score(images, Against(originals=images))) == names
    assert ("ciede2000_flat_mean" in Colour().score(images, Against(originals=images))) == (side >= 32)


def test_colour_agrees_with_scikit_image_and_looks_at_flat_regions() -> None:
    """A picture of 20 blocks, two of them flat; the change is in the flat ones alone."""
    original = pictures(1, 168, seed=4)[..., : 4 * 32, : 5 * 32].contiguous()
    original[..., :32, 32:64] = 90
    original[..., 64:96, 96:128] = 200
    image = original.clone()
    image[..., :32, 32:64] += 6
    image[..., 64:96, 96:128] += 6
    pair = [rgb2lab(side[0].permute(1, 2, 0).numpy()) for side in (original, image)]
    difference = deltaE_ciede2000(*pair)
    scores = Colour().score(image, Against(originals=original))
    assert set(flat_blocks(pair[0][..., 0]).tolist()) == {1, 13}
    assert scores["ciede2000_mean"] == [pytest.approx(difference.mean())]
    assert scores["ciede2000_p95"] == [pytest.approx(np.percentile(difference, 95))]
    assert scores["ciede2000_flat_mean"] == [pytest.approx(10 * difference.mean())]


# Similarity.


def test_subject_similarity_is_the_mean_over_all_pairs() -> None:
    embedder = Embedder()
    images, photos = pictures(3), pictures(4, seed=9)
    (scores,) = SubjectSimilarity("nano_embed_i", embedder).score(images, Against(photos=photos)).values()
    expected = mean_similarity(embedder.embed(images / 255), embedder.embed(photos / 255))
    assert np.mean(scores) == pytest.approx(expected, abs=1e-6)
    assert len(set(scores)) == 3


def test_prompt_similarity_is_clips_own(clip: Path) -> None:
    from transformers import CLIPTokenizer

    images, prompts = pictures(2, 32), ["a dog", "hello"]
    model = CLIPModel.from_pretrained(clip)
    tokens = CLIPTokenizer.from_pretrained(clip)(prompts, padding="max_length", max_length=16, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(clip)(list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixels)
    expected = (output.image_embeds * output.text_embeds).sum(dim=1).tolist()
    scores = PromptSimilarity(clip).score(images, Against(prompts=prompts))["clip_t"]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_without_weights_there_is_a_reason_and_no_number(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    metrics, absent = available_metrics()
    names = {fact.name for metric in metrics for fact in metric.facts}
    reasons = {entry.name: entry.reason for entry in absent}
    faces = {"ism_all", "face_found", "face_match"}
    assert set(reasons) == {"lpips", "dino_i", "clip_i", "clip_t", "brisque", "fid"} | faces
    assert not names & set(reasons)
    assert "pip install" in reasons["brisque"]
    assert "fixative[faces]" in reasons["ism_all"]
    assert "--metric lpips=FOLDER" in reasons["lpips"]
    assert "2048 images" in reasons["fid"]
    assert "clip_t" not in {entry.name for entry in available_metrics({"clip": clip})[1]}
    with pytest.raises(ValueError, match="unknown weights arcface"):
        available_metrics({"arcface": clip})
    for kind in ("dino", "lpips"):
        with pytest.raises(ModelError):
            available_metrics({kind: clip / "nothing"})


def test_what_is_asked_for_is_there_or_refused(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = chosen_metrics({"clip": str(clip)})
    assert [fact.name for metric in chosen for fact in metric.facts] == ["clip_i", "clip_t"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for asked, message in (
        ({"faces": INSTALLED}, "pip install"),
        ({"faces": str(clip)}, "no metric faces"),
        ({"clip": INSTALLED}, "clip=FOLDER"),
        ({"arcface": str(clip)}, "no metric arcface"),
    ):
        with pytest.raises(UserError, match=message):
            chosen_metrics(asked)


# Failures.


class Fragile(Metric):
    """Breaks on black images, and answers infinity on white ones."""

    needs = Reference.NOTHING
    facts = (Facts(name="fragile", better="down", how="test"),)

    def _score(self, images: Tensor, against: Against) -> dict[str, list[float]]:
        values = images.double().mean(dim=(1, 2, 3))
        if (values == 0).any():
            raise RuntimeError("black")
        return {"fragile": [float("inf") if value == 255 else float(value) for value in values]}


def test_a_failure_is_an_error_of_its_image_alone() -> None:
    images = torch.tensor([7, 0, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 8, 8)
    assert measure(Fragile(), images) == {
        "fragile": [
            Outcome(value=7.0),
            Outcome(value=None, error="RuntimeError: black"),
            Outcome(value=None, error="the score is inf"),
        ]
    }


# Faces.


def plain(*colours: tuple[int, int, int]) -> Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, 3, 16, 16).contiguous()


def test_no_face_is_zero_and_so_is_an_opposite_one() -> None:
    metric = FaceIdentity(Detector(), Describer(), weights="none", licence="free")
    photos = plain((228, 128, 128), (50, 128, 128), (208, 128, 128))
    images = plain((248, 128, 128), (50, 128, 128), (128, 228, 128), (120, 128, 128))
    scores = metric.score(images, Against(photos=photos))
    assert scores == {
        "ism_all": [pytest.approx(1), 0.0, pytest.approx(0, abs=1e-6), 0.0],
        "face_found": [1, 0, 1, 1],
        "face_match": [1, 0, 0, 0],
    }
    assert metric.found(images) == [1, 0, 1, 1]


def test_a_broken_detector_is_an_error_and_no_miss() -> None:
    metric = FaceIdentity(Detector(), Describer(), weights="none", licence="free")
    images = plain((228, 128, 128), (228, 128, 255))
    outcomes = measure(metric, images, Against(photos=images[:1]))
    assert [outcome.value for outcome in outcomes["ism_all"]] == [pytest.approx(1), None]
    assert [outcome.error for outcome in outcomes["face_found"]] == [None, "RuntimeError: broken"]


def test_a_subject_without_a_face_has_no_face_numbers() -> None:
    metric = FaceIdentity(Detector(), Describer(), weights="none", licence="free")
    faceless = Against(photos=plain((0, 0, 0)))
    assert measure(metric, plain((228, 128, 128)), faceless) == {}
    assert "do not apply" in str(metric.why_not(faceless))
    facts = {fact.name: (fact.better, fact.delta) for fact in metric.facts}
    assert facts == {"ism_all": ("down", 0.05), "face_found": ("neither", None), "face_match": ("neither", None)}


def test_photos_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    detect = Detector.detect

    def counted(self: Detector, image: Tensor) -> Tensor | None:
        seen.append(image)
        return detect(self, image)

    monkeypatch.setattr(Detector, "detect", counted)
    metric = FaceIdentity(Detector(), Describer(), weights="none", licence="free")
    image = plain((228, 128, 128))
    for photos in (plain((228, 128, 128), (50, 128, 128)), plain((0, 0, 0), (1, 0, 0))):
        seen.clear()
        for _ in range(3):
            metric.score(image, Against(photos=photos))
            metric.found(photos.clone())
        assert len(seen) <= 2 + 3
    # Another subject's photos are looked at anew.
    assert metric.score(image, Against(photos=plain((128, 228, 128))))["ism_all"] == [pytest.approx(0, abs=1e-6)]
    assert metric.score(image, Against(photos=image))["ism_all"] == [pytest.approx(1)]


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1))
def test_overall_is_the_rate_times_the_conditional_mean(cosines: list[float | None]) -> None:
    figures = face_figures([value or 0.0 for value in cosines], [float(value is not None) for value in cosines])
    found = [value for value in cosines if value is not None]
    assert figures.not_found == pytest.approx(1 - len(found) / len(cosines))
    assert figures.overall == pytest.approx((1 - figures.not_found) * (figures.detected or 0.0))
    assert (figures.detected is None) == (not found)


def test_a_detector_that_misses_real_faces_is_not_used() -> None:
    assert [detector_gate(found).passed for found in ([1.0] * 19 + [0.0], [1.0] * 18 + [0.0] * 2, [])] == [
        True, False, None,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="one of each"):
        face_figures([], [])


# Sets of images.


def directions(count: int, shift: float, *, seed: int) -> Tensor:
    vectors = torch.randn((count, 16), generator=torch.Generator().manual_seed(seed))
    vectors[:, 0] += shift
    return F.normalize(vectors, dim=1)


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_sets_of_one_kind_are_near_and_of_two_kinds_apart(distance: object) -> None:
    assert callable(distance)
    same = [distance(directions(400, 0, seed=s), directions(300, 0, seed=s + 50)) for s in range(20)]
    apart = distance(directions(400, 0, seed=1), directions(300, 1.5, seed=2))
    # Unbiased: below zero as often as above, and two standard errors hold the truth nearly always.
    assert 3 <= sum(found.value < 0 for found in same) <= 17
    assert sum(abs(found.value) < 2.5 * found.standard_error for found in same) >= 17
    assert apart.value > 5 * apart.standard_error
    assert (apart.images, apart.blocks) == (300, 10)
    assert distance(directions(400, 0, seed=1), directions(300, 1.5, seed=2)) == apart


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_pairs_in_equal_order_look_no_nearer_than_their_sets(distance: object) -> None:
    assert callable(distance)
    photos = [directions(200, 0, seed=seed) for seed in range(12)]
    edits = [F.normalize(side + 0.05 * directions(200, 0, seed=9), dim=1) for side in photos]
    found = [distance(left, right, seed=seed) for seed, (left, right) in enumerate(zip(photos, edits, strict=True))]
    # Pairs are no independent sets, which leaves a little; in blocks of pairs it is a hundred standard errors and more.
    assert min(each.value / each.standard_error for each in found) > -10


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_small_sets_are_refused(distance: object) -> None:
    assert callable(distance)
    with pytest.raises(ValueError, match="at least 100"):
        distance(directions(FEWEST - 1, 0, seed=1), directions(200, 0, seed=2))

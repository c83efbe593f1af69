"""Metrics beside the verification's own: which are measured of what, as which columns, under which conditions."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import FatalWorkerError, UserError
from pipeline.verify.edit_trial import EDIT_METRIC
from pipeline.verify.further import AskedMetrics, FurtherMetrics, ask_metrics, face_gates, not_measured
from pipeline.verify.metrics import registry
from pipeline.verify.metrics.base import Against, Facts, Metric, Reference
from pipeline.verify.metrics.faces import FACES, NO_FACE, FaceIdentity
from pipeline.verify.metrics.perceptual import AlexNetTrunk
from pipeline.verify.metrics.sets import Comparison, Number, measure_set, remarks
from pipeline.verify.report import campaign_tables
from pipeline.verify.scores import Cell, Score
from pipeline.verify.tables import State
from pipeline.verify.trial import METRIC
from protectors.reference import NANO_EMBED, reference_path


class Bright:
    """Finds a face in every bright picture; all faces are alike."""

    how, same = "bright", 0.5

    def detect(self, image: Tensor) -> Tensor | None:
        return image if float(image.float().mean()) > 100 else None

    def embed(self, faces: Tensor) -> Tensor:
        return torch.ones(len(faces), 2)

    def likeness(self, vector: Tensor, known: Tensor) -> float:
        return 1.0


EDITOR = "sdedit-0.5-quick"
BOTH = (Reference.PHOTOS, Reference.ORIGINALS)
LPIPS = "lpips to the edit of the clean image"
MEASURED = (
    Facts(name=METRIC, better="down", how="test", delta=0.05),
    Facts(name=EDIT_METRIC, better="down", how="test", delta=0.05),
    Facts(name="dino_i", better="down", how="test", delta=0.05),
    Facts(name=LPIPS, better="up", how="test", delta=0.1),
    Facts(name="clip_t", better="neither", how="test"),
    *FaceIdentity(Bright(), Bright(), weights="none", licence="free").facts,
)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("alexnet")
    save_file(AlexNetTrunk().state_dict(), folder / "model.safetensors")
    return folder


def pictures(count: int, side: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8)


class Brightness(Metric):
    """The mean less that of the photos; breaks on black images."""

    needs = Reference.PHOTOS
    facts = (Facts(name="brightness", better="down", how="test"),)

    def _score(self, images: Tensor, against: Against) -> dict[str, list[float]]:
        means = images.double().mean(dim=(1, 2, 3))
        if (means == 0).any():
            raise RuntimeError("black")
        assert against.photos is not None
        photos = [float(photo.double().mean()) for photo in against.photos]
        return {"brightness": [float(mean) - sum(photos) / len(photos) for mean in means]}


def test_metrics_go_where_they_have_a_reference(alexnet: Path) -> None:
    folders = {"dino": str(reference_path(NANO_EMBED)), "lpips": str(alexnet)}
    asked = ask_metrics(folders, BOTH)
    further = asked.load()
    assert tuple(further.facts) == asked.facts
    assert further.drawn_names(pictures(2)) == ["dino_i"]
    assert further.edit_names == ["lpips to the edit of the clean image"]
    # What is a cost beside the original is a success beside the edit that was wanted.
    assert [(facts.name, facts.better) for facts in further.facts][1] == (further.edit_names[0], "up")
    wanted, other = pictures(1), pictures(1, seed=1)
    (same,), (far,) = further.of_edit(wanted, wanted).values(), further.of_edit(other, wanted).values()
    assert same.value == 0.0 < float(far.value or 0)
    measured = {facts.name for facts in further.facts}
    absent = {entry.name: entry.reason for entry in not_measured(measured, folders)}
    assert set(absent) == {"clip_i", "clip_t", "ism_all", "face_found", "face_match", "brisque", "fid"}
    assert "--metric faces" in absent["ism_all"]
    assert "fixative measure" in absent["fid"]
    # Asked for, and nothing was attacked that it is measured of.
    assert "asked for" in {entry.name: entry.reason for entry in not_measured([], folders)}["dino_i"]


def test_what_is_no_verdict_is_refused() -> None:
    for name in ("brisque", "inception", "arcface"):
        with pytest.raises(UserError, match=name):
            ask_metrics({name: "installed"}, BOTH)
    assert ask_metrics({}, BOTH).facts == ()


def test_what_a_metric_is_hangs_on_neither_order_nor_place(alexnet: Path, tmp_path: Path) -> None:
    folders = {"lpips": str(alexnet), "dino": str(reference_path(NANO_EMBED))}
    moved = shutil.copytree(alexnet, tmp_path / "moved")
    asked = ask_metrics(folders, BOTH)
    assert asked.identity == ask_metrics({"dino": folders["dino"], "lpips": str(moved)}, BOTH).identity
    assert [sorted(entry) for entry in asked.identity] == [["name", "version", "weights"]] * 2


def test_networks_that_nothing_is_measured_with_are_not_loaded(monkeypatch: pytest.MonkeyPatch, alexnet: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(registry, "PromptSimilarity", refuse)
    monkeypatch.setattr(registry, "SubjectSimilarity", refuse)
    edits = ask_metrics({"clip": "/nowhere", "lpips": str(alexnet)}, (Reference.ORIGINALS,))
    assert [facts.name for facts in edits.facts] == [LPIPS]
    # Pictures are drawn without a prompt of their own: nobody needs CLIP's text side.
    monkeypatch.setattr(registry, "SubjectSimilarity", lambda name, embedder: Brightness())
    drawn = ask_metrics({"clip": str(reference_path(NANO_EMBED))}, (Reference.PHOTOS,))
    assert [facts.name for facts in drawn.facts] == ["brightness"]


def test_an_actor_with_other_weights_refuses(alexnet: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(alexnet, tmp_path / "alexnet")
    asked = ask_metrics({"lpips": str(folder)}, BOTH)
    torch.manual_seed(1)
    save_file(AlexNetTrunk().state_dict(), folder / "model.safetensors")
    with pytest.raises(FatalWorkerError, match="other weights"):
        asked.load()
    assert AskedMetrics().load().facts == []


def test_a_failed_measurement_is_an_error_of_one_picture() -> None:
    images = pictures(2)
    images[1] = 0
    (outcomes,) = FurtherMetrics(drawn=[Brightness()]).of_drawn(images, pictures(3, seed=2)).values()
    assert outcomes[0].value is not None
    assert outcomes[1].error == "RuntimeError: black"


def column(attack: str, metric: str, cell: Cell, values: Sequence[float], purifier: str = "none") -> list[Score]:
    return [
        Score(attack=attack, metric=metric, unit=f"u{n}", cell=cell, image=f"{n}", purifier=purifier, value=value)
        for n, value in enumerate(values)
    ]


def four_cells(attack: str, metric: str, clean: float, protected: float, floor: float, ceiling: float) -> list[Score]:
    """Twelve units, nearly equal; the purifier changes nothing."""
    scores: list[Score] = []
    cells = {Cell.CLEAN: clean, Cell.PROTECTED: protected, Cell.FLOOR: floor, Cell.CEILING: ceiling}
    for cell, level in cells.items():
        scores += column(attack, metric, cell, [level + 0.001 * unit for unit in range(12)])
    return scores


def test_further_columns_are_secondary_and_point_the_right_way() -> None:
    scores = four_cells("dreambooth", METRIC, 0.8, 0.4, 0.3, 0.9)
    scores += four_cells("dreambooth", "dino_i", 0.7, 0.3, 0.2, 0.8)
    scores += four_cells(EDITOR, EDIT_METRIC, 0.9, 0.5, 0.4, 1.0)
    scores += four_cells("dreambooth", "clip_t", 0.7, 0.3, 0.2, 0.8)
    scores += four_cells(EDITOR, LPIPS, 0.1, 0.5, 0.6, 0.0)
    customization, editing = campaign_tables(scores, MEASURED)
    assert [(table.question.metric, table.question.primary) for table in customization] == [
        (METRIC, True), ("dino_i", False),
    ]  # fmt: skip
    assert [table.question.primary for table in editing] == [True, False]
    assert [(table.question.better, table.question.delta) for table in editing] == [("down", 0.05), ("up", 0.1)]
    for table in (*customization, *editing):
        assert table.state is State.MEASURED, table.gates
        assert table.rows[0].residual is not None
        assert table.rows[0].residual.value == pytest.approx(0.4)


def test_a_detector_that_misses_real_faces_makes_no_verdict() -> None:
    scores = four_cells("dreambooth", METRIC, 0.8, 0.4, 0.3, 0.9)
    for name in FACES:
        scores += four_cells("dreambooth", name, 0.7, 0.3, 0.2, 0.8)
    blind = [score for score in scores if (score.metric, score.cell) != ("face_found", Cell.CEILING)]
    seeing = [*blind, *column("dreambooth", "face_found", Cell.CEILING, [1.0] * 12)]
    blind += column("dreambooth", "face_found", Cell.CEILING, [1.0] * 6 + [0.0] * 6)
    for given, state in ((seeing, State.MEASURED), (blind, State.INVALID)):
        tables = {table.question.metric: table for table in campaign_tables(given, MEASURED)[0]}
        assert tables.keys() == {METRIC, "ism_all"}, "found and match are read beside, and no questions of their own"
        assert tables["ism_all"].state is state
        assert tables[METRIC].state is State.MEASURED
        beside = {row["cell"]: row for row in tables["ism_all"].figures}
        assert beside["C"]["not found"] == pytest.approx(1 - 0.3055)
        assert beside["C"]["passes for the subject"] == pytest.approx(0.3055)
        assert beside["A"]["pictures"] == 12
        assert tables[METRIC].figures == []
    assert face_gates(four_cells("dreambooth", METRIC, 0.8, 0.4, 0.3, 0.9)) == {}


def test_subjects_without_a_face_are_left_out_and_counted() -> None:
    """Three of twelve have none: the others are judged."""
    scores = four_cells("dreambooth", METRIC, 0.8, 0.4, 0.3, 0.9)
    for name in FACES:
        level = four_cells("dreambooth", name, 0.7, 0.3, 0.2, 1.0)
        scores += [score for score in level if score.unit not in ("u0", "u1", "u2")]
    tables = {table.question.metric: table for table in campaign_tables(scores, MEASURED)[0]}
    assert (tables["ism_all"].state, tables["ism_all"].units) == (State.MEASURED, 9)
    assert tables["ism_all"].counts["error"] == 0
    assert f"3 of 12 groups are left out: {NO_FACE}" in [gate.detail for gate in tables["ism_all"].gates]
    assert tables[METRIC].units == 12


def test_a_picture_of_a_faceless_subject_has_no_face_numbers() -> None:
    faces = FaceIdentity(Bright(), Bright(), weights="none", licence="free")
    further = FurtherMetrics(drawn=[faces, Brightness()])
    images, faceless = pictures(2), pictures(2) // 4
    assert set(further.of_drawn(images, images)) == {*FACES, "brightness"}
    assert set(further.of_drawn(images, faceless)) == {"brightness"}
    # An attack that fails fails for the numbers that there would have been.
    assert further.drawn_names(faceless) == ["brightness"]
    assert further.drawn_names(images) == [*FACES, "brightness"]


def test_a_set_of_any_sizes_is_measured_and_the_rest_is_absent(alexnet: Path) -> None:
    images = [*pictures(2, 40), *pictures(1, 20, seed=3), *pictures(1, 40, seed=4)]
    originals = [image // 2 for image in images]
    given = Comparison(originals=originals, photos=[*pictures(1, 30), *pictures(1, 50)], others=images)
    numbers, absent = measure_set(images, given, {"lpips": alexnet})
    found = {number.facts.name: number for number in numbers}
    # LPIPS has nothing to say of the small one; every other place keeps its number.
    assert list(found["lpips"].outcomes) == [0, 1, 3]
    assert found["lpips"].images == 3
    alone, _ = measure_set(images[3:], Comparison(originals=originals[3:]), {"lpips": alexnet})
    single = next(number for number in alone if number.facts.name == "lpips")
    assert found["lpips"].outcomes[3].value == pytest.approx(single.value)
    assert found["nano_embed_i"].images == 4
    reasons = {entry.name: entry.reason for entry in absent}
    assert "at least 100" in reasons["nano_embed_kid"]
    assert "too small" in reasons["ms_ssim"]
    assert "no weights given" in reasons["fid"]
    assert not found.keys() & reasons.keys()
    assert remarks(numbers) == []
    without = {entry.name: entry.reason for entry in measure_set(images, Comparison(), {})[1]}
    assert without["psnr"] == "no originals given to compare with"


def test_a_distance_of_two_sets() -> None:
    images = list(pictures(100, 16))
    numbers, _ = measure_set(images, Comparison(others=[image // 3 for image in images]), {})
    distances = {number.facts.name: number for number in numbers if number.beside is not None}
    assert set(distances) >= {"nano_embed_kid", "nano_embed_cmmd"}
    kid = distances["nano_embed_kid"]
    assert kid.beside is not None
    document = kid.to_dict()
    assert document["value"] > 3 * document["beside"]["standard_error"] > 0
    assert document["name"] == "nano_embed_kid"


def test_what_stands_beside_a_number_replaces_nothing() -> None:
    facts = Facts(name="fid", better="neither", how="test")
    document = Number(facts=facts, value=1.0, images=3, beside={"images": (3, 4), "name": "other"}).to_dict()
    assert (document["images"], document["name"], document["beside"]["images"]) == (3, "fid", (3, 4))


def test_sets_are_gone_through_once_and_not_kept() -> None:
    """Every picture that a set is read from can be forgotten while the next ones are read."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def stream(seed: int) -> Iterator[Tensor]:
        nonlocal most
        for number in range(70):
            picture = pictures(1, 16, seed=100 * seed + number)[0]
            alive.add(picture)
            most = max(most, len(alive))
            yield picture

    given = Comparison(originals=stream(0), others=stream(1))
    numbers, absent = measure_set(stream(0), given, {})
    assert next(number for number in numbers if number.facts.name == "psnr").images == 70
    assert "70 and 70 images" in {entry.name: entry.reason for entry in absent}["nano_embed_kid"]
    assert most < 70

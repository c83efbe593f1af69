"""Metrics beside the verification's own: which are measured of what, as which columns, under which conditions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.verify.edit_trial import EDIT_METRIC
from pipeline.verify.further import FACES, FurtherMetrics, face_gates, further_metrics, not_measured
from pipeline.verify.metrics.base import Against, Facts, Metric, Reference
from pipeline.verify.metrics.perceptual import AlexNetTrunk
from pipeline.verify.metrics.sets import Comparison, measure_set, remarks
from pipeline.verify.report import campaign_tables
from pipeline.verify.scores import Cell, Score
from pipeline.verify.tables import State
from pipeline.verify.trial import METRIC
from protectors.reference import NANO_EMBED, reference_path

EDITOR = "sdedit-0.5-quick"


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
    further = further_metrics({"dino": str(reference_path(NANO_EMBED)), "lpips": str(alexnet)})
    assert further.drawn_names == ["dino_i"]
    assert further.edit_names == ["lpips to the edit of the clean image"]
    # What is a cost beside the original is a success beside the edit that was wanted.
    assert [(facts.name, facts.better) for facts in further.facts][1] == (further.edit_names[0], "up")
    wanted, other = pictures(1), pictures(1, seed=1)
    (same,), (far,) = further.of_edit(wanted, wanted).values(), further.of_edit(other, wanted).values()
    assert same.value == 0.0 < float(far.value or 0)
    absent = {entry.name: entry.reason for entry in not_measured(further.facts)}
    assert set(absent) == {"clip_i", "clip_t", "ism_all", "face_found", "face_match", "brisque", "fid"}
    assert "--metric faces" in absent["ism_all"]
    assert "fixative measure" in absent["fid"]


def test_what_is_no_verdict_is_refused() -> None:
    for name in ("brisque", "inception", "arcface"):
        with pytest.raises(UserError, match=name):
            further_metrics({name: "installed"})
    assert further_metrics({}).facts == []


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
    scores += four_cells(EDITOR, "lpips to the edit of the clean image", 0.1, 0.5, 0.6, 0.0)
    customization, editing = campaign_tables(scores)
    assert [(table.question.metric, table.question.primary) for table in customization] == [
        (METRIC, True), ("dino_i", False),
    ]  # fmt: skip
    assert [table.question.primary for table in editing] == [True, False]
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
        tables = {table.question.metric: table for table in campaign_tables(given)[0]}
        assert {tables[name].state for name in ("ism_all", "face_match")} == {state}
        assert tables[METRIC].state is State.MEASURED
    assert face_gates(four_cells("dreambooth", METRIC, 0.8, 0.4, 0.3, 0.9)) == {}


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
    assert kid.to_dict()["value"] > 3 * kid.beside["standard_error"] > 0
    assert kid.to_dict()["standard_error"] == kid.beside["standard_error"]

"""Comparisons of methods, on a tiny model.

1. Every method meets the same attacks on the same subjects; cells on clean photos are run once for all of them.
2. What is stored is not done again, unless it failed.
3. A method that fails is a row with its reason; the others have their numbers.
4. Effects and differences are those of the four cells, paired by subject; where there is none, the reason is told.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pipeline.compare import pictures, report
from pipeline.compare.methods import MethodSpec
from pipeline.compare.plan import Comparison, PlannedCustomization, PlannedEdit, Settings, plan_comparison
from pipeline.compare.results import WORST, Findings, differences, gather
from pipeline.compare.run import run_comparison
from pipeline.compare.store import Results
from pipeline.errors import FatalWorkerError
from pipeline.verify.cells import build_tables
from pipeline.verify.scores import NO_PURIFIER, Cell, Score
from pipeline.verify.tables import State, Table
from pipeline.verify.trial import METRIC
from pipeline.verify.trials import QUESTION
from protectors.noise import Noise
from tests.e2e.command import FAKE
from tests.pipeline.compare_settings import SIDE, tiny_settings

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Told:
    """What a run says of its progress."""

    steps: list[tuple[str, int, int]] = field(default_factory=list)
    advanced: int = 0

    def step(self, name: str, total: int, done: int = 0) -> None:
        self.steps.append((name, total, done))

    def advance(self, count: int, note: str = "") -> None:
        self.advanced += count


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return tiny_settings(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def done(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Results, Told]:
    comparison, results, told = plan_comparison(settings), Results(tmp_path_factory.mktemp("results")), Told()
    assert run_comparison(comparison, results, told, workers=1) == {}
    return comparison, results, told


@pytest.fixture(scope="module")
def found(done: tuple[Comparison, Results, Told]) -> Findings:
    return gather(done[0], done[1], {}, against="noise")


# --- What is run


def test_cells_on_clean_photos_are_shared(done: tuple[Comparison, Results, Told]) -> None:
    comparison, _, told = done
    trials = comparison.trials(comparison.protections())
    cells = [trial for trial in trials if isinstance(trial, PlannedCustomization)]
    for subject in ("cup", "rex"):
        own = sorted((trial.cell, trial.purifier) for trial in cells if trial.subject.name == subject)
        clean = [(Cell.CLEAN, NO_PURIFIER), (Cell.PURIFIED, "jpeg75"), (Cell.FLOOR, NO_PURIFIER)]
        each = [(Cell.PROTECTED, NO_PURIFIER), (Cell.PURIFIED_PROTECTED, "jpeg75")]
        assert own == sorted([*clean, *each, *each])
    edits = [trial for trial in trials if isinstance(trial, PlannedEdit)]
    assert len(edits) == 2 * 2 * 2  # methods, subjects, training photos
    assert told.steps == [("protect", 4, 0), ("attack", 2 * 7 + 8, 0)]
    assert told.advanced == 4 + 2 * 7 + 8


def test_protected_photos_are_those_of_the_method(done: tuple[Comparison, Results, Told]) -> None:
    comparison, results, _ = done
    for item in comparison.protections():
        stored = results.protected(item.key)
        levels = 96 if item.method.label == "noise@96" else 8
        originals = torch.from_numpy(np.stack(item.subject.train)).permute(0, 3, 1, 2).float() / 255
        config = Noise.presets["fast"].replace(eps_levels=levels)
        expected = Noise(config, None).protect(originals, seeds=comparison.seeds(item.subject)).images
        np.testing.assert_array_equal(np.stack(stored.photos), (expected * 255).round().permute(0, 2, 3, 1).numpy())
        assert stored.fidelity["linf_levels"] == [levels, levels]


def test_a_second_run_does_nothing(done: tuple[Comparison, Results, Told]) -> None:
    comparison, results, _ = done
    told = Told()
    assert run_comparison(comparison, results, told, workers=1) == {}
    assert told.steps == [("protect", 4, 4), ("attack", 22, 22)]
    assert told.advanced == 0


def test_an_interrupted_run_goes_on(done: tuple[Comparison, Results, Told], tmp_path: Path) -> None:
    comparison, results, _ = done
    other, told = Results(tmp_path), Told()
    kept = [item.key for item in results.store.list("protected/")]
    trials = [item.key for item in results.store.list("trials/")]
    for key in (*kept, *trials[1:]):
        other.store.put_new(key, results.store.get(key))
    run_comparison(comparison, other, told, workers=1)
    assert told.steps == [("protect", 4, 4), ("attack", 22, 21)]
    assert told.advanced == 1
    again, first = (json.loads(one.store.get(trials[0])) for one in (other, results))
    assert again["scores"] == first["scores"]


@pytest.mark.slow
def test_numbers_are_equal_on_two_workers(
    done: tuple[Comparison, Results, Told], found: Findings, tmp_path: Path
) -> None:
    other = Results(tmp_path)
    assert run_comparison(done[0], other, Told(), workers=2) == {}
    again = gather(done[0], other, {}, against="noise")
    assert [row.tables for row in again.rows] == [row.tables for row in found.rows]


def without(results: Results, key: str, folder: Path) -> Results:
    """A copy of the results that lacks one trial."""
    other = Results(folder)
    for item in (*results.store.list("protected/"), *results.store.list("trials/")):
        if item.key != f"trials/{key}.json":
            other.store.put_new(item.key, results.store.get(item.key))
    return other


def failing(error: Exception) -> Callable[..., None]:
    """Raises it, whatever it is given."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_a_failed_trial_is_told_and_run_again(
    done: tuple[Comparison, Results, Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, results, _ = done
    (lost,) = [
        trial
        for trial in comparison.trials(comparison.protections())
        if trial.protection is not None
        and (trial.protection.method.label, trial.protection.subject.name) == ("noise@96", "rex")
        and isinstance(trial, PlannedCustomization)
        and trial.cell is Cell.PURIFIED_PROTECTED
    ]
    other = without(results, lost.key, tmp_path)
    with monkeypatch.context() as patch:
        message = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        patch.setattr("pipeline.verify.trial.sample", failing(RuntimeError(message)))
        with pytest.raises(FatalWorkerError, match="run the same command to go on"):
            run_comparison(comparison, other, Told(), workers=1)
        assert lost.key not in {item.key.split("/")[1] for item in other.store.list("trials/")}
        patch.setattr("pipeline.verify.trial.sample", failing(RuntimeError("sizes do not match")))
        run_comparison(comparison, other, Told(), workers=1)
    found = gather(comparison, other, {}, against="noise")
    told = "dreambooth of rex, noise@96, purifier jpeg75: RuntimeError: sizes do not match"
    assert found.failed_trials == [told]
    assert json.loads(json.dumps(report.document(found), allow_nan=False))["failed_trials"] == [told]
    # What was not measured might be the worst.
    worst = [row for row in csv.DictReader(io.StringIO(report.flat(found))) if row["purifier"] == "worst"]
    assert (worst[2]["method"], worst[2]["attack"], worst[2]["value"]) == ("noise@96", "dreambooth", "")
    assert worst[2]["reason"].startswith("not measured: jpeg75")
    assert "no worst case: not measured: jpeg75 (noise@96)" in report.notes(found, comparison.attacks[0])
    again = Told()
    run_comparison(comparison, other, again, workers=1)
    assert again.steps[1] == ("attack", 22, 21)
    assert gather(comparison, other, {}).failed_trials == []


# --- Methods that fail


def test_a_method_that_fails_stops_no_other(settings: Settings, tmp_path: Path) -> None:
    specs = (
        MethodSpec(label="noise", name="noise"),
        MethodSpec(label="ill", name=FAKE, overrides={"nan_on": 7}),
        MethodSpec(label="broken", name=FAKE, overrides={"raise_on": 7}),
        MethodSpec(label="inpainting", name="diffusion_guard"),
    )
    comparison = plan_comparison(replace(settings, methods=specs, attacks=("dreambooth",), purifiers=()))
    results = Results(tmp_path)
    failed = run_comparison(comparison, results, Told(), workers=1)
    assert failed.keys() == {"ill", "broken", "inpainting"}
    assert "rex: RuntimeError: not finite" in failed["ill"]
    assert "told to fail" in failed["broken"]
    assert "--model inpaint=FOLDER" in failed["inpainting"]
    found = gather(comparison, results, failed, against="ill")
    assert [row.failed for row in found.rows] == [None, failed["ill"], failed["broken"], failed["inpainting"]]
    assert found.rows[0].tables["dreambooth"].units == 2
    assert found.rows[0].differences == {}  # there is nothing to be held against
    assert failed["broken"] in report.flat(found)
    assert f"failed: {failed['ill']}" in report.markdown(found)
    told = Told()
    assert run_comparison(comparison, results, told, workers=1) == failed
    assert told.steps[0] == ("protect", 6, 4)  # "cup" was fine; what failed is tried again
    assert told.steps[1] == ("attack", 6, 6)


# --- Numbers


def test_tables_hold_the_four_cells(found: Findings) -> None:
    for row in found.rows:
        table = row.tables["dreambooth"]
        assert (table.units, table.dropped, table.counts["error"]) == (2, [], 0)
        assert [item.purifier for item in table.rows] == ["none", "jpeg75"]
        edits = row.tables["sdedit-0.3-quick"]
        assert edits.units == 2  # subjects, not their photos
        assert edits.counts["error"] == 0
    one, other = (row.tables["dreambooth"].rows[0] for row in found.rows)
    assert one.clean == other.clean
    assert one.protected != other.protected
    edits = [row.tables["sdedit-0.3-quick"].rows for row in found.rows]
    assert [row.clean for row in edits[0]] == [row.clean for row in edits[1]]  # one control for all methods
    assert edits[1][0].residual is not None
    assert edits[1][0].residual.value > 0.02  # and noise of 96 levels is not its own
    assert found.rows[0].fidelity is not None
    assert found.rows[1].fidelity is not None
    assert found.rows[0].fidelity.time_ratio == 1
    assert (found.rows[0].fidelity.photos, found.rows[0].fidelity.linf_levels) == (4, 8)
    assert found.rows[1].fidelity.psnr < found.rows[0].fidelity.psnr


def scored(of_purifier: Callable[[int, str], float]) -> list[Score]:
    """Twelve subjects with a floor of 0 and a gain of 1 + subject / 100; D is what the function takes off B."""
    scores = []
    for number in range(12):
        gain = 1 + number / 100
        cells = {(Cell.CLEAN, NO_PURIFIER): gain, (Cell.FLOOR, NO_PURIFIER): 0.0, (Cell.CEILING, NO_PURIFIER): 1.2}
        cells |= {(Cell.PURIFIED, "p"): gain, (Cell.PROTECTED, NO_PURIFIER): gain - of_purifier(number, NO_PURIFIER)}
        cells[Cell.PURIFIED_PROTECTED, "p"] = gain - of_purifier(number, "p")
        scores += [
            Score(attack="a", metric=METRIC, unit=f"s{number:02}", cell=cell, purifier=name, image="0", value=value)
            for (cell, name), value in cells.items()
        ]
    return scores


def test_differences_are_of_worst_cases_and_paired() -> None:
    """Both lose with the subject's noise; it is the same for both, so it must not widen the interval."""
    noise = np.random.default_rng(0).normal(0, 0.2, 12)
    strong = scored(lambda number, name: (0.9 if name == "none" else 0.5) + noise[number])
    weak = scored(lambda number, name: (0.3 if name == "none" else 0.6) + noise[number])
    tables = [build_tables(scores, [QUESTION])[0] for scores in (strong, weak)]
    held = differences((strong, weak), (tables[0], tables[1]))
    found = held.intervals
    assert held.reason == ""
    gain = float(np.mean([1 + number / 100 for number in range(12)]))
    assert found["none"].value == pytest.approx(0.6 / gain)
    assert found["p"].value == pytest.approx(-0.1 / gain)
    assert found[WORST].value == pytest.approx(0.2 / gain)  # 0.5 after p, less 0.3 without
    low, high = found[WORST].low, found[WORST].high
    assert low is not None
    assert high is not None
    assert low <= found[WORST].value <= high
    assert high - low < 0.02
    for table, value in zip(tables, (0.5, 0.3), strict=True):  # the same figures as the tables'
        summary = table.summary
        assert summary is not None
        assert summary.worst_effect is not None
        assert summary.worst_effect.value == pytest.approx((value + noise.mean()) / gain)
    reverse = differences((weak, strong), (tables[1], tables[0]))
    assert reverse.intervals[WORST].value == pytest.approx(-found[WORST].value)


def test_a_purifier_that_does_not_count_is_in_no_difference() -> None:
    strong, weak = scored(lambda number, name: 0.9), scored(lambda number, name: 0.3)
    table = build_tables(strong, [QUESTION])[0]
    ruined = replace(table, rows=[replace(row, state=State.INVALID) if row.purifier == "p" else row
                                  for row in table.rows])  # fmt: skip
    found = differences((strong, weak), (table, ruined))
    assert found.intervals.keys() == {"none"}  # the worst of two is not the worst of one
    assert found.reason == "not the same purifiers count for both"


def test_there_is_no_difference_where_there_is_no_effect(found: Findings) -> None:
    """After the purifier the attacker's gain has either sign, so its share is any number, or none."""

    def swaying(score: Score) -> Score:
        return replace(score, value=3.5 if int(score.unit[1:]) % 2 else -2.0)

    sides = []
    for left in (0.9, 0.3):
        scores = scored(lambda number, name, left=left: left)  # type: ignore[misc]
        sides.append([swaying(item) if item.cell is Cell.PURIFIED else item for item in scores])
    tables = [build_tables(scores, [QUESTION])[0] for scores in sides]
    assert [(row.purifier, row.state, row.effect is None) for row in tables[0].rows] == [
        ("none", State.MEASURED, False),
        ("p", State.MEASURED, True),
    ]
    held = differences((sides[0], sides[1]), (tables[0], tables[1]))
    assert held.intervals.keys() == {"none"}
    assert held.intervals["none"].value == pytest.approx(0.6 / np.mean([1 + number / 100 for number in range(12)]))
    assert held.reason == "one of the two has no worst case (no effect: p)"
    row = replace(found.rows[0], tables={"dreambooth": tables[0]}, differences={"dreambooth": held})
    notes = report.notes(replace(found, rows=[row]), found.comparison.attacks[0])
    assert "no effect after p: what the attack gains on clean photos is not surely above zero" in notes
    assert "no worst case: no effect: p" in notes
    assert f"no difference of worst cases: {held.reason}" in notes


def weak_table() -> tuple[list[Score], Table]:
    """An attack that gains a tenth of what there is; protection stops most of it."""
    scores = [
        replace(item, value=10.0) if item.cell is Cell.CEILING else item for item in scored(lambda number, name: 0.8)
    ]
    return scores, build_tables(scores, [QUESTION])[0]


def test_a_weak_attack_is_marked(found: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, weak = weak_table()
    strong = build_tables(scored(lambda number, name: 0.8), [QUESTION])[0]
    assert differences((scores, scores), (weak, weak)).intervals == {}
    named = [
        replace(table, rows=[table.rows[0], replace(table.rows[1], purifier="jpeg75")]) for table in (strong, weak)
    ]
    rows = [replace(row, tables={"dreambooth": table}) for row, table in zip(found.rows, named, strict=True)]
    marked = replace(found, rows=rows, comparison=replace(found.comparison, attacks=found.comparison.attacks[:1]))
    cells = [line[-2] for line in report.lines(marked, found.comparison.attacks[0])]
    assert [cell.endswith("] (attack too weak)") for cell in cells] == [False, True]
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    pictures.plot(marked, tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [point.get_markerfacecolor() == "none" for point in points] == [False, True]
    assert "hollow" in axes.get_title()


# --- What is written


def test_every_number_is_written(found: Findings) -> None:
    document = json.loads(json.dumps(report.document(found), allow_nan=False))
    assert [method["label"] for method in document["methods"]] == ["noise", "noise@96"]
    assert document["methods"][1]["config"] == {"eps_levels": 96.0}
    assert document["settings"]["purifiers"] == ["jpeg75"]
    assert document["subjects"].keys() == {"cup", "rex"}
    assert document["methods"][1]["photos"]["rex"]["linf_levels"] == [96, 96]
    rows = list(csv.DictReader(io.StringIO(report.flat(found))))
    names = [(row["method"], row["attack"], row["purifier"]) for row in rows]
    expected = [
        (method, attack, purifier)
        for method in ("noise", "noise@96")
        for attack in ("dreambooth", "sdedit-0.3-quick")
        for purifier in ("none", "jpeg75", "worst")
    ]
    assert names == expected
    assert all(row["n"] == "2" for row in rows)
    first = found.rows[1].tables["dreambooth"].rows[0]
    assert float(rows[6]["protected"]) == first.protected
    assert document["attacks"]["dreambooth"]["parameters"]["steps"] == 2
    assert document["attacks"]["sdedit-0.3-quick"]["parameters"]["strength"] == 0.3
    assert "noise of 8 levels" in document["attacks"]["sdedit-0.3-quick"]["measure"]
    assert document["purifiers"]["jpeg75"]["quality"] == 75
    assert len(document["embedder"]["digest"]) == 64
    text = report.markdown(found)
    assert "with fewer than 10 subjects nothing is claimed" in text
    assert text.count("\n| noise@96 |") == 2
    assert "less that of noise" in text


def test_pictures_show_every_method(found: Findings, done: tuple[Comparison, Results, Told], tmp_path: Path) -> None:
    pictures.sheet(found, done[1], tmp_path / "sheet.png")
    pictures.plot(found, tmp_path / "plot.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    columns = 3 + 4 + 3  # of pixels, customizer and editor
    assert sheet.shape[1] // (pictures._CELL + pictures._GAP) == columns
    original = done[0].subjects[0].train[0]
    left, top = pictures._LABEL, pictures._TITLE
    shown = Image.fromarray(sheet[top : top + pictures._CELL, left : left + pictures._CELL]).resize((SIDE, SIDE))
    assert np.abs(np.asarray(shown).astype(int) - original).mean() < 12
    assert len(np.unique(sheet[top : top + pictures._CELL, -pictures._CELL :])) > 10  # nothing is left white
    assert Image.open(tmp_path / "plot.png").width > 800

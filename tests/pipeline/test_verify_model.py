"""Verification of protected models, on a tiny base.

1. A model's concepts are found by the hashes of its provenance; what does not belong together is refused.
2. Each row differs from the centre in one thing; trials of the base are shared, and named by all that decides them.
3. What is stored is not done again, unless it failed; a failure is told and leaves the other rows alone.
4. A model that is the base prevents nothing, keeps everything and costs nothing, exactly.
5. Shares, intervals and differences are those of the numbers; where the base gains nothing, nothing is claimed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import FatalWorkerError, UserError
from pipeline.verify.customizers.dreambooth import DreamBooth
from pipeline.verify.scores import Cell, Score
from pipeline.verify.tables import State
from pipeline.verify_model import report
from pipeline.verify_model.files import write_files
from pipeline.verify_model.plan import VerificationPlan, plan_verification
from pipeline.verify_model.results import NO_GAIN, CaseResult, Findings, RowResult, difference, gather, summarize
from pipeline.verify_model.run import run_verification
from pipeline.verify_model.store import Results
from pipeline.verify_model.tasks import Customization, Kind
from pipeline.verify_model.utility_results import drawn_result, loss_result
from tests.pipeline.archives import photo, write_parquet
from tests.pipeline.model_verifications import SIDE, SUBJECTS, protected, settings, world

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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, ``same`` (the base) and ``other`` (the base with noise) on rex, ``cat`` on zoe."""
    made = world(tmp_path_factory.mktemp("world"))
    protected(made, "same", ["rex"])
    protected(made, "other", ["rex"], noise=0.3)
    protected(made, "cat", ["zoe"], noise=0.3)
    return made


@pytest.fixture(scope="module")
def plan(folder: Path) -> VerificationPlan:
    return plan_verification(settings(folder, folder / "same", others=1, held_out=folder / "held-out.parquet"))


@pytest.fixture(scope="module")
def done(plan: VerificationPlan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Told]:
    results, told = Results(tmp_path_factory.mktemp("results")), Told()
    assert run_verification(plan, results, told, workers=1) == {}
    return results, told


@pytest.fixture(scope="module")
def found(plan: VerificationPlan, done: tuple[Results, Told]) -> Findings:
    return gather(plan, done[0], {})


# --- What is verified


def test_photos_are_seen_or_unseen_by_their_hashes(folder: Path) -> None:
    given = settings(folder, folder / "same", sets=("seen", "unseen", "flipped", "blurred"))
    cases = {case.row.images: case for case in plan_verification(given).cases}
    rex = cases["seen"].subject
    assert (rex.name, len(rex.photos)) == ("rex", 3)
    sides = {name: (case.train, case.references) for name, case in cases.items()}
    assert sides == {"seen": ((0, 1), (2,)), "unseen": ((2,), (0, 1)), "flipped": ((0, 1), (2,)),
                     "blurred": ((0, 1), (2,))}  # fmt: skip
    seen, flipped, blurred = (cases[name].base.train for name in ("seen", "flipped", "blurred"))
    np.testing.assert_array_equal(seen[1], rex.photos[1])
    np.testing.assert_array_equal(flipped[1], rex.photos[1][:, ::-1])
    assert np.abs(np.diff(blurred[1].astype(int), axis=0)).sum() < np.abs(np.diff(seen[1].astype(int), axis=0)).sum()
    for case in cases.values():
        assert len(case.base.references) == len(case.references)
        for one, other in zip(case.base.train, case.attacked.train, strict=True):
            np.testing.assert_array_equal(one, other)
        overlap = report.image_sets(case)["overlap"]
        assert overlap == {
            "protection_and_attack": 0 if case.row.images == "unseen" else 2,
            "protection_and_references": 2 if case.row.images == "unseen" else 0,
            "attack_and_references": 0,
        }


def test_the_seen_photos_need_not_be_the_first(folder: Path) -> None:
    out = protected(folder, "last", ["rex"])
    document = json.loads((out / "provenance.json").read_text())
    digests = plan_verification(settings(folder, out)).protected[0].concepts[0].subject.digests
    document["identity"]["concepts"][0]["images"] = [digests[2], "0" * 64]
    (out / "provenance.json").write_text(json.dumps(document))
    concept = plan_verification(settings(folder, out)).protected[0].concepts[0]
    assert (concept.seen, concept.unseen, concept.missing) == ((2,), (0, 1), 1)


def spoilt(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """A protected model with another provenance."""
    out = protected(folder, name, ["rex"])
    document = json.loads((out / "provenance.json").read_text())
    change(document)
    (out / "provenance.json").write_text(json.dumps(document))
    return out


def test_what_does_not_belong_together_is_refused(folder: Path) -> None:
    digests = plan_verification(settings(folder, folder / "same")).protected[0].concepts[0].subject.digests
    ned = plan_verification(settings(folder, protected(folder, "ned", ["ned"]))).protected[0].concepts[0].subject

    def concept(*images: str) -> Callable[[dict[str, Any]], None]:
        return lambda document: document["identity"]["concepts"][0].update(images=list(images))

    refused = {
        "base": (lambda document: document["identity"].update(base="f" * 64), "made from a model with digest ffffffff"),
        "weights": (lambda document: document["weights"].update(digest="0" * 64), "changed since"),
        "nobody": (concept("0" * 64), "none of them is in --photos"),
        "two": (concept(digests[0], ned.digests[0]), "1 of ned, 1 of rex"),
        "all": (concept(*digests), "every photo of rex"),
        "form": (lambda document: document.pop("weights"), "not the provenance"),
    }
    for name, (change, words) in refused.items():
        with pytest.raises(UserError, match=words):
            plan_verification(settings(folder, spoilt(folder, f"bad-{name}", change)))
    with pytest.raises(UserError, match="protect-model"):
        plan_verification(settings(folder, folder / "model"))
    with pytest.raises(UserError, match="name a folder"):
        plan_verification(settings(folder))


def test_labels_are_methods(folder: Path) -> None:
    plan = plan_verification(settings(folder, folder / "same", f"mine={folder / 'other'}", f"mine={folder / 'cat'}"))
    assert [(model.label, model.concepts[0].subject.name) for model in plan.protected] == [
        ("apdm fast", "rex"), ("mine", "rex"), ("mine", "zoe"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="both 'apdm fast' on rex"):
        plan_verification(settings(folder, folder / "same", folder / "other"))
    longer = protected(folder, "longer", ["zoe"], config={"steps": 5})
    with pytest.raises(UserError, match=r"config.steps: 4 -> 5.*LABEL=FOLDER"):
        plan_verification(settings(folder, folder / "same", longer))
    assert plan_verification(settings(folder, folder / "same", f"longer={longer}")).labels == ["apdm fast", "longer"]


def test_rows_differ_from_the_centre_in_one_thing(folder: Path) -> None:
    given = settings(
        folder,
        folder / "same",
        sets=("unseen", "seen"),
        identifiers=("ktn", "sks"),
        attacks=("dreambooth:quick", "textual-inversion"),
        others=1,
        overrides={"steps": 2},
    )
    rows = plan_verification(given).rows
    assert [row.title for row in rows] == [
        "dreambooth:quick, unseen, ktn",
        "dreambooth:quick, seen, ktn",
        "dreambooth:quick, unseen, sks",
        "textual-inversion:quick, unseen, <subject>",
        "dreambooth:quick, others of its class, ktn",
        "dreambooth:quick, others of other classes, ktn",
    ]
    assert isinstance(rows[0].customizer, DreamBooth)
    assert (rows[0].customizer.identifier, rows[0].customizer.steps) == ("ktn", 2)
    with pytest.raises(UserError, match="textual-inversion learns a word of its own"):
        plan_verification(replace(given, attacks=("textual-inversion",)))
    with pytest.raises(UserError, match=r"--sets mirrored: there are seen, unseen"):
        plan_verification(replace(given, sets=("mirrored",)))
    with pytest.raises(UserError, match="asked for twice"):
        plan_verification(replace(given, sets=("seen", "seen")))


def test_others_are_of_either_kind_and_never_protected(folder: Path) -> None:
    both = protected(folder, "both", ["rex", "ace"])
    plan = plan_verification(settings(folder, both, others=2))
    tried = {(case.concept.subject.name, case.row.kind): [] for case in plan.cases}
    for case in plan.cases:
        tried[case.concept.subject.name, case.row.kind].append(case.subject.name)
        assert set(case.train).isdisjoint(case.references)
    for concept in ("ace", "rex"):
        assert tried[concept, Kind.CONCEPT] == [concept]
        assert tried[concept, Kind.SAME_CLASS] == ["ned"]
        assert tried[concept, Kind.OTHER_CLASS] == ["cup", "zoe"]
    assert all(case.base.class_word == SUBJECTS[case.subject.name] for case in plan.cases)


# --- What is run


def test_names_follow_from_what_decides(folder: Path) -> None:
    def keys(*models: Path | str, **changes: Any) -> set[str]:
        return {task.key for task in plan_verification(settings(folder, *models, **changes)).tasks()}

    same, other = keys(folder / "same"), keys(f"mine={folder / 'other'}")
    # The base's floor, customization and both drawings.
    assert (len(same), len(same & other)) == (7, 4)
    assert keys(folder / "same", f"mine={folder / 'other'}") == same | other
    flipped = keys(folder / "same", sets=("seen", "flipped"))
    assert (same < flipped, len(flipped - same)) == (True, 2)  # floors are shared
    for change in ({"seed": 1}, {"generated": 3}):
        assert len(keys(folder / "same", **change) & same) == (0 if "seed" in change else 3)
    assert len(keys(folder / "same", overrides={"steps": 3, "sampling": {"steps": 2}}) - same) == 2
    plan = plan_verification(settings(folder, folder / "same", f"mine={folder / 'other'}", others=1))
    digests = [task.model.digest for task in plan.tasks()]
    changes = sum(one != other for one, other in pairwise(digests))
    assert (len(set(digests)), changes) == (3, 2)  # model by model


def test_a_second_run_does_nothing(plan: VerificationPlan, done: tuple[Results, Told]) -> None:
    results, first = done
    # Three subjects, four trials each; losses of two models; drawings of the base twice.
    assert (first.steps, first.advanced) == ([("attack", 17, 0)], 17)
    told = Told()
    assert run_verification(plan, results, told, workers=1) == {}
    assert (told.steps, told.advanced) == ([("attack", 17, 17)], 0)
    assert {task.key for task in plan.tasks()} == results.finished()
    assert all(results.seconds(task.key) >= 0 for task in plan.tasks())


@pytest.mark.slow
def test_numbers_are_equal_on_two_workers(plan: VerificationPlan, found: Findings, tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert run_verification(plan, results, Told(), workers=2) == {}
    assert report.lines(gather(plan, results, {})) == report.lines(found)


def test_a_model_that_is_the_base_protects_nothing_and_costs_nothing(found: Findings) -> None:
    assert found.plan.base.digest != found.plan.protected[0].model.digest
    for row in found.rows:
        assert len(row.cases) == 1
        np.testing.assert_array_equal(row.cases[0].values[:, 0], row.cases[0].values[:, 1])
        np.testing.assert_array_equal(row.cases[0].values[:, 2], row.cases[0].values[:, 3])
        if row.share is not None:
            assert row.share.value == (0 if row.row.kind is Kind.CONCEPT else 1)
    assert any(row.share is not None for row in found.rows)
    (utility,) = found.utility
    assert utility.loss is not None
    assert (utility.loss.ratio.value, utility.loss.photos, utility.loss.met) == (1, 4, True)
    assert utility.drawn is not None
    assert utility.drawn.cosine.value == pytest.approx(1)
    assert utility.drawn.control.value < 0.999
    assert utility.drawn.kid is not None
    assert utility.drawn.kid == utility.drawn.kid_control


def test_files_hold_every_number(found: Findings, done: tuple[Results, Told], plan: VerificationPlan) -> None:
    results = done[0]
    names = write_files(found, results)
    assert names == ["verification.json", "verification.md", "verification.png", "sheet.png"]
    document = json.loads((results.folder / "verification.json").read_text())
    assert document["base"]["digest"] == plan.base.digest
    assert document["protected"][0]["concepts"][0]["protected_on"] == list(plan.cases[0].subject.digests[:2])
    assert [row["row"] for row in document["rows"]] == [row.title for row in plan.rows]
    case = document["rows"][0]["cases"][0]
    assert len(case["values"]["protected"]) == 2
    assert case["images"]["overlap"]["attack_and_references"] == 0
    assert document["rows"][0]["attack"]["identifier"] == "sks"
    assert report.set_lines(found)[:2] == [
        ["seen", "rex", "2", "2", "1", "0", "0"],
        ["others of its class", "ace", "2", "0", "1", "0", "0"],
    ]
    text = (results.folder / "verification.md").read_text()
    for words in ("prevented", "others of its class", "over pictures of one attack"):
        assert words in text
    with Image.open(results.folder / "sheet.png") as sheet:
        assert sheet.size[0] > 3 * sheet.size[1]


def failing(error: Exception) -> Callable[..., None]:
    """Raises it, whatever it is given."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_a_failed_trial_is_told_and_run_again(
    plan: VerificationPlan, done: tuple[Results, Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, other = done[0], Results(tmp_path)
    lost = {
        plan.cases[0].attacked.key,
        plan.utility[0].tasks[1].key,
    }  # C of the concept, and the protected model's loss
    for prefix in ("trials/", "values/", "pictures/"):
        for item in results.store.list(prefix):
            if not any(key in item.key for key in lost):
                other.store.put_new(item.key, results.store.get(item.key))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.verify.trial.sample", failing(RuntimeError("out of memory")))
        with pytest.raises(FatalWorkerError, match="run the same command"):
            run_verification(plan, other, Told(), workers=1)
        patch.setattr("pipeline.verify.trial.sample", failing(ValueError("no such shape")))
        patch.setattr("pipeline.verify_model.bench.held_out_errors", failing(ValueError("no photo")))
        failed = run_verification(plan, other, Told(), workers=1)
    assert failed == dict.fromkeys(lost, "") | {
        plan.cases[0].attacked.key: "ValueError: no such shape",
        plan.utility[0].tasks[1].key: "ValueError: no photo",
    }
    found = gather(plan, other, failed)
    concept, same, _ = found.rows
    told = f"dreambooth of rex, model {plan.protected[0].model.digest[:8]}: ValueError: no such shape"
    assert (concept.state, concept.share, concept.errors) == (State.ERROR, None, [told])
    assert same.state is not State.ERROR
    assert found.utility[0].loss is None
    assert len(found.failed_trials) == 2
    verdicts = "\n".join(report.verdicts(found))
    assert f"not judged: {told}" in verdicts
    assert "costs without what failed: " in verdicts
    assert "ValueError: no photo" in verdicts
    assert "no such shape" in report.markdown(found)
    assert write_files(found, other)  # what is missing in the sheet is left blank
    again = Told()
    assert run_verification(plan, other, again, workers=1) == {}
    assert again.steps == [("attack", 17, 15)]
    assert gather(plan, other, {}).rows[0].cases[0].means == gather(plan, results, {}).rows[0].cases[0].means


# --- Numbers


def case_of(plan: VerificationPlan, row: int, label: str, base: float, left: float, spread: float = 0.02) -> CaseResult:
    """Five pictures around these similarities; the floor is 0.4."""
    case = next(case for case in plan.cases if case.row is plan.rows[row] and case.protected.label == label)
    around = np.linspace(-spread, spread, 5)
    columns = [base + around, left + around[::-1], 0.4 + around, np.full(5, 0.3)]
    return CaseResult(case=case, values=np.stack(columns, axis=1), ceiling=0.9)


def test_shares_are_those_of_the_means(plan: VerificationPlan) -> None:
    row = summarize(plan.rows[0], "apdm fast", [case_of(plan, 0, "apdm fast", 0.8, 0.5)])
    assert row.gain is not None
    assert row.share is not None
    assert (row.gain.value, row.share.value, row.units) == (pytest.approx(0.4), pytest.approx(0.75), 5)
    assert row.share.low is not None
    assert row.share.high is not None
    assert row.share.low < 0.75 < row.share.high
    assert (row.state, row.met, row.means["own_floor"]) == (State.MEASURED, True, pytest.approx(0.3))
    weak = summarize(plan.rows[0], "apdm fast", [case_of(plan, 0, "apdm fast", 0.8, 0.7)])
    assert (weak.share is not None and weak.share.value, weak.met) == (pytest.approx(0.25), False)
    # More than half, but not surely above zero.
    noisy = summarize(plan.rows[0], "apdm fast", [case_of(plan, 0, "apdm fast", 0.8, 0.55, spread=0.6)])
    assert noisy.share is not None
    assert noisy.share.low is not None
    assert (noisy.share.value, noisy.share.low < 0, noisy.met) == (pytest.approx(0.625), True, False)
    others = summarize(plan.rows[1], "apdm fast", [case_of(plan, 1, "apdm fast", 0.8, 0.7)])
    assert (others.what, others.share is not None and others.share.value, others.met) == (
        "kept", pytest.approx(0.75), False,
    )  # fmt: skip


def test_without_a_gain_nothing_is_claimed(plan: VerificationPlan, found: Findings) -> None:
    row = summarize(plan.rows[0], "apdm fast", [case_of(plan, 0, "apdm fast", 0.4, 0.1)])
    assert (row.state, row.reason, row.share, row.met) == (State.INVALID, NO_GAIN, None, None)
    told = replace(found, rows=[row])
    assert "measures nothing" in report.lines(told)[0]
    assert [line for line in report.verdicts(told) if "not judged" in line and NO_GAIN in line]


def test_with_several_concepts_the_concept_is_the_unit(folder: Path) -> None:
    given = settings(folder, f"a={folder / 'other'}", f"a={folder / 'cat'}", f"b={folder / 'same'}")
    plan = plan_verification(given)
    rex, zoe = (
        replace(case_of(plan, 0, "a", *means), case=case)
        for means, case in zip(
            [(0.8, 0.4), (0.8, 0.6)], [c for c in plan.cases if c.protected.label == "a"], strict=True
        )
    )
    both = summarize(plan.rows[0], "a", [rex, zoe])
    assert both.share is not None
    assert (both.units, both.images, both.unit) == (2, 10, "concepts, and pictures of one attack each in them")
    assert both.share.value == pytest.approx(0.75)
    # Either concept may be drawn twice.
    assert both.share.low is not None
    assert both.share.high is not None
    assert both.share.low == pytest.approx(0.5, abs=0.06)
    assert both.share.high == pytest.approx(1, abs=0.06)
    held = summarize(plan.rows[0], "b", [case_of(plan, 0, "b", 0.8, 0.7)])
    found = difference(both, held)  # over rex alone
    assert found.interval is not None
    assert (found.interval.value, found.units) == (pytest.approx(0.75), 5)
    none = difference(both, summarize(plan.rows[0], "b", [case_of(plan, 0, "b", 0.4, 0.4)]))
    assert (none.interval, none.reason) == (None, "one of the two has no number")


class Scored:
    """Stands for results: five pictures per trial, whose similarities follow from the trial's name."""

    def __init__(self, plan: VerificationPlan) -> None:
        self._tasks = {task.key: task for task in plan.tasks() if isinstance(task, Customization)}

    def scores(self, key: str) -> list[Score]:
        task, random = self._tasks[key], np.random.default_rng(int(key[:8], 16))
        cell, height = (Cell.FLOOR, 0.2) if task.floor else (Cell.CLEAN, 0.7)
        values = [(one, number, height) for one in (cell, Cell.CEILING) for number in range(5)]
        return [
            Score(attack="dreambooth", metric="likeness", unit=task.subject, cell=one, image=str(number),
                  value=float(mean + 0.05 * random.normal()))
            for one, number, mean in values
        ]  # fmt: skip


def test_others_of_one_model_count_once_and_are_the_units(folder: Path) -> None:
    """Both concepts of a model have the same other subjects, whose trainings are the same trials."""
    both = protected(folder, "joint", ["rex", "ace"])
    plan = plan_verification(settings(folder, both, others=2, drawn=0))
    concept, same, other = gather(plan, Scored(plan), {}).rows  # type: ignore[arg-type]
    assert (concept.unit, concept.units) == ("concepts, and pictures of one attack each in them", 2)
    assert [case.case.subject.name for case in same.cases] == ["ned"]
    assert (same.unit, same.units, same.images) == ("pictures of one attack each", 5, 5)
    assert [case.case.subject.name for case in other.cases] == ["cup", "zoe"]
    assert (other.unit, other.units) == ("other subjects, and pictures of one attack each in them", 2)
    assert other.images == 10


def test_several_models_are_the_units_of_what_is_kept(folder: Path) -> None:
    plan = plan_verification(settings(folder, f"a={folder / 'other'}", f"a={folder / 'cat'}", others=2, drawn=0))
    found = gather(plan, Scored(plan), {})  # type: ignore[arg-type]
    _, same, other = found.rows
    assert (other.unit, other.units) == ("models, and pictures of one attack each in them", 2)
    assert [len(row.cases) for row in (same, other)] == [2, 4]
    notes = "\n".join(report.notes(found))
    # There is one cat; both models were taught the cup.
    assert "others of its class, sks: --photos has no such subject for the model of zoe" in notes
    assert "others of other classes, sks: several models were taught the same subjects" in notes
    assert "others of its class, sks: several models" not in notes


def test_an_attack_can_be_made_several_times(folder: Path) -> None:
    """Every one has a seed of its own; of one concept alone the attacks are what is resampled."""
    given = settings(folder, f"a={folder / 'other'}", f"b={folder / 'same'}", others=1, drawn=0)
    once, plan = plan_verification(given), plan_verification(replace(given, trainings=3))
    assert {task.key for task in once.tasks()} < {task.key for task in plan.tasks()}
    assert len({case.attacked.key for case in plan.cases}) == 3 * len({case.attacked.key for case in once.cases})
    assert {case.attacked.attack.seed for case in plan.cases} == {0, 1, 2}
    found = gather(plan, Scored(plan), {}, against="b")  # type: ignore[arg-type]
    concept = found.rows[0]
    assert (concept.unit, concept.units, concept.images) == ("attacks, and pictures of one attack each in them", 3, 15)
    assert report.lines(found)[0][-1] == "1 subject, 3 attacks, 15 images"
    assert (found.differences[0].unit, found.differences[0].units) == (concept.unit, 3)
    both = plan_verification(replace(given, protected=(f"a={folder / 'other'}", f"a={folder / 'cat'}"), trainings=2))
    row = gather(both, Scored(both), {}).rows[0]  # type: ignore[arg-type]
    assert (row.unit, row.units, row.images) == ("concepts, and pictures of one attack each in them", 2, 20)


def test_a_row_tells_what_it_was_judged_without(folder: Path) -> None:
    plan = plan_verification(settings(folder, f"a={folder / 'other'}", f"a={folder / 'cat'}", drawn=0))
    found = gather(plan, Scored(plan), {plan.cases[1].attacked.key: "ValueError: no such shape"})  # type: ignore[arg-type]
    assert (found.rows[0].state, len(found.rows[0].cases)) == (State.MEASURED, 1)
    assert report.lines(found)[0][-1] == "1 subject, 5 images, 1 failed"
    digest = plan.cases[1].protected.model.digest[:8]
    assert f"without what failed: dreambooth of zoe, model {digest}: ValueError" in "\n".join(report.verdicts(found))


def test_costs_are_paired() -> None:
    random = np.random.default_rng(0)
    base = random.uniform(0.1, 0.3, 40)
    loss = loss_result([np.stack([base, base * 1.1], axis=1)])
    assert (loss.ratio.value, loss.ratio.low, loss.ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert (loss.met, loss.photos, loss.unit) == (False, 40, "photos")


def test_a_model_that_draws_as_the_base_is_at_no_distance() -> None:
    """Over many draws: images of one prompt are alike, and both sides come in the same order of prompts."""
    prompts, count, repeats = 8, 16, 40
    random = np.random.default_rng(0)
    centres = 3 * random.normal(size=(prompts, 1, 8))

    def draw(shift: float = 0.0) -> np.ndarray:
        values = (centres + random.normal(size=(prompts, count, 8)) + shift).reshape(-1, 8)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    found = [drawn_result([[first, draw(), first]], count) for first in (draw() for _ in range(repeats))]
    controls = [one.kid_control.value for one in found if one.kid_control is not None]
    assert len(controls) == repeats
    assert abs(np.mean(controls)) < 3 * np.std(controls) / np.sqrt(repeats)
    assert all(one.kid == one.kid_control for one in found)
    assert all(one.cosine.value == pytest.approx(1) for one in found)
    assert (found[0].prompts, found[0].images, found[0].kid_unit) == (prompts, prompts * count, "prompts")
    first = draw()
    moved = drawn_result([[first, draw(), draw(shift=1.0)]], count)
    assert moved.kid is not None
    assert moved.kid.low is not None
    assert moved.kid.low > 10 * np.std(controls)


def test_photos_must_be_of_one_class(folder: Path, tmp_path: Path) -> None:
    columns = {"asset_id": ["a", "b"], "subject": ["rex", "rex"], "subject_class": ["dog", "cat"]}
    file = write_parquet(tmp_path / "odd.parquet", [photo(1, side=SIDE), photo(2, side=SIDE)], columns)
    with pytest.raises(UserError, match=r"subject_class of 'rex' must be one word"):
        plan_verification(settings(folder, folder / "same", photos=file))


def test_trials_hold_the_model_that_they_are_about(plan: VerificationPlan) -> None:
    for case in plan.cases:
        assert [task.model for task in case.tasks] == [plan.base] * 2 + [case.protected.model] * 2
        trained = [task for task in case.tasks if isinstance(task, Customization) and not task.floor]
        assert trained[0].attack.seed == trained[1].attack.seed
        assert trained[0].subject == trained[1].subject


def test_rows_without_such_a_subject_are_not_run(folder: Path) -> None:
    plan = plan_verification(settings(folder, f"a={folder / 'cat'}", others=1))
    assert not [case for case in plan.cases if case.row.kind is Kind.SAME_CLASS]
    row: RowResult = summarize(plan.rows[1], "a", [])
    assert (row.state, row.reason) == (State.NOT_RUN, "there is no such subject")

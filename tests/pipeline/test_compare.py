"""Comparisons of methods, on a tiny model.

1. Every method meets the same attacks on the same subjects; cells on clean photos are run once for all of them.
2. A result is stored under a name that follows from all that decides it: what is stored is not done again, further
   methods, purifiers and subjects add to it, and whatever else is changed makes new results.
3. A method that fails is a row with its reason; the others have their numbers.
4. Effects and differences are those of the four cells, paired by subject.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.compare import pictures, report
from pipeline.compare.methods import MethodSpec, check_label, parse_methods, read_methods
from pipeline.compare.plan import Comparison, PlannedCustomization, PlannedEdit, Settings, plan_comparison
from pipeline.compare.results import WORST, Findings, differences, gather
from pipeline.compare.run import run_comparison
from pipeline.compare.store import Results
from pipeline.errors import UserError
from pipeline.verify.cells import build_tables
from pipeline.verify.scores import NO_PURIFIER, Cell, Score
from pipeline.verify.tables import State
from pipeline.verify.trial import METRIC
from pipeline.verify.trials import QUESTION
from protectors.noise import Noise
from tests.e2e.command import FAKE
from tests.pipeline.archives import photo, write_parquet
from tests.protectors.tiny import save_tiny_model

SIDE = 32
QUICK = {"steps": 2, "batch": 1, "prior_images": 2, "bf16": False, "sampling": {"steps": 2}}
SUBJECTS = {"cup": "mug", "rex": "dog", "zoe": "cat"}

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


def write_subjects(file: Path) -> Path:
    """Three photos of each of three subjects; the first photo of "rex" bears FakeProtector's marker 7."""
    rows = [(name, number) for name in SUBJECTS for number in range(3)]
    data = [photo(place, side=SIDE, marker=7 if row == ("rex", 0) else None) for place, row in enumerate(rows)]
    names = [name for name, _ in rows]
    columns = {
        "asset_id": [f"{name}-{number}" for name, number in rows],
        "subject": names,
        "subject_class": [SUBJECTS[name] for name in names],
    }
    return write_parquet(file, data, columns)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("compare")
    config = save_tiny_model(folder / "model") / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": SIDE // 2}))
    model = {"latent": str(folder / "model")}
    return Settings(
        methods=tuple(parse_methods("noise,noise@96")),
        photos=write_subjects(folder / "subjects.parquet"),
        subjects=2,
        purifiers=("jpeg75",),
        attacks=("dreambooth", "sdedit-0.3-quick"),
        overrides=QUICK,
        generated=2,
        surrogates=model,
        models=model,
    )


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


# --- Names of results


def keys(settings: Settings) -> tuple[set[str], set[str]]:
    comparison = plan_comparison(settings)
    protections = comparison.protections()
    return {item.key for item in protections}, {trial.key for trial in comparison.trials(protections)}


def test_more_of_the_same_keeps_what_is_stored(settings: Settings) -> None:
    base = replace(settings, attacks=("dreambooth",))
    protections, trials = keys(base)
    for change in (
        {"methods": (*base.methods, *parse_methods("noise@4"))},
        {"subjects": 3},
        {"subjects": ("rex", "cup")},
        {"purifiers": ("median", "jpeg75")},
        {"attacks": ("dreambooth", "sdedit-0.3-quick")},
        {"edit_prompt": "a drawing"},
        {"models": {**base.models, "pixel": "nano-ddpm"}},
    ):
        more_protections, more_trials = keys(replace(base, **change))  # type: ignore[arg-type]
        assert protections <= more_protections, change
        assert trials <= more_trials, change


CHANGES: list[tuple[str, Mapping[str, Any], bool]] = [
    ("eps_levels", {"methods": tuple(parse_methods("noise@7,noise@95"))}, True),
    ("train", {"train": 1}, True),
    ("seed", {"seed": 1}, True),
    ("generated", {"generated": 3}, False),
    ("overrides", {"overrides": {**QUICK, "steps": 3}}, False),
    ("attack", {"attacks": ("lora",)}, False),
    ("sampling", {"overrides": {**QUICK, "sampling": {"steps": 3}}}, False),
]


@pytest.mark.parametrize(("name", "change", "of_pixels"), CHANGES, ids=[change[0] for change in CHANGES])
def test_whatever_decides_a_result_names_it(
    name: str, change: Mapping[str, Any], of_pixels: bool, settings: Settings
) -> None:
    base = replace(settings, attacks=("dreambooth",))
    before, after = keys(base), keys(replace(base, **change))
    assert before[0].isdisjoint(after[0]) == of_pixels
    # Cells on clean photos are the same for another method; everything else is new.
    assert len(before[1] & after[1]) == (6 if name == "eps_levels" else 0)


def test_models_photos_and_versions_name_results(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(settings, methods=tuple(parse_methods("photoguard")))
    protections, trials = keys(base)
    other = {"latent": str(save_tiny_model(tmp_path / "other", seed=1))}
    config = tmp_path / "other" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": SIDE // 2}))
    attacked = keys(replace(base, models=other))
    assert attacked[0] == protections
    assert attacked[1].isdisjoint(trials)
    assert keys(replace(base, surrogates=other))[0].isdisjoint(protections)
    with monkeypatch.context() as patch:
        patch.setattr("protectors.photoguard.PhotoGuard.version", "next")
        assert keys(base)[0].isdisjoint(protections)
    rows = write_parquet(
        tmp_path / "p.parquet",
        [photo(place + 1, side=SIDE) for place in range(4)],
        {"asset_id": list("abcd"), "subject": ["cup", "cup", "rex", "rex"], "subject_class": ["mug"] * 4},
    )
    assert keys(replace(base, photos=rows))[1].isdisjoint(trials)


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
    found = differences((strong, weak), (tables[0], tables[1]))
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
    assert reverse[WORST].value == pytest.approx(-found[WORST].value)


def test_a_purifier_that_does_not_count_is_in_no_difference() -> None:
    strong, weak = scored(lambda number, name: 0.9), scored(lambda number, name: 0.3)
    table = build_tables(strong, [QUESTION])[0]
    ruined = replace(table, rows=[replace(row, state=State.INVALID) if row.purifier == "p" else row
                                  for row in table.rows])  # fmt: skip
    found = differences((strong, weak), (table, ruined))
    assert found.keys() == {"none", WORST}


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
    text = report.markdown(found)
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


# --- What may be asked for


def test_methods_are_written_shortly() -> None:
    found = parse_methods(" mist, advdm:paper@4.5 ,noise@96,")
    assert [(spec.label, spec.name, spec.preset, spec.eps_levels) for spec in found] == [
        ("mist", "mist", "fast", None),
        ("advdm:paper@4.5", "advdm", "paper", 4.5),
        ("noise@96", "noise", "fast", 96.0),
    ]
    with pytest.raises(UserError, match="'noise@much': write name"):
        parse_methods("noise@much")


def test_methods_come_from_a_file(tmp_path: Path, settings: Settings) -> None:
    file = tmp_path / "methods.yaml"
    file.write_text("- {name: mist, label: short, overrides: {steps: 7}}\n- {name: noise, eps_levels: 3}\n")
    comparison = plan_comparison(replace(settings, methods=tuple(read_methods(file))))
    short, noise = comparison.methods
    assert (short.label, short.config["steps"], short.config["eps_levels"]) == ("short", 7, 8.0)
    assert (noise.label, noise.config["eps_levels"]) == ("noise", 3.0)
    check_label("short", comparison.methods)
    with pytest.raises(UserError, match="no method 'shirt' in this comparison; it has short"):
        check_label("shirt", comparison.methods)
    for text, words in (
        ("mist", "must hold a list"),
        ("- {nam: mist}", "no such field 'nam'"),
        ("- {label: x}", "without a name"),
        ("- {name: mist, overrides: 3}", "must be a mapping"),
        ("[", "cannot be read as YAML"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            read_methods(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ()}, "nothing to compare"),
        ({"methods": tuple(parse_methods("mits"))}, "did you mean 'mist'"),
        ({"methods": tuple(parse_methods("mist:slow"))}, "no preset 'slow'"),
        ({"methods": tuple(parse_methods("noise@0"))}, "eps_levels"),
        ({"methods": (MethodSpec(label="m", name="mist", overrides={"stepz": 1}),)}, "stepz"),
        ({"methods": tuple(parse_methods("noise,noise"))}, "two methods are called 'noise'"),
        ({"methods": tuple(parse_methods("noise,noise:fast"))}, "'noise' and 'noise:fast' are the same"),
        ({"attacks": ()}, "nothing to attack with"),
        ({"attacks": ("sdedit-quick",)}, "did you mean sdedit"),
        ({"attacks": ("dreambooth:slow",)}, "no preset 'slow'"),
        ({"attacks": ("instruct-pix2pix",)}, "no instruct model given"),
        ({"overrides": {"stepz": 1}}, "stepz"),
        ({"purifiers": ("jpeg-75",)}, "no purifier named 'jpeg-75'"),
        ({"models": {"latent": "/no/such/folder"}}, "/no/such/folder"),
        ({"subjects": ("max",)}, "no subject 'max'; it has cup, rex, zoe"),
        ({"subjects": 0}, "no subjects"),
        ({"photos": Path("/no/such.parquet")}, "--photos"),
    ],
)
def test_what_cannot_work_is_refused_at_once(change: dict[str, Any], words: str, settings: Settings) -> None:
    with pytest.raises(UserError, match=words):
        plan_comparison(replace(settings, **change))

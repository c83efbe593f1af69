"""Customization trials: groups by hash, cells that differ in their images alone, results stored once."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pipeline.errors import FatalWorkerError, UserError
from pipeline.job import Job
from pipeline.plan import Shard
from pipeline.run import prepare
from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.cells import build_tables
from pipeline.verify.customizers.base import Sampling
from pipeline.verify.customizers.dreambooth import DreamBooth
from pipeline.verify.groups import LEAST_LIKENESS, REFERENCES, SMALLEST, TRAIN, Candidate, choose_groups, why_fewer
from pipeline.verify.scores import Cell
from pipeline.verify.specimens import Specimens
from pipeline.verify.trial import Trial, TrialBench, square
from pipeline.verify.trials import (
    QUESTION,
    attack_of,
    prepare_trials,
    store_trial,
    stored_scores,
    stored_tables,
    trials_of,
)
from protectors.model_files import ModelError
from tests.pipeline.archives import photo
from tests.pipeline.local_job import commit, job_config, part_rows, ready
from tests.protectors.tiny import save_tiny_model

SIDE = 32  # half of the tiny model's: attention over a quarter of the tokens


def candidates(count: int, subjects: int | None) -> list[Candidate]:
    return [
        Candidate(
            asset_id=f"a{n}",
            source_sha256=f"{n:064d}",
            protected_sha256=f"p{n}",
            unit_id="u",
            subject=None if subjects is None else f"s{n % subjects}",
            class_word=None if subjects is None else "dog",
        )
        for n in range(count)
    ]


def on_a_circle(wanted: Sequence[Candidate]) -> Tensor:
    angles = torch.tensor([int(item.source_sha256) * 0.1 for item in wanted])
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@given(st.integers(0, 30), st.integers(1, 6), st.integers(0, 4), st.booleans(), st.text(max_size=3))
def test_groups_are_disjoint_deterministic_and_large_enough(
    count: int, subjects: int, wanted: int, named: bool, salt: str
) -> None:
    given_ = candidates(count, subjects if named else None)
    groups = choose_groups(given_, wanted, salt, on_a_circle)
    assert groups == choose_groups(given_[::-1], wanted, salt, on_a_circle)
    assert len(groups) <= wanted
    members = [item.source_sha256 for group in groups for item in group.members]
    assert len(members) == len(set(members))
    for group in groups:
        assert len(group.members) >= SMALLEST
        assert 1 <= len(group.train) <= TRAIN
        assert 1 <= len(group.references) <= REFERENCES
        assert group.class_word == ("dog" if named else "subject")
        if named:
            assert {item.subject for item in group.members} == {group.name}


def test_look_alikes_are_neighbours() -> None:
    (group,) = choose_groups(candidates(40, None), 1, "", on_a_circle)
    places = sorted(int(item.source_sha256) for item in group.members)
    assert places[-1] - places[0] <= 2 * len(places)  # nearest on either side of the anchor


def test_copies_of_training_images_are_no_references() -> None:
    """Ten images of three pictures: whoever trains on a picture must not be judged by another copy of it."""

    def three(wanted: Sequence[Candidate]) -> Tensor:
        pictures = torch.nn.functional.normalize(torch.eye(3) + 1, dim=1)  # look-alikes, at a cosine of 5 / 6
        return pictures[[int(item.source_sha256) % 3 for item in wanted]]

    for salt in "abc":
        (group,) = choose_groups(candidates(10, None), 1, salt, three)
        kinds = [{int(item.source_sha256) % 3 for item in side} for side in (group.train, group.references)]
        assert kinds[0].isdisjoint(kinds[1])


def test_images_that_are_unlike_make_no_group() -> None:
    """Of twelve images four are alike; the others are like nothing, and no count asked for makes groups of them."""

    def four_alike(wanted: Sequence[Candidate]) -> Tensor:
        own = torch.eye(12)[[int(item.source_sha256) for item in wanted]]
        common = torch.tensor([[float(int(item.source_sha256) < 4)] for item in wanted])
        return torch.nn.functional.normalize(torch.cat([own, 2 * common], dim=1), dim=1)  # cosines of 0.8 and 0

    (group,) = choose_groups(candidates(12, None), 3, "", four_alike)
    assert {int(item.source_sha256) for item in group.members} == {0, 1, 2, 3}
    vectors = four_alike(group.members)
    assert float((vectors @ vectors.T).min()) >= LEAST_LIKENESS
    assert choose_groups(candidates(12, None)[4:], 3, "", four_alike) == []
    assert f"look-alikes (cosine of at least {LEAST_LIKENESS}" in why_fewer(candidates(12, None))
    assert "no further subject" in why_fewer(candidates(12, 6))


def test_equal_images_count_once() -> None:
    same = [replace(item, source_sha256="0" * 64) for item in candidates(9, 1)]
    assert choose_groups(same, 1, "", on_a_circle) == []


def small_model(folder: Path) -> Path:
    """The tiny model, told that it was trained at half the size."""
    config = save_tiny_model(folder) / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": SIDE // 2}))
    return folder


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Shard, Any]:
    """A Parquet shard of two subjects, protected and not committed."""
    folder = tmp_path_factory.mktemp("trials")
    (folder / "in").mkdir()
    rows = [
        {"asset_id": f"r{n}", "image": {"bytes": photo(n), "path": None}, "who": f"s{n % 2}", "kind": "dog"}
        for n in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "in" / "a.parquet")
    check = {
        "groups": 2,
        "subject_column": "who",
        "class_column": "kind",
        "customize_after": ["jpeg75"],
        "models": {"latent": str(small_model(folder / "model"))},
    }
    config = job_config(folder / "in", folder / "out", check=check, archive={"unit_assets": 3})
    job, plan = ready(config)
    return job, plan.shards[0], plan


@pytest.fixture(scope="module")
def bench(checked: tuple[Job, Shard, Any]) -> TrialBench:
    attack = replace(attack_of(checked[0]), generated=2)
    bench = TrialBench(attack, AttackModels(attack.models))
    assert isinstance(bench.customizer, DreamBooth)
    bench.customizer = replace(bench.customizer, steps=2, batch=1, prior_images=2, sampling=Sampling(steps=2))
    return bench


def test_trials_hold_the_four_cells_of_every_group(checked: tuple[Job, Shard, Any]) -> None:
    job, shard, _ = checked
    trials = list(prepare_trials(job, shard))
    assert {trial.group for trial in trials} == {"s0", "s1"}
    rows = {row["source_sha256"]: row for row in part_rows(job, shard)}
    stored = [square(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), SIDE) for row in rows.values()]
    for group in ("s0", "s1"):
        own = {(trial.cell, trial.purifier): trial for trial in trials if trial.group == group}
        assert own.keys() == {
            (Cell.FLOOR, "none"),
            (Cell.CLEAN, "none"),
            (Cell.PROTECTED, "none"),
            (Cell.PURIFIED, "jpeg75"),
            (Cell.PURIFIED_PROTECTED, "jpeg75"),
        }
        clean, protected = own[Cell.CLEAN, "none"], own[Cell.PROTECTED, "none"]
        assert len(clean.train) == 3
        assert len(clean.references) == 1
        for left, right in zip(clean.train, protected.train, strict=True):
            assert left.shape == (SIDE, SIDE, 3)
            assert np.abs(left.astype(int) - right.astype(int)).max() > 0
            assert any(np.array_equal(right, image) for image in stored)
            assert not any(np.array_equal(left, image) for image in stored)
        for trial in own.values():  # what is compared with is never protected
            np.testing.assert_array_equal(trial.references[0], clean.references[0])


def test_results_are_stored_once_and_read_back_as_tables(checked: tuple[Job, Shard, Any], bench: TrialBench) -> None:
    job, shard, plan = checked
    results = [bench.run(trial) for trial in prepare_trials(job, shard)]
    for result in results[:-1]:
        store_trial(job.destination(), result)
    (left,) = prepare_trials(job, shard)  # a run that died goes on with what is missing
    assert left.key == results[-1].key
    store_trial(job.destination(), bench.run(left))
    assert list(prepare_trials(job, shard)) == []
    scores = stored_scores(job.destination(), [result.key for result in results])
    assert sorted(map(str, scores)) == sorted(str(score) for result in results for score in result.scores)
    (table,) = stored_tables(job, [shard])
    assert table.units == 2
    assert {row.purifier for row in table.rows} == {"none", "jpeg75"}
    assert table.counts["error"] == 0
    (manifest,) = commit(job, plan)
    assert manifest.verify["customization"] == [json.loads(json.dumps(table.to_dict()))]
    # No picture of a trial is stored: they show the subject.
    assert [item.key for item in job.destination().list(trials_of(shard))] == sorted(result.key for result in results)
    for item in job.destination().list("trials/"):
        assert b"PNG" not in job.destination().get(item.key)


def test_a_trial_repeats_itself_and_cells_share_their_draws(checked: tuple[Job, Shard, Any], bench: TrialBench) -> None:
    trial = one_trial(checked)
    first, again = bench.run(trial), bench.run(trial)
    assert first.scores == again.scores
    assert first.pictures == again.pictures
    # The same images in another cell give the same numbers: nothing but the images tells cells apart.
    other = bench.run(replace(trial, cell=Cell.PROTECTED))
    assert [score.value for score in other.scores] == [score.value for score in first.scores]
    seeded = TrialBench(replace(bench.attack, seed=1), bench.models)
    seeded.customizer = bench.customizer
    assert [score.value for score in seeded.run(trial).scores] != [score.value for score in first.scores]


def one_trial(checked: tuple[Job, Shard, Any]) -> Trial:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(4)]
    return Trial(
        key="trials/x/00/y.json",
        shard_id="x",
        group="g",
        class_word="dog",
        cell=Cell.CLEAN,
        purifier="none",
        train=pictures[:2],
        references=pictures[2:],
    )


@pytest.mark.parametrize("error", [MemoryError("full"), OSError("gone"), ModelError("damaged")])
def test_what_may_pass_is_never_stored_as_a_result(
    checked: tuple[Job, Shard, Any], bench: TrialBench, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("pipeline.verify.trial.sample", fail)
    with pytest.raises(FatalWorkerError, match="run the same command to go on"):
        bench.run(one_trial(checked))


def test_a_subject_in_two_shards_is_one_unit(checked: tuple[Job, Shard, Any], bench: TrialBench) -> None:
    trial = one_trial(checked)
    scores: list[Any] = []
    for shard_id in ("x", "y"):
        for cell in (Cell.FLOOR, Cell.CLEAN, Cell.PROTECTED):
            scores += bench.run(replace(trial, shard_id=shard_id, cell=cell)).scores
    (table,) = build_tables(scores, [QUESTION])
    assert table.units == 1


def test_a_failing_attack_is_an_error_and_no_number(checked: tuple[Job, Shard, Any], bench: TrialBench) -> None:
    trial = one_trial(checked)
    broken = replace(trial, train=[image[:8] for image in trial.train])
    result = bench.run(broken)
    assert len(result.scores) == bench.attack.generated
    assert all(score.value is None and "ValueError" in str(score.error) for score in result.scores)


def test_pictures_that_are_not_finite_are_errors_and_no_black_ones(
    checked: tuple[Job, Shard, Any], bench: TrialBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = torch.full((2, 3, SIDE, SIDE), 0.5)
    pictures[1, 0, 0, 0] = torch.nan
    monkeypatch.setattr("pipeline.verify.trial.sample", lambda *_, **__: pictures)
    result = bench.run(replace(one_trial(checked), cell=Cell.FLOOR))
    assert [score.value for score in result.scores] == [None, None]
    assert all("not finite" in str(score.error) for score in result.scores)


def test_a_purifier_draws_the_same_on_both_sides(checked: tuple[Job, Shard, Any], bench: TrialBench) -> None:
    trial = replace(one_trial(checked), purifier="noise", cell=Cell.PURIFIED)
    left = bench.run(trial)
    right = bench.run(replace(trial, cell=Cell.PURIFIED_PROTECTED))
    assert left.scores[0].value == right.scores[0].value
    plain = bench.run(replace(trial, purifier="none", cell=Cell.CLEAN))
    assert left.scores[0].value != plain.scores[0].value


def test_specimens_are_the_same_before_and_after_the_commit(checked: tuple[Job, Shard, Any]) -> None:
    job, shard, plan = checked
    (manifest,) = commit(job, plan)
    before, after = (
        Specimens(
            destination=job.destination(),
            source=job.source(),
            shard=shard,
            config_fp=job.config_fp,
            manifest=known,
            subject_column="who",
            class_column="kind",
        )
        for known in (None, manifest)
    )
    assert before.candidates() == after.candidates()
    wanted = before.candidates()[2:5]
    assert before.protected(wanted) == after.protected(wanted)
    assert before.originals(wanted) == {item.source_sha256: photo(int(item.asset_id[1:])) for item in wanted}


def test_a_column_that_no_shard_has_is_refused(checked: tuple[Job, Shard, Any], tmp_path: Path) -> None:
    source = checked[0].config.source
    config = job_config(Path(source), tmp_path / "out", check={"groups": 1, "subject_column": "whom"})
    with pytest.raises(UserError, match=r"no shard has the column 'whom'; there are: kind, who"):
        prepare(config)


def test_the_attack_is_on_the_jobs_own_model(checked: tuple[Job, Shard, Any]) -> None:
    attack = attack_of(checked[0])
    assert attack.side == SIDE
    assert attack.models[ModelKind.PIXEL] == "nano-ddpm"

"""Images of one subject go to the method together: within a unit, after a death, in archives that name only some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.fuse import begin
from pipeline.job import Job
from pipeline.plan import Shard
from pipeline.run import open_units, prepare
from protectors.base import Batch
from protectors.fake import FakeProtector
from tests.pipeline.archives import photo, photos, write_folder, write_parquet
from tests.pipeline.local_job import job_config, part_rows, protect_shard


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Sizes of the groups in every batch that the protector gets from now on."""
    seen: list[list[int]] = []
    work = FakeProtector._perturb

    def perturb(protector: FakeProtector, batch: Batch, progress: Any) -> torch.Tensor:
        seen.append(sorted(len(group) for group in batch.groups))
        return work(protector, batch, progress)

    monkeypatch.setattr(FakeProtector, "_perturb", perturb)
    return seen


SUBJECTS = ["cat", "dog", None, "cat", "dog", "cat"]


def with_subjects(tmp_path: Path, **sections: Any) -> tuple[Job, Shard]:
    source = write_parquet(tmp_path / "in.parquet", photos(len(SUBJECTS)), {"who": SUBJECTS})
    job, plan = prepare(job_config(source, tmp_path / "out", method={"subject_column": "who"}, **sections))
    return job, plan.shards[0]


def test_images_of_one_subject_are_protected_together(tmp_path: Path, groups: list[list[int]]) -> None:
    protect_shard(*with_subjects(tmp_path))
    assert groups == [[3], [2], [1]]  # a group is not cut, even where batches hold one image


def test_a_worker_that_died_goes_on_subject_by_subject(tmp_path: Path, groups: list[list[int]]) -> None:
    job, shard = with_subjects(tmp_path, run={"batch_size": 8})
    ((name, _),) = open_units(job.destination(), shard, job.config_fp)[0]
    work = f"attempts/{name}"
    begin(job.destination(), work, job.run_id, max_deaths=9)  # the whole unit
    died = begin(job.destination(), work, job.run_id, max_deaths=9)
    assert died.enter_group(0)
    assert died.enter_group(1)  # the dogs take it down
    protect_shard(job, shard)
    assert groups == [[3], [1], [1], [1]]  # cats together; then each dog and the image without a subject
    assert {row["status"] for row in part_rows(job, shard)} == {"protected"}


def test_an_image_that_kills_its_worker_leaves_its_subject_behind(tmp_path: Path) -> None:
    job, shard = with_subjects(tmp_path)
    ((name, _),) = open_units(job.destination(), shard, job.config_fp)[0]
    deaths = 0
    culprit, dogs = 4, 1
    while True:
        attempt = begin(job.destination(), f"attempts/{name}", job.run_id, max_deaths=9)
        if attempt.blamed:
            break
        deaths += 1
        if attempt.isolate and attempt.enter_group(0) and not attempt.enter_group(dogs):
            assert [attempt.enter(row) for row in (1, 2, culprit)] == [True] * 3
    assert (deaths, attempt.blamed, attempt.broken) == (4, {culprit}, {dogs})
    (receipt,) = protect_shard(job, shard)
    assert (receipt.protected, receipt.quarantined) == (5, ["CrashLoop"])


def test_a_shard_without_the_column_of_subjects_has_none(tmp_path: Path, groups: list[list[int]]) -> None:
    source = write_folder(tmp_path / "in", {"a.png": photo(1), "b.png": photo(2)})
    write_parquet(source / "c.parquet", photos(2, start=3), {"who": ["cat", "cat"]})
    job, plan = prepare(job_config(source, tmp_path / "out", method={"subject_column": "who"}))
    for shard in plan.shards:
        protect_shard(job, shard)
    assert sorted(groups) == [[1], [1], [2]]
    # Later a folder comes that has no subjects either: the archive still names some.
    write_folder(source, {"d.png": photo(9)})
    assert len(prepare(job.config)[1].shards) == 3


def test_a_column_of_subjects_that_no_shard_has_is_refused(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", [photo(0)], {"who": ["cat"]})
    with pytest.raises(UserError, match=r"no shard has the column 'subject'; there are: who"):
        prepare(job_config(source, tmp_path / "out", method={"subject_column": "subject"}))


def test_units_are_cut_between_subjects(tmp_path: Path, groups: list[list[int]]) -> None:
    names = ["ant", "ant", "bee", "bee", "bee", None, None, "cow"]
    source = write_parquet(tmp_path / "in.parquet", photos(8), {"who": names}, row_group_size=7)
    method = {"subject_column": "who"}
    job, plan = prepare(job_config(source, tmp_path / "out", method=method, archive={"unit_assets": 4}))
    (read_together, alone) = open_units(job.destination(), plan.shards[0], job.config_fp)
    assert [rows for _, rows in read_together] == [(0, 2), (2, 6), (6, 7)]
    assert [rows for _, rows in alone] == [(7, 8)]
    protect_shard(job, plan.shards[0])
    assert sorted(groups) == [[1], [1], [1], [2], [3]]

"""The steps of a run: what stops it at once, how it is cut into waves, when it gives up, what it publishes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import run as run_module
from pipeline.config import JobConfig, RunSettings
from pipeline.errors import BindingConflict, FatalWorkerError, UserError
from pipeline.manifest import Commits, read_commits
from pipeline.run import SAME_ERROR_ROWS, Tally, cut_waves, open_units, preflight, prepare
from pipeline.storage_local import LocalStore
from pipeline.units import RowRange
from pipeline.worker import Receipt, load_units, store_unit
from tests.pipeline.archives import image_array, photo, photos, write_folder, write_parquet
from tests.pipeline.local_job import commit, data_table, job_config, protect_shard, ready, run_job, tree


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "in", {f"{n}.png": photo(n) for n in range(10)})


def test_overlap_is_refused(archive: Path) -> None:
    for destination in (archive, archive / "out", archive.parent):
        with pytest.raises(UserError, match="overlap: originals could be overwritten"):
            preflight(job_config(archive, destination))


def test_a_link_into_the_source_is_an_overlap(archive: Path) -> None:
    (archive.parent / "link").symlink_to(archive)
    with pytest.raises(UserError, match="overlap"):
        preflight(job_config(archive, archive.parent / "link" / "out"))


@pytest.mark.parametrize("name", ["nowhere", "typing-eror.tar"])
def test_an_empty_source_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is empty or does not exist"):
        prepare(job_config(tmp_path / name, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_wrong_method_is_refused_before_anything_is_written(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no preset 'turbo'"):
        prepare(job_config(archive, tmp_path / "out", method={"preset": "turbo"}))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(archive: Path, tmp_path: Path) -> None:
    job, plan = prepare(job_config(archive, tmp_path / "out"), dry_run=True)
    assert plan.rows == 10
    assert not (tmp_path / "out").exists()
    assert prepare(job.config)[1].shards == plan.shards


def test_preparing_leaves_plan_and_binding_only(archive: Path, tmp_path: Path) -> None:
    _, plan = prepare(job_config(archive, tmp_path / "out"))
    assert tree(tmp_path / "out").keys() == {"plans/binding.json", "plans/plan-00000.json", plan.shards[0].index_key}


def test_another_configuration_is_refused(archive: Path, tmp_path: Path) -> None:
    prepare(job_config(archive, tmp_path / "out"))
    with pytest.raises(BindingConflict, match=r"method\.config\.eps_levels: 4\.0 -> 6\.0"):
        prepare(job_config(archive, tmp_path / "out", method={"eps": 6}))


def test_a_dry_run_checks_the_binding(archive: Path, tmp_path: Path) -> None:
    prepare(job_config(archive, tmp_path / "out"))
    before = tree(tmp_path / "out")
    with pytest.raises(BindingConflict, match=r"method\.config\.eps_levels: 4\.0 -> 6\.0"):
        prepare(job_config(archive, tmp_path / "out", method={"eps": 6}), dry_run=True)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_source_that_cannot_be_planned_binds_nothing(tmp_path: Path, dry_run: bool) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", photos(2), {"img": image_array(photos(2))})
    with pytest.raises(UserError, match=r"several could be the image \(image, img\); name it with --image-column"):
        prepare(job_config(tmp_path / "in", tmp_path / "out"), dry_run=dry_run)
    assert tree(tmp_path / "out") == {}
    with pytest.raises(UserError, match=r"img hold further pictures.*--other-images drop"):
        prepare(job_config(tmp_path / "in", tmp_path / "out", archive={"image_column": "image"}), dry_run=dry_run)
    assert tree(tmp_path / "out") == {}
    settings = {"image_column": "image", "other_images": "drop"}
    assert len(run_job(job_config(tmp_path / "in", tmp_path / "out", archive=settings)).manifests) == 1


def test_the_plan_is_made_again_when_the_destination_moved_on(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job_config(archive, tmp_path / "out")
    job, plan = ready(config)
    (archive / "3.png").unlink()
    write_folder(archive, {"3.png": photo(33, side=30)})
    publish_plan = run_module.publish_plan
    answers: list[bool] = []

    def late(destination: Any, wanted: Any) -> bool:
        if not answers:
            commit(job, plan)  # just now
        answers.append(publish_plan(destination, wanted))
        return answers[-1]

    monkeypatch.setattr(run_module, "publish_plan", late)
    _, anew = prepare(config)
    assert answers == [False, True]
    assert anew.shards[0] == plan.shards[0]
    assert anew.superseded == {plan.shards[0].shard_id: ["3.png"]}
    assert anew.indexes == {}  # they may be large


def test_a_store_without_conditions_is_refused(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(store: LocalStore, key: str, data: bytes) -> Any:
        return store._rename(key, store._path(key), data, newer_than_ns=0)

    monkeypatch.setattr(LocalStore, "put_new", overwrite)
    with pytest.raises(UserError, match="ignores create-only writes"):
        prepare(job_config(archive, tmp_path / "out"))
    assert tree(tmp_path / "out") == {}


def waves_of(config: JobConfig) -> tuple[list[list[tuple[str, ...]]], list[list[str]], Tally]:
    """Units by task and completed shards of each wave of what is left to do, and the tally."""
    job, plan = prepare(config)
    tally = Tally(run=config.run, assets=plan.rows)
    waves = list(cut_waves(job, plan.shards, tally))
    units = [[task.units for task in tasks] for tasks, _ in waves]
    return units, [[shard.shard_id for shard in complete] for _, complete in waves], tally


@pytest.mark.parametrize(("wave_units", "bundle"), [(1, 1), (2, 1), (3, 1), (4, 2), (4, 8), (6, 8), (100, 8)])
def test_waves_are_bounded_and_complete(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wave_units: int, bundle: int
) -> None:
    monkeypatch.setattr("pipeline.units.BUNDLE", bundle)
    run = {"wave_units": wave_units}
    config = job_config(archive, tmp_path / "out", archive={"files_per_shard": 4, "unit_assets": 1}, run=run)
    waves, complete, tally = waves_of(config)
    job, plan = prepare(config)
    wanted = [
        name for s in plan.shards for group in open_units(job.destination(), s, job.config_fp) for name, _ in group
    ]
    assert [name for wave in waves for units in wave for name in units] == wanted
    assert all(len(wave) == 1 or sum(map(len, wave)) <= wave_units for wave in waves)
    assert len(waves) == -(-10 // wave_units) or bundle > 1
    assert len(waves) > 1 or wave_units == 100
    assert [name for names in complete for name in names] == [shard.shard_id for shard in plan.shards]
    last = {name: number for number, wave in enumerate(waves) for units in wave for name in units}
    for number, names in enumerate(complete):  # no shard is complete before its last unit's wave
        for shard in plan.shards:
            if shard.shard_id in names:
                groups = open_units(job.destination(), shard, job.config_fp)
                assert number == max(last[name] for group in groups for name, _ in group)
    assert tally.resumed == 0


def test_a_row_group_is_one_task(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", photos(10), row_group_size=4)
    waves, _, _ = waves_of(job_config(tmp_path / "in", tmp_path / "out", archive={"unit_assets": 2}))
    assert [[len(units) for units in wave] for wave in waves] == [[2, 2, 1]]


def test_a_resumed_run_does_what_is_left(archive: Path, tmp_path: Path) -> None:
    config = job_config(archive, tmp_path / "out", archive={"files_per_shard": 5, "unit_assets": 2})
    job, plan = prepare(config)
    protect_shard(job, plan.shards[0])
    (tmp_path / "out" / "parts" / plan.shards[0].shard_id).joinpath(
        f"{open_part(config, plan.shards[0].shard_id)}.parquet"
    ).unlink()
    waves, complete, tally = waves_of(config)
    assert [[len(units) for units in wave] for wave in waves] == [[1, 3]]
    assert tally.resumed == 5 - 2
    assert complete == [[shard.shard_id for shard in plan.shards]]
    assert protect_shard(job, plan.shards[0])[0].protected == 2
    assert protect_shard(job, plan.shards[0]) == []
    waves, complete, tally = waves_of(config)
    assert ([len(units) for units in waves[0]], tally.resumed) == ([3], 5)


def open_part(config: JobConfig, shard_id: str) -> str:
    """The id of the shard's first unit."""
    document = next(path for path in Path(config.destination).glob(f"parts/{shard_id}/*.parquet") if holds_row(path, 0))
    return document.stem


def holds_row(path: Path, row: int) -> bool:
    import pyarrow.parquet as pq

    return row in pq.read_table(path, columns=["row"]).column("row").to_pylist()


def test_a_shard_with_all_parts_still_comes_to_its_commit(archive: Path, tmp_path: Path) -> None:
    config = job_config(archive, tmp_path / "out")
    job, plan = prepare(config)
    protect_shard(job, plan.shards[0])
    waves, complete, tally = waves_of(config)
    assert (waves, complete, tally.resumed) == ([[]], [[plan.shards[0].shard_id]], 10)


def test_open_units_are_those_without_a_part(archive: Path, tmp_path: Path) -> None:
    job, plan = prepare(job_config(archive, tmp_path / "out", archive={"unit_assets": 4}))
    shard = plan.shards[0]

    def ranges() -> list[RowRange]:
        return [rows for group in open_units(job.destination(), shard, job.config_fp) for _, rows in group]

    assert ranges() == [(0, 4), (4, 8), (8, 10)]
    second = open_units(job.destination(), shard, job.config_fp)[0][1][0]
    (unit,) = load_units(job, shard, [second])
    for asset in unit.assets:
        asset.delta = asset.view.astype("int8") * 0 if asset.view is not None else None
    store_unit(job, unit)
    assert ranges() == [(0, 4), (8, 10)]


def receipt(protected: int = 0, **errors: int) -> Receipt:
    names = [name for name, count in errors.items() for _ in range(count)]
    example = f"7.png: too {names[0]}" if names else ""
    return Receipt(shard_id="s", unit_id="u", protected=protected, quarantined=names, example=example)


def test_the_tally_counts() -> None:
    tally = Tally(run=RunSettings(), assets=10_000)
    tally.add(receipt(14, A=1, B=1))
    tally.add(receipt(16))
    assert (tally.units, tally.protected, tally.quarantined, tally.errors["A"]) == (2, 30, 2, 1)
    assert tally.tolerated == 10  # a thousandth
    assert Tally(run=RunSettings(), assets=10).tolerated == 5  # and at least five


def test_one_error_over_and_over_stops_the_run() -> None:
    tally = Tally(run=RunSettings(), assets=1000)
    tally.add(receipt(A=SAME_ERROR_ROWS - 1, B=SAME_ERROR_ROWS - 1))
    with pytest.raises(FatalWorkerError, match=rf"{SAME_ERROR_ROWS} assets failed with A.*the last is 7\.png: too A"):
        tally.add(receipt(A=1))


def test_errors_that_are_tolerated_do_not_stop_it() -> None:
    tally = Tally(run=RunSettings(max_quarantine_fraction=0.1), assets=1000)
    tally.add(receipt(A=100))
    with pytest.raises(FatalWorkerError):
        tally.add(receipt(A=1))


def test_a_whole_run_is_published(archive: Path, tmp_path: Path) -> None:
    config = job_config(archive, tmp_path / "out", archive={"files_per_shard": 4})
    outcome = run_job(config)
    success = json.loads((tmp_path / "out" / "_SUCCESS.json").read_bytes())
    assert (success["rows_in"], success["rows_ok"], success["rows_quarantined"]) == (10, 10, 0)
    assert success["config_fingerprint"] == outcome.job.config_fp
    assert success["superseded"] == {}
    assert len(success["manifests"]) == 3


def test_an_archive_that_grows_and_changes(archive: Path, tmp_path: Path) -> None:
    config = job_config(archive, tmp_path / "out")
    (first,) = run_job(config).manifests
    before = tree(tmp_path / "out")
    (archive / "3.png").unlink()
    write_folder(archive, {"3.png": photo(33, side=30), "new.png": photo(40)})
    outcome = run_job(config)
    assert len(outcome.manifests) == 2
    assert outcome.manifests[0] == first
    assert data_table(tmp_path / "out", outcome.manifests[1]).column("asset_id").to_pylist() == ["3.png", "new.png"]
    success = json.loads((tmp_path / "out" / "_SUCCESS.json").read_bytes())
    assert success["superseded"] == {first.shard_id: ["3.png"]}
    assert success["rows_in"] == 12
    after = tree(tmp_path / "out")
    changed = {key for key, data in before.items() if after[key] != data}
    assert changed == {"_SUCCESS.json", "croissant.json"}
    committed = {manifest.shard_id for manifest in outcome.manifests}
    assert read_commits(outcome.job.destination()) == Commits(committed, set())

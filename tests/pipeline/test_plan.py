"""Plans only grow: what is listed stays, what is new or changed becomes a new shard, and nobody plans twice."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config import ArchiveSettings
from pipeline.errors import BindingConflict, IntegrityError, UserError
from pipeline.manifest import Commits, abandon, manifest_key, read_commits
from pipeline.plan import (
    BINDING_KEY,
    Changes,
    Plan,
    Shard,
    bind,
    check_binding,
    load_index,
    make_plan,
    plan_columns,
    publish_plan,
    unit_ids,
)
from pipeline.storage import ObjectInfo, put_json_new
from pipeline.storage_local import LocalStore
from tests.pipeline.archives import photo, photos, write_folder, write_parquet, write_tar
from tests.pipeline.local_job import tree

SETTINGS = ArchiveSettings(unit_assets=2, files_per_shard=4)


class Bench:
    """A source folder, a destination, and a planner between them."""

    def __init__(self, root: Path) -> None:
        self.source, self.out = root / "in", root / "out"
        self.source.mkdir()
        self.store = LocalStore(str(self.out))

    def look(self, *, only: str = "") -> Plan:
        """A plan that nobody hears of."""
        return make_plan(LocalStore(str(self.source)), self.store, SETTINGS, "fp", only=only)

    def plan(self, *, store: LocalStore | None = None) -> Plan:
        """A published plan, made as often as that takes."""
        while True:
            plan = self.look()
            if publish_plan(store or self.store, plan):
                return plan

    def commit(self, *shards: Shard) -> None:
        for shard in shards:
            put_json_new(self.store, manifest_key(shard.shard_id), {"writer_id": "w", "shard_id": shard.shard_id})

    def rewrite(self, name: str, data: bytes) -> None:
        path = self.source / name
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    def covered(self, plan: Plan) -> list[str]:
        """Keys of all files of the plan's shards, as often as they occur."""
        return sorted(key for shard in plan.shards for key, _, _ in load_index(self.store, shard).members)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_all_kinds(bench: Bench) -> None:
    write_folder(bench.source, {f"{n}.png": photo(n) for n in range(6)} | {"README.md": b"hello"})
    write_parquet(bench.source / "p.parquet", photos(3), {"n": range(3)})
    write_tar(bench.source / "t.tar", [("x.png", photo()), ("x.txt", b"x")])
    write_parquet(bench.source / "empty.parquet", [])
    plan = bench.plan()
    assert [(shard.kind, shard.key, shard.rows, shard.units) for shard in plan.shards] == [
        ("parquet", "p.parquet", 3, 2),
        ("tar", "t.tar", 1, 1),
        ("files", "0.png", 4, 2),
        ("files", "4.png", 2, 1),
    ]
    assert [shard.number for shard in plan.shards] == [0, 1, 2, 3]
    assert (plan.rows, plan.ignored, plan.unreadable, plan.superseded) == (10, ["README.md"], [], {})
    assert plan_columns(plan, plan.shards[0]).names == ["n", "txt"]
    index = load_index(bench.store, plan.shards[0])
    assert index == plan.indexes[plan.shards[0].shard_id]
    assert list(unit_ids(index, "fp", 0).values()) == index.units
    assert unit_ids(index, "fp", 0).keys().isdisjoint(unit_ids(index, "fp", 1))


def test_an_unchanged_source_is_planned_once(bench: Bench) -> None:
    write_folder(bench.source, {f"{n}.png": photo(n) for n in range(3)})
    first = bench.plan()
    before = tree(bench.out)
    again = bench.plan()
    assert again.shards == first.shards
    assert again.columns == first.columns
    assert tree(bench.out) == before


def test_making_a_plan_writes_nothing(bench: Bench) -> None:
    write_folder(bench.source, {"a.png": photo()})
    dry = bench.look()
    assert not bench.out.exists()
    assert dry.shards == bench.plan().shards
    before = tree(bench.out)
    bench.rewrite("a.png", photo(1, side=30))
    assert bench.look().dropped == [dry.shards[0].shard_id]
    assert tree(bench.out) == before


def test_added_files_become_new_shards(bench: Bench) -> None:
    write_folder(bench.source, {f"b{n}.png": photo(n) for n in range(3)})
    first = bench.plan()
    write_folder(bench.source, {"a.png": photo(7), "c.png": photo(8)})
    second = bench.plan()
    assert second.shards[: len(first.shards)] == first.shards
    assert bench.covered(second) == ["a.png", "b0.png", "b1.png", "b2.png", "c.png"]
    assert second.shards[-1].plan_id != first.shards[0].plan_id
    assert {shard.plan_id for shard in second.shards} == second.columns.keys()


def test_a_changed_file_of_an_open_shard_is_planned_anew(bench: Bench) -> None:
    write_folder(bench.source, {"a.png": photo(1), "b.png": photo(2)})
    first = bench.plan()
    bench.rewrite("b.png", photo(3, side=30))
    second = bench.plan()
    assert first.shards[0] not in second.shards
    assert bench.covered(second) == ["a.png", "b.png"]
    assert (second.superseded, second.dropped) == ({}, [first.shards[0].shard_id])
    assert {shard.number for shard in second.shards}.isdisjoint(shard.number for shard in first.shards)
    assert read_commits(bench.store) == Commits(set(), {first.shards[0].shard_id})
    third = bench.plan()
    assert (third.shards, third.dropped) == (second.shards, [])


def test_a_changed_file_of_a_committed_shard_supersedes_it(bench: Bench) -> None:
    write_folder(bench.source, {"a.png": photo(1), "b.png": photo(2)})
    (old,) = bench.plan().shards
    bench.rewrite("b.png", photo(3, side=30))
    bench.commit(old)
    second = bench.plan()
    assert (second.superseded, second.dropped) == ({old.shard_id: ["b.png"]}, [])
    kept, new = second.shards
    assert kept == old
    assert [key for key, _, _ in load_index(bench.store, new).members] == ["b.png"]
    (bench.source / "b.png").unlink()
    bench.commit(new)
    third = bench.plan()
    assert third.shards == second.shards  # what is committed stays, and nothing replaced it
    assert (third.superseded, third.gone) == ({old.shard_id: ["b.png"]}, {new.shard_id: ["b.png"]})
    assert third.replaced == set()  # a.png of the old one is what is published, and the new one holds the last b.png


def test_what_changed_is_counted_until_it_is_committed(bench: Bench) -> None:
    write_folder(bench.source, {"a.png": photo(1), "b.png": photo(2), "c.png": photo(3)})
    write_parquet(bench.source / "p.parquet", photos(2))
    write_parquet(bench.source / "empty.parquet", [])
    first = bench.plan()
    assert first.changes == Changes(new=4)
    assert bench.plan().changes == first.changes
    bench.commit(*first.shards)
    assert bench.plan().changes == Changes(unchanged=4)
    bench.rewrite("b.png", photo(4, side=30))
    (bench.source / "c.png").unlink()
    (bench.source / "p.parquet").unlink()
    write_parquet(bench.source / "p.parquet", photos(3))
    write_folder(bench.source, {"d.png": photo(5)})
    second = bench.plan()
    assert second.changes == Changes(new=1, changed=2, unchanged=1, gone=1)
    parquet, files = first.shards
    assert second.superseded == {files.shard_id: ["b.png"], parquet.shard_id: ["p.parquet"]}
    assert (second.replaced, second.gone) == ({parquet.shard_id}, {files.shard_id: ["c.png"]})
    assert bench.plan().changes == second.changes
    bench.commit(*second.shards[2:])
    assert bench.plan().changes == Changes(unchanged=4, gone=1)
    assert bench.look(only="p.parquet").changes == Changes(unchanged=1)


def test_a_file_that_was_away_for_a_while_is_planned_once(bench: Bench) -> None:
    write_folder(bench.source, {"a.png": photo(1), "b.png": photo(2)})
    bench.plan()
    os.rename(bench.source / "b.png", bench.source.parent / "b.png")
    bench.plan()
    os.rename(bench.source.parent / "b.png", bench.source / "b.png")
    assert bench.covered(bench.plan()) == ["a.png", "b.png"]


def test_a_change_that_is_taken_back_is_planned_a_third_time(bench: Bench) -> None:
    data = photo(1)
    write_folder(bench.source, {"a.png": data})
    (first,) = bench.plan().shards
    times = (bench.source / "a.png").stat()
    bench.rewrite("a.png", photo(2, side=30))
    (second,) = bench.plan().shards
    bench.rewrite("a.png", data)
    os.utime(bench.source / "a.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    (third,) = bench.plan().shards
    assert third.number > second.number > first.number
    assert bench.covered(bench.plan()) == ["a.png"]
    assert read_commits(bench.store).abandoned == {first.shard_id, second.shard_id}


def test_files_that_are_gone_leave_nothing_but_the_tombstone(bench: Bench) -> None:
    write_folder(bench.source, {"a.png": photo(1)})
    write_parquet(bench.source / "p.parquet", photos(2))
    parquet, files = bench.plan().shards
    (bench.source / "a.png").unlink()
    plan = bench.plan()
    assert (plan.shards, plan.dropped, plan.indexes) == ([parquet], [files.shard_id], {})
    assert read_commits(bench.store).abandoned == {files.shard_id}


def test_a_shard_that_is_committed_meanwhile_is_not_planned_anew(bench: Bench) -> None:
    write_folder(bench.source, {"a.png": photo(1), "b.png": photo(2)})
    (old,) = bench.plan().shards
    bench.rewrite("b.png", photo(3, side=30))
    late = bench.look()
    bench.commit(old)
    before = tree(bench.out)
    assert not publish_plan(bench.store, late)
    assert tree(bench.out) == before
    again = bench.plan()
    assert (again.shards[0], again.superseded, again.dropped) == (old, {old.shard_id: ["b.png"]}, [])
    assert [key for key, _, _ in load_index(bench.store, again.shards[1]).members] == ["b.png"]


def test_some_committed_and_some_not(bench: Bench) -> None:
    for name in ("a", "b"):
        write_parquet(bench.source / f"{name}.parquet", photos(2))
    first, second = bench.plan().shards
    for name in ("a", "b"):
        (bench.source / f"{name}.parquet").unlink()
        write_parquet(bench.source / f"{name}.parquet", photos(3))
    late = bench.look()
    assert sorted(late.dropped) == [first.shard_id, second.shard_id]
    bench.commit(second)
    assert not publish_plan(bench.store, late)  # though the first is abandoned now
    assert read_commits(bench.store) == Commits({second.shard_id}, {first.shard_id})
    again = bench.plan()
    assert [(shard.key, shard.rows) for shard in again.shards] == [
        ("b.parquet", 2),
        ("a.parquet", 3),
        ("b.parquet", 3),
    ]
    assert again.superseded == {second.shard_id: ["b.parquet"]}


def test_a_planner_that_died_after_the_tombstone(bench: Bench) -> None:
    write_folder(bench.source, {"a.png": photo(1), "b.png": photo(2)})
    (old,) = bench.plan().shards
    bench.rewrite("b.png", photo(3, side=30))
    assert abandon(bench.store, old.shard_id)
    plan = bench.plan()
    assert old not in plan.shards
    assert bench.covered(plan) == ["a.png", "b.png"]


def test_unreadable_shards_do_not_stop_the_others(bench: Bench) -> None:
    write_parquet(bench.source / "good.parquet", photos(2))
    (bench.source / "bad.parquet").write_bytes(b"no")
    write_tar(bench.source / "bad.tar", [("a.txt", b"")])
    plan = bench.plan()
    assert [shard.key for shard in plan.shards] == ["good.parquet"]
    assert [key for key, _ in plan.unreadable] == ["bad.parquet", "bad.tar"]
    assert all(key in reason for key, reason in plan.unreadable)
    (bench.source / "good.parquet").unlink()
    with pytest.raises(UserError, match=r"bad\.parquet: not a readable Parquet file"):
        bench.plan()


def test_nothing_to_protect(bench: Bench) -> None:
    write_folder(bench.source, {"README.md": b"", "b.txt": b""})
    with pytest.raises(UserError, match=r"holds no images, Parquet files or tars \(2 other objects were ignored\)"):
        bench.plan()


def test_one_object_or_folder_of_the_source(bench: Bench) -> None:
    for name in ("a.parquet", "a.parquet2.parquet", "dir.parquet/part-0.parquet"):
        write_parquet(bench.source / name, photos(1))
    assert [shard.key for shard in bench.look(only="a.parquet").shards] == ["a.parquet"]
    found = bench.look(only="dir.parquet").shards
    assert [shard.key for shard in found] == ["dir.parquet/part-0.parquet"]


def test_columns_of_two_types_are_refused(bench: Bench) -> None:
    write_parquet(bench.source / "a.parquet", photos(1), {"label": [1]})
    write_parquet(bench.source / "b.parquet", photos(1), {"label": ["x"]})
    with pytest.raises(UserError, match="column 'label' is int64 in one shard and string in another"):
        bench.plan()
    assert not bench.out.exists()


def test_planners_that_race_agree(bench: Bench) -> None:
    write_folder(bench.source, {f"{n}.png": photo(n) for n in range(10)})
    with ThreadPoolExecutor(8) as pool:
        plans = [future.result() for future in [pool.submit(bench.plan) for _ in range(8)]]
    assert all(plan.shards == plans[0].shards for plan in plans)
    assert bench.plan().shards == plans[0].shards


class Overtaken(LocalStore):
    """Somebody else's plan is published just before the first one of ours."""

    def __init__(self, root: Path, rival: Callable[[], object]) -> None:
        super().__init__(str(root))
        self.rival: Callable[[], object] | None = rival

    def put_new(self, key: str, data: bytes) -> ObjectInfo:
        if key.startswith("plans/plan-") and self.rival is not None:
            rival, self.rival = self.rival, None
            rival()
        return super().put_new(key, data)


def test_a_planner_that_is_overtaken_adds_to_the_winners_plan(bench: Bench) -> None:
    write_folder(bench.source, {"a.png": photo(1), "b.png": photo(2)})
    won: list[Plan] = []

    def rival() -> None:
        write_folder(bench.source, {"c.png": photo(3)})
        won.append(bench.plan())

    lost = bench.plan(store=Overtaken(bench.out, rival))
    assert lost.shards == won[0].shards == bench.plan().shards
    assert bench.covered(lost) == ["a.png", "b.png", "c.png"]


def test_binding_is_idempotent_and_names_what_differs(bench: Bench) -> None:
    fields = {"method": {"name": "x", "config": {"eps_levels": 8.0, "steps": 4}}, "seed": 0}
    check_binding(bench.store, fields)
    assert not bench.out.exists()
    bind(bench.store, fields)
    stored = tree(bench.out)[BINDING_KEY]
    bind(bench.store, fields)
    check_binding(bench.store, fields)
    changed = {"method": {"name": "x", "config": {"eps_levels": 4.0, "steps": 4}}, "seed": 1}
    for compare in (bind, check_binding):
        with pytest.raises(BindingConflict, match=r"\(method\.config\.eps_levels: 8\.0 -> 4\.0; seed: 0 -> 1\)"):
            compare(bench.store, changed)
    with pytest.raises(BindingConflict, match=r'\(method\.name: "x" -> "y"\)'):
        bind(bench.store, {"method": {"name": "y", "config": {"k": 1}}, "seed": 0})
    assert tree(bench.out)[BINDING_KEY] == stored


def test_a_damaged_plan_is_named(bench: Bench) -> None:
    write_folder(bench.source, {"a.png": photo()})
    bench.plan()
    (path,) = bench.out.glob("plans/plan-*.json")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(IntegrityError, match=path.name):
        bench.plan()

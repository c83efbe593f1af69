"""The gate: what is too weak is flagged, refused, or protected again with a stronger preset; nothing mixes unseen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import CheckSettings
from pipeline.errors import UserError
from pipeline.job import Job
from pipeline.plan import Shard
from pipeline.run import Tally, cut_waves, open_units, prepare, raised
from pipeline.verify.gate import Decision, at_current_rung, decide, history
from pipeline.worker import Optimizer, load_units, store_unit
from tests.pipeline.archives import photo, write_folder
from tests.pipeline.local_job import check_shard, commit, data_table, job_config, protect_shard, ready


def job_with(tmp_path: Path, gate: dict[str, Any], **check: Any) -> Any:
    source = write_folder(tmp_path / "in", {f"{n}.png": photo(n) for n in range(3)})
    sections = {"check": {"fraction": 1, "gate": gate, **check}, "method": {"preset": "fast"}}
    return job_config(source, tmp_path / "out", **sections)


def checked(tmp_path: Path, gate: dict[str, Any], **check: Any) -> tuple[Job, Shard]:
    job, plan = ready(job_with(tmp_path, gate, **check))
    return job, plan.shards[0]


@pytest.mark.parametrize(
    ("gate", "outcome"),
    [
        ({"threshold": -1.0, "action": "fail"}, "pass"),
        ({"threshold": 1.0}, "pass"),
        ({"threshold": 1.0, "action": "flag"}, "flag"),
        ({"threshold": 1.0, "action": "fail"}, "fail"),
        ({"threshold": 1.0, "action": "strengthen", "ladder": ["strong"]}, "strengthen"),
    ],
)
def test_what_the_policy_says(tmp_path: Path, gate: dict[str, Any], outcome: str) -> None:
    job, shard = checked(tmp_path, gate)
    decision = decide(job, shard)
    assert (decision.outcome, decision.rung, decision.preset) == (outcome, 0, "fast")
    assert decision.value is not None
    assert decision.low is not None
    assert decision.low <= decision.value < 1
    assert decide(job, shard) == decision  # stored once
    assert history(job.destination(), shard) == [decision]


def test_the_worst_purifier_that_counts_decides(tmp_path: Path) -> None:
    job, shard = checked(tmp_path, {"threshold": 1.0, "action": "flag", "purifiers": ["jpeg75"]})
    one = decide(job, shard)
    assert one.purifier is not None
    assert one.purifier.removesuffix("@training-scale") == "jpeg75"
    everything, shard = checked(tmp_path / "all", {"threshold": 1.0, "action": "flag"})
    worst = decide(everything, shard)
    assert one.value is not None
    assert worst.value is not None
    assert worst.value <= one.value


def test_a_weak_shard_climbs_the_ladder(tmp_path: Path) -> None:
    gate = {"threshold": 1.0, "action": "strengthen", "ladder": ["paper", "strong"], "finally": "flag"}
    config = job_with(tmp_path, gate)
    job, plan = prepare(config)
    ((tasks, shards),) = cut_waves(job, plan.shards, Tally(run=config.run, assets=plan.rows))
    outcomes = []
    while shards:
        for task in tasks:
            for unit in load_units(job, task.shard, task.units):
                store_unit(job, Optimizer(job, "cpu").protect(unit))
        check_shard(job, shards[0])
        outcomes.append(decide(job, shards[0]))
        if outcomes[-1].outcome != "strengthen":
            break
        # A run that dies here finds the shard on its new rung.
        assert at_current_rung(job, plan.shards[0]).rung == shards[0].rung + 1
        tasks, shards = raised(job, shards)
    assert [(item.preset, item.outcome) for item in outcomes] == [
        ("fast", "strengthen"),
        ("paper", "strengthen"),
        ("strong", "flag"),
    ]
    (manifest,) = commit(job, plan, shards)
    assert manifest.rung == 2
    assert [item["outcome"] for item in manifest.verify["gate"]] == ["strengthen", "strengthen", "flag"]
    rows = data_table(tmp_path / "out", manifest).to_pylist()
    assert {(row["rung"], row["eps_levels"], row["eps_linf_measured"] > 8) for row in rows} == {(2, 16.0, True)}
    # Parts of every rung lie beside each other and have names of their own.
    assert open_units(job.destination(), plan.shards[0], job.config_fp) == []
    units = [{row["unit_id"] for row in rows}]
    names = {item.key for item in job.destination().list("parts/")}
    assert len(names) == 3
    assert all(f"parts/{shards[0].shard_id}/{unit}.parquet" in names for unit in units[0])


def test_nothing_to_ship_passes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {"bad.png": b"no image"})
    check = {"gate": {"threshold": 1.0, "action": "fail"}}
    job, plan = ready(job_config(source, tmp_path / "out", check=check))
    decision = decide(job, plan.shards[0])
    assert (decision.outcome, decision.value) == ("pass", None)


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ({"gate": {"action": "strengthen"}}, "go together"),
        ({"gate": {"action": "flag", "ladder": ["strong"]}}, "go together"),
        ({"gate": {"action": "fail", "metric": "effect"}, "groups": 2}, "groups of at least 3"),
        ({"gate": {"action": "fail"}, "min_per_shard": 0}, "min_per_shard of at least 1"),
        ({"purifiers": []}, "at least 1"),
        ({"gate": {"action": "fail", "purifiers": ["vae"]}}, "the gate counts vae, which its check does not measure"),
        (
            {"gate": {"action": "fail", "metric": "effect", "purifiers": ["jpeg75"]}, "groups": 3},
            "the gate counts jpeg75",
        ),
    ],
)
def test_settings_that_cannot_work(check: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        CheckSettings.model_validate(check)


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ({"purifiers": ["jpeg7"]}, "no purifier named 'jpeg7'"),
        ({"customize_after": ["x"]}, "no purifier named 'x'"),
        ({"purifiers": ["noisy-upscaling"]}, "no upscaler model given"),
        ({"models": {"magic": "x"}}, "no kind of model named 'magic'"),
        ({"customizer": "magic"}, "no customization attack named 'magic'"),
        ({"gate": {"action": "strengthen", "ladder": ["mighty"]}}, "no preset 'mighty'"),
        ({"gate": {"action": "strengthen", "ladder": ["fast"]}}, "two rungs of the gate's ladder are equal"),
        ({"models": {"latent": "/nowhere"}}, "no folder '/nowhere'"),
    ],
)
def test_unknown_names_are_found_before_anything_is_written(tmp_path: Path, check: dict[str, Any], words: str) -> None:
    source = write_folder(tmp_path / "in", {"a.png": photo(1)})
    with pytest.raises(UserError, match=words):
        prepare(job_config(source, tmp_path / "out", check=check, method={"preset": "fast"}))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.json"))


def test_the_ladder_is_part_of_the_configuration(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {"a.png": photo(1)})
    one = prepare(job_config(source, tmp_path / "a", check={"gate": {"action": "flag"}}), dry_run=True)[0]
    gate = {"action": "strengthen", "ladder": ["strong"]}
    two = prepare(job_config(source, tmp_path / "a", check={"gate": gate}), dry_run=True)[0]
    assert one.config_fp != two.config_fp
    assert [rung["eps_levels"] for rung in two.ladder] == [4.0, 16.0]


def test_decisions_read_well() -> None:
    decision = Decision(
        rung=0, preset="fast", outcome="flag", metric="survival", value=0.25, low=0.1, high=0.4, purifier="chain",
        threshold=0.5,
    )  # fmt: skip
    assert str(decision) == "survival 0.25 after chain, 0.5 is wanted: flag (preset fast)"
    assert str(replace(decision, value=None, reason="no gain")).startswith("no gain, 0.5 is wanted")


def test_checks_of_one_rung_do_not_answer_for_another(tmp_path: Path) -> None:
    gate = {"threshold": 1.0, "action": "strengthen", "ladder": ["strong"]}
    job, shard = checked(tmp_path, gate)
    decide(job, shard)
    higher = at_current_rung(job, shard)
    assert higher.rung == 1
    protect_shard(job, higher)
    check_shard(job, higher)
    assert decide(job, higher).outcome == "fail"  # finally
    assert len(list(job.destination().list("checks/"))) == 2

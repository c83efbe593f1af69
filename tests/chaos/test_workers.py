"""Workers that die, runs that meet, runs that are stopped, sources that change.

1. A picture that kills its worker is quarantined after exactly two deaths in isolation; one that raises and one that
   comes back as NaN are quarantined too; all others, those beside them in a unit included, are protected.
2. Two runs on one destination both end well, with one manifest per shard and one ``_SUCCESS.json``.
3. SIGTERM ends a run within 30 s with code 143 and one line, leaves no process; the same command goes on.
4. A shard whose source is replaced meanwhile is not committed; the next run abandons it and plans its source anew.
"""

from __future__ import annotations

import signal
import sqlite3
import time
import urllib.parse
from collections import Counter
from contextlib import closing
from email.message import Message
from pathlib import Path

import pytest

from pipeline.inspection import quarantined_rows
from pipeline.manifest import read_commits, rows_of
from pipeline.storage import StorageOptions, get_json, open_store
from tests.conftest import S3Proxy, S3Server, Verdict
from tests.e2e.archives import fill, marked_pictures, parquet_file, picture
from tests.e2e.command import FAKE, finished, fixative, job_file, meaning, running, starts, until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "prefect_server"), pytest.mark.timeout(480)]
NO_CHECK = {"check": {"fraction": 0, "min_per_shard": 0}}
LOCAL = StorageOptions()


@pytest.mark.parametrize("death", ["segfault_on", pytest.param("exit_on", marks=pytest.mark.slow)])
def test_exactly_the_ill_pictures_are_quarantined(death: str, tmp_path: Path) -> None:
    source, destination = (open_store(str(tmp_path / name), LOCAL) for name in ("source", "destination"))
    fill(source, marked_pictures())
    ill = {death: 103, "raise_on": 106, "nan_on": 109}
    config = job_file(tmp_path / "job.yaml", method={"name": FAKE, "overrides": ill}, **NO_CHECK)
    result = fixative("protect", source.url, destination.url, "-c", config, "--actors", 1)
    assert result.code == 0, result

    (manifest,) = finished(destination)
    rows = quarantined_rows(destination, manifest)
    assert {row["asset_id"]: (row["stage"], row["error_type"]) for row in rows} == {
        "103.png": ("protect", "CrashLoop"),
        "106.png": ("protect", "RuntimeError"),
        "109.png": ("protect", "ProtectError"),
    }
    protected = [row["asset_id"] for row in rows_of(destination, manifest, ["asset_id"])]
    assert Counter(protected) == Counter(marked_pictures().keys() - {row["asset_id"] for row in rows})
    (crashed,) = (row["unit_id"] for row in rows if row["asset_id"] == "103.png")
    # One death of the whole unit, two in isolation, and the attempt that set the picture aside.
    assert starts(destination) == dict.fromkeys(starts(destination), 1) | {crashed: 4}
    marks = Counter(item.key.rpartition("-row-")[2] for item in destination.list(f"attempts/{crashed}/"))
    assert marks["000000003"] == 2


@pytest.mark.slow
def test_two_runs_on_one_destination(ray_cluster: str, prefect_server: str, prefect_home: Path, tmp_path: Path) -> None:
    source, destination = (open_store(str(tmp_path / name), LOCAL) for name in ("source", "destination"))
    pictures = list(marked_pictures().items())
    for number in range(4):
        source.put_new(f"{number}.parquet", parquet_file(dict(pictures[3 * number : 3 * number + 3])))
    config = job_file(tmp_path / "job.yaml", method={"name": FAKE, "overrides": {"sleep_s": 0.3}}, **NO_CHECK)
    arguments = ("protect", source.url, destination.url, "-c", config, "--actors", 1, "--ray-address", ray_cluster)
    with running(*arguments, home=prefect_home, environment={"PREFECT_API_URL": prefect_server}) as command:
        until(lambda: any(destination.list("plans/plan-")) or command.process.poll() is not None, "a plan", 150)
        mine = fixative(*arguments[:-2])
        results = [mine, command.wait(250)]
    assert [result.code for result in results] == [0, 0], results
    assert [result.err for result in results] == ["", ""]
    assert len({item.key.split("/")[2] for item in destination.list("attempts/")}) == 2, "the runs did not meet"
    manifests = finished(destination)
    assert [manifest.source["key"] for manifest in manifests] == [f"{number}.parquet" for number in range(4)]
    success = get_json(destination, "_SUCCESS.json")
    assert (success["rows_in"], success["rows_ok"]) == (12, 12)
    ids = [row["asset_id"] for item in manifests for row in rows_of(destination, item, ["asset_id"])]
    assert Counter(ids) == Counter(list(marked_pictures()))
    assert fixative("inspect", destination.url).code == 0


def test_sigterm_ends_a_run_and_the_next_one_goes_on(prefect_home: Path, tmp_path: Path) -> None:
    source, destination = (open_store(str(tmp_path / name), LOCAL) for name in ("source", "destination"))
    fill(source, marked_pictures())
    config = job_file(tmp_path / "job.yaml", method={"name": FAKE, "overrides": {"sleep_s": 0.6}}, **NO_CHECK)
    arguments = ("protect", source.url, destination.url, "-c", config, "--actors", 1)
    with running(*arguments, home=prefect_home) as command:
        until(lambda: any(destination.list("parts/")) or command.process.poll() is not None, "a part", 150)
        asked = time.monotonic()
        command.process.send_signal(signal.SIGTERM)
        result = command.wait(60)
        took = time.monotonic() - asked
        until(lambda: not command.members(), "every process of the run to end", 30)
    print(f"ended {took:.1f} s after SIGTERM; Prefect says {_last_state(prefect_home)}")
    assert result.code == 143, result
    assert took < 30
    assert result.err.strip() == "fixative: interrupted; run the same command to go on", result
    assert _last_state(prefect_home) in ("Cancelled", "Crashed")
    assert not any(destination.list("manifests/"))

    done = sum(1 for _ in destination.list("parts/"))
    assert 1 <= done < 6
    again = fixative(*arguments)
    assert again.code == 0, again
    assert f"this run: {6 - done} units" in again.out
    (manifest,) = finished(destination)
    assert manifest.rows_ok == 12


def _last_state(home: Path) -> str:
    with closing(sqlite3.connect(home / "prefect.db")) as database:
        query = "SELECT state_name FROM flow_run ORDER BY created DESC LIMIT 1"
        return str(database.execute(query).fetchone()[0])


@pytest.mark.slow
def test_a_source_that_changes_meanwhile_is_not_committed(
    s3_server: S3Server, s3_bucket: str, s3_proxy: S3Proxy, tmp_path: Path
) -> None:
    source = open_store(f"s3://{s3_bucket}/source", s3_server.options)
    destination = open_store(f"s3://{s3_bucket}/destination", s3_server.options)
    fill(source, {"a.png": picture(1), "b.png": picture(2), "rows.parquet": parquet_file({"row": picture(3)})})

    def replace_when_planned(method: str, path: str, headers: Message) -> Verdict:
        if method == "PUT" and "/destination/plans/plan-" in urllib.parse.unquote(path):
            source.replace("b.png", picture(4), etag=source.info("b.png").etag)
        return Verdict()

    s3_proxy.rule = replace_when_planned
    arguments = ("protect", source.url, destination.url, "-c", job_file(tmp_path / "job.yaml", **NO_CHECK))
    result = fixative(*arguments, "--s3-endpoint", s3_proxy.endpoint_url)
    assert result.code == 1, result
    (line,) = (line for line in (result.out + result.err).splitlines() if "not complete" in line)
    assert "b.png" in line
    assert "changed" in line
    kinds = [get_json(destination, item.key)["source"]["kind"] for item in destination.list("manifests/")]
    assert kinds == ["parquet"]
    assert not any(destination.list("_SUCCESS.json"))

    again = fixative(*arguments, "--s3-endpoint", s3_server.endpoint_url)
    assert again.code == 0, again
    assert meaning(finished(destination)).keys() == {"a.png", "rows.parquet"}
    assert get_json(destination, "_SUCCESS.json")["rows_ok"] == 3
    (abandoned,) = read_commits(destination).abandoned
    assert any(destination.list(f"plans/index/{abandoned}.json"))

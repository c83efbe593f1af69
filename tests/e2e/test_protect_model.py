"""A model goes from one bucket to another, with the command, Prefect, Ray and S3 over HTTP.

1. SIGKILL between two checkpoints, then the same command: it takes over from the dead run, goes on at the checkpoint in
   the bucket, and the published objects are those of an undisturbed local run, byte for byte.
2. With --separate on Ray every concept has its model. A rerun writes nothing.
3. Neither objects nor output hold credentials, and no object holds a part of a photo.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.protect_model.job import ConceptSource
from pipeline.protect_model.plan import plan_model
from pipeline.protect_model.run import protect_model
from pipeline.storage import Store, open_store
from tests.conftest import S3Server, make_bucket
from tests.e2e.archives import fill
from tests.e2e.command import Result, contents, fixative, running, until
from tests.pipeline import model_jobs
from tests.pipeline.model_jobs import QUICK, job, traces, world

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(240)]
SECRET = "wJalrXUtnFEMIK7MDENG-bPxRfiCYEXAMPLEKEY"
STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def source(folder: Path, s3_server: S3Server) -> str:
    """The world in a bucket."""
    url = f"s3://{make_bucket(s3_server)}/world"
    fill(open_store(url, s3_server.options), model_jobs.contents(folder))
    return url


def command(source: str, server: S3Server, out: str, steps: int, *options: object) -> list[object]:
    settings = [f"--set={name}={value}" for name, value in {**QUICK, "steps": steps}.items()]
    return [
        *("protect-model", f"{source}/model", "--out", out, "--preset", "fast", "--checkpoint-every", 2, *settings),
        *("--s3-endpoint", server.endpoint_url, "--s3-region", "us-east-1", *options),
    ]


def assert_nothing_leaks(folder: Path, stores: Sequence[Store], results: Sequence[Result]) -> None:
    stored = {item.key: store.get(item.key) for store in stores for item in store.list()}
    assert stored
    leaks = [SECRET.encode(), *traces(folder)]
    assert not [key for key, data in stored.items() for leak in leaks if leak in data]
    assert not [result for result in results if SECRET in result.out + result.err]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_killed_and_gone_on(
    folder: Path,
    source: str,
    s3_server: S3Server,
    prefect_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = f"s3://{make_bucket(s3_server)}/rex"
    arguments = command(source, s3_server, out, STEPS, "--concept", f"{source}/photos", "--class-word", "dog")
    made, work = (open_store(url, s3_server.options) for url in (out, f"{out}.training"))
    secret = {"AWS_SECRET_ACCESS_KEY": SECRET, "OMP_NUM_THREADS": "1"}
    # What it has downloaded stays where it is killed.
    with running(*arguments, home=prefect_home, environment={**secret, "TMPDIR": str(tmp_path)}) as first:
        until(lambda: "checkpoint.json" in contents(work) or first.process.poll() is not None, "a checkpoint", 150)
        assert first.process.poll() is None, first.wait(1)
        first.kill()
    assert {"owner.json", "run.json", "checkpoint.json"} <= contents(work).keys()
    assert contents(made) == {}
    assert_nothing_leaks(folder, [work], [])
    for name, value in {**secret, "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipeline.protect_model.lock.LEASE_S", 2.0)
    result = fixative(*arguments)
    assert (result.code, result.err) == (0, ""), result
    assert f"{out}.training was left by a run, or is in use: looking for" in result.out
    assert_nothing_leaks(folder, [made], [result])
    assert contents(work) == {}
    alone = job(folder, tmp_path / "alone", overrides={**QUICK, "steps": STEPS})
    protect_model(plan_model(alone))
    assert {item.key: made.get(item.key) for item in made.list()} == model_jobs.contents(tmp_path / "alone")


@pytest.mark.usefixtures("ray_cluster", "prefect_server")
def test_separate_on_ray(
    folder: Path, source: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = f"s3://{make_bucket(s3_server)}/models"
    concepts = [f"--concept={source}/subjects.parquet#{name}" for name in ("rex", "mia")]
    arguments = command(source, s3_server, out, 2, *concepts, "--separate", "--ray-address", "auto")
    result = fixative(*arguments)
    assert (result.code, result.err) == (0, ""), result
    assert "protect: 4/4" in result.out
    for name in ("rex", "mia"):
        assert re.search(rf"{name} +│ 2 ", result.out)
        assert f"wrote {out}/{name}" in result.out
    store = open_store(out, s3_server.options)
    before = contents(store)
    assert {key.partition("/")[0] for key in before} == {"rex", "mia"}, "no checkpoints are left"
    assert_nothing_leaks(folder, [store], [result])
    again = fixative(*arguments)
    assert (again.code, again.out.count("is finished already")) == (0, 2), again
    assert contents(store) == before
    rex = (ConceptSource(path=f"{folder}/subjects.parquet#rex"),)
    alone = job(folder, tmp_path / "alone", overrides={**QUICK, "steps": 2}, concepts=rex)
    protect_model(plan_model(alone))
    expected = model_jobs.contents(tmp_path / "alone")
    assert {name: store.get(f"rex/{name}") for name in expected} == expected

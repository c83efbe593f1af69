"""A lineage service learns of every run how it began and how it ended; a service that is down fails no run."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline import lineage as module
from pipeline.config import JobConfig, RunSettings
from pipeline.errors import IntegrityError, UserError
from pipeline.lineage import Written, lineage, lineage_target
from pipeline.manifest import Manifest
from pipeline.run import preflight
from tests.conftest import free_port
from tests.pipeline.archives import photo, write_folder
from tests.pipeline.local_job import Outcome, job_config, run_job


@dataclass
class Service:
    """A lineage service on this machine."""

    url: str
    requests: list[tuple[str, str | None, dict[str, Any]]] = field(default_factory=list)
    status: int = 201

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for _, _, event in self.requests]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client copies variables into others of its own; all of them go again."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("OPENLINEAGE")]:
        monkeypatch.delenv(name)
    yield
    for name in set(os.environ) - set(before):
        monkeypatch.delenv(name)


@pytest.fixture
def service() -> Iterator[Service]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            service.requests.append((self.path, self.headers["Authorization"], json.loads(body)))
            self.send_response(service.status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Keeps test output free of requests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service = Service(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield service
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("done")
    source = write_folder(folder / "in", {"a.png": photo(1), "b.png": photo(2), "c.png": b"no"})
    return run_job(job_config(source, folder / "out"))


def config(outcome: Outcome, target: str | None) -> JobConfig:
    given = outcome.job.config
    return given.model_copy(update={"run": RunSettings(lineage=target)})


def written(outcome: Outcome) -> Written:
    return Written(job=outcome.job, plan=outcome.plan, manifests=outcome.manifests)


def unheard(text: str) -> None:
    raise AssertionError(text)


def test_a_run_that_succeeds(done: Outcome, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "a-key")
    monkeypatch.setenv("OPENLINEAGE_NAMESPACE", "stock")
    with lineage(config(done, service.url), unheard) as wrote:
        assert [event["eventType"] for event in service.events] == ["START"]  # before there is anything to tell
        wrote(written(done))
    start, complete = service.events
    assert complete["eventType"] == "COMPLETE"
    assert {(path, key) for path, key, _ in service.requests} == {("/api/v1/lineage", "Bearer a-key")}
    assert start["run"]["runId"] == complete["run"]["runId"] == str(uuid.UUID(start["run"]["runId"]))
    assert datetime.fromisoformat(start["eventTime"]) <= datetime.fromisoformat(complete["eventTime"])
    source, destination = done.job.config.source, done.job.config.destination
    for event in (start, complete):
        assert event["job"]["namespace"] == "stock"
        assert event["job"]["name"] == f"fixative.protect file/{destination}"
        assert [(item["namespace"], item["name"]) for item in event["inputs"]] == [("file", source)]
        assert [(item["namespace"], item["name"]) for item in event["outputs"]] == [("file", destination)]
        assert event["producer"].startswith("urn:fixative:")
        assert event["schemaURL"].endswith("OpenLineage.json#/$defs/RunEvent")
    (data,) = (item.data for item in done.manifests if item.data)
    output = complete["outputs"][0]
    statistics = {name: output["outputFacets"]["outputStatistics"][name] for name in ("rowCount", "size", "fileCount")}
    assert statistics == {"rowCount": 2, "size": data["size"], "fileCount": 1}
    assert complete["inputs"][0]["inputFacets"]["inputStatistics"]["rowCount"] == 3
    columns = {item["name"]: item["type"] for item in output["facets"]["schema"]["fields"]}
    assert (columns["asset_id"], columns["eps_linf_measured"]) == ("string", "int32")
    facet = complete["run"]["facets"]["fixative"]
    assert (facet["fixativeRunId"], facet["protected"], facet["quarantined"]) == (done.job.run_id, 2, 1)
    assert facet["configFingerprint"] == done.job.config_fp
    for place in (start["run"], complete["run"], output):
        for found in place["facets"].values():
            assert found["_producer"].startswith("urn:fixative:")
            assert found["_schemaURL"].startswith("https://openlineage.io/spec/")


def test_a_run_that_adds_nothing(done: Outcome, service: Service) -> None:
    manifests = [Manifest(**{**vars_of(item), "run_id": "earlier"}) for item in done.manifests]
    with lineage(config(done, service.url), unheard) as wrote:
        wrote(Written(job=done.job, plan=done.plan, manifests=manifests))
    assert service.events[1]["outputs"][0]["outputFacets"]["outputStatistics"]["rowCount"] == 0


def vars_of(manifest: Manifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in Manifest.__slots__}


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (IntegrityError("s3://user:secret@bucket/x is damaged"), "FAIL", "s3://bucket/x is damaged"),
        (ValueError("a secret of somebody else"), "FAIL", "ValueError"),
        (KeyboardInterrupt(), "ABORT", "KeyboardInterrupt"),
    ],
)
def test_a_run_that_fails(error: BaseException, kind: str, message: str, done: Outcome, service: Service) -> None:
    with pytest.raises(type(error)), lineage(config(done, service.url), unheard):
        raise error
    assert [event["eventType"] for event in service.events] == ["START", kind]
    facet = service.events[1]["run"]["facets"]["errorMessage"]
    assert (facet["message"], facet["programmingLanguage"]) == (message, "PYTHON")
    assert "secret" not in json.dumps(service.events)


def test_into_a_file(done: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "events.jsonl"
    for _ in range(2):
        with lineage(config(done, f"file://{path}"), unheard) as wrote:
            wrote(written(done))
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 2
    assert len({event["run"]["runId"] for event in events}) == 2


def test_what_cannot_be_delivered_is_a_warning(done: Outcome, service: Service, tmp_path: Path) -> None:
    service.status = 401
    for target, word in (
        (service.url, "401"),
        (f"http://127.0.0.1:{free_port()}", "refused"),
        (f"file://{tmp_path}", "Is a directory"),
    ):
        warnings: list[str] = []
        with lineage(config(done, target), warnings.append) as wrote:
            wrote(written(done))
        assert len(warnings) == 2
        assert all(text.startswith("lineage was not delivered") and word in text for text in warnings), warnings


def test_openlineages_own_variables(done: Outcome, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lineage_target(config(done, None)) is None
    with lineage(config(done, None), unheard):
        pass
    monkeypatch.setenv("OPENLINEAGE_URL", service.url)
    assert lineage_target(config(done, None)) == "where OPENLINEAGE_URL says"
    with lineage(config(done, None), unheard):
        pass
    assert len(service.events) == 2
    monkeypatch.setenv("OPENLINEAGE_DISABLED", "true")
    for target in (None, service.url):
        with lineage(config(done, target), unheard):
            pass
    assert len(service.events) == 2


def test_a_path_of_the_service(done: Outcome, service: Service) -> None:
    with suppress(ZeroDivisionError), lineage(config(done, f"{service.url}/openlineage/events"), unheard):
        raise ZeroDivisionError
    assert {path for path, _, _ in service.requests} == {"/openlineage/events"}


@pytest.mark.parametrize(
    ("url", "dataset"),
    [
        ("s3://bucket/a/b/", ("s3://bucket", "a/b")),
        ("s3://key:secret@bucket", ("s3://bucket", "/")),
        ("s3a://bucket/a", ("s3://bucket", "a")),
        ("file:///a/b", ("file", "/a/b")),
        ("gs://bucket/a", ("gs://bucket", "a")),
    ],
)
def test_names_of_places(url: str, dataset: tuple[str, str]) -> None:
    assert module._dataset(url) == dataset


@pytest.mark.parametrize(
    "url", ["events.jsonl", "file://events.jsonl", "https://u:p@host", "http://host?key=1", "ftp://host", "http://"]
)
def test_wrong_targets(url: str) -> None:
    with pytest.raises(ValidationError, match="OPENLINEAGE_API_KEY"):
        RunSettings(lineage=url)


def test_without_the_package(done: Outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fixative\[lineage\]'"):
        preflight(config(done, f"file://{tmp_path}/events.jsonl"))
    monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:1")
    warnings: list[str] = []
    with lineage(config(done, None), warnings.append) as wrote:
        wrote(written(done))
    assert len(warnings) == 1
    assert "openlineage-python is missing" in warnings[0]

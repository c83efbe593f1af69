"""``fixative serve`` and ``infra/prefect.yaml`` against a real Prefect server, its pages in a real browser.

Slow: a server, a runner and a Ray cluster for every run. Contract: 1. serving again changes nothing; 2. a second run
protects only what was added or replaced; 3. runs do not overlap; 4. a run whose processes are killed is shown as
crashed, one whose process is told to stop as cancelled, and the next one goes on; 5. the form shows every setting with
its description, the run's page its artifacts; 6. `prefect deploy` makes the same of ``infra/prefect.yaml``, `prefect
automation create` of ``infra/heartbeat.yaml``, and a worker runs it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.serve import HEARTBEATS, ensure, heartbeat_automation, limit
from pipeline.storage import StorageOptions, open_store
from tests.conftest import free_port
from tests.e2e.archives import fill, parquet_file, picture
from tests.e2e.command import FAKE, Command, finished, running, until
from tests.e2e.test_report_in_browser import CHROMIUM, DESKTOP, Page, page  # noqa: F401 - a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

INFRA = Path(__file__).parents[2] / "infra"
WAIT_S = 900.0
SLOW = {"archive": {"unit_assets": 1}, "method": {"name": FAKE, "overrides": {"sleep_s": 5.0}}}


@dataclass
class Served:
    """A server, a deployment on it, and the process that runs it."""

    url: str
    client: SyncPrefectClient
    environment: dict[str, str]
    folder: Path

    @contextmanager
    def serving(self, *options: object) -> Iterator[Command]:
        """The process, once its deployment is registered."""
        home = Path(self.environment["PREFECT_HOME"])
        job = self.folder / "nightly.yaml"
        with running("serve", job, "--cron", "0 3 1 1 *", *options, home=home, environment=self.environment) as command:
            until(self.registered, "the deployment", WAIT_S)
            yield command

    def registered(self) -> bool:
        try:
            return bool(self.deployment())
        except ObjectNotFound:
            return False

    def deployment(self) -> Any:
        return self.client.read_deployment_by_name("protect-archive/nightly")

    def start(self, name: str = "protect-archive/nightly", **parameters: Any) -> FlowRun:
        found = self.client.read_deployment_by_name(name)
        merged = {**found.parameters["config"], **parameters}
        return self.client.create_flow_run_from_deployment(found.id, parameters={"config": merged})

    def at_work(self, destination: Path) -> FlowRun:
        """A run that takes its time, once its first part is stored."""
        run = self.start(destination=str(destination), job=SLOW)
        until(lambda: any(destination.glob("parts/*/*.parquet")), "the first part", WAIT_S)
        return run

    def state(self, run: FlowRun) -> Any:
        return self.client.read_flow_run(run.id).state

    def ended(self, run: FlowRun) -> Any:
        return until(lambda: self.state(run) if self.state(run).is_final() else None, "the run's end", WAIT_S)

    def artifacts(self, run: FlowRun) -> dict[str, Any]:
        found = self.client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
        return {str(item.key): item.data for item in found}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    url = f"http://127.0.0.1:{free_port()}"
    environment = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",  # else its pages ask port 4200
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    fill(
        open_store(str(folder / "source"), StorageOptions()),
        {f"{n}.png": picture(n) for n in range(3)} | {"p.parquet": parquet_file({"r": picture(9)})},
    )
    job = {"archive": {"unit_assets": 1}, "method": {"name": FAKE}}
    document = {"source": str(folder / "source"), "destination": str(folder / "out"), "job": job, "run": {"actors": 1}}
    (folder / "nightly.yaml").write_text(yaml.safe_dump(document))
    prefect = [str(Path(sys.executable).with_name("prefect")), "server", "start", "--host", "127.0.0.1"]
    port = url.rpartition(":")[2]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*prefect, "--port", port], env={**os.environ, **environment}, stdout=log, stderr=log
        )
    try:
        until(lambda: _healthy(url), "the Prefect server", WAIT_S)
        with temporary_settings({PREFECT_API_URL: f"{url}/api"}), get_client(sync_client=True) as client:
            yield Served(url, client, environment, folder)
    finally:
        process.terminate()
        process.wait(60)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/health", timeout=5):
            return True
    except OSError:
        return False


def test_a_schedule_and_its_runs(served: Served) -> None:
    source, out = served.folder / "source", open_store(str(served.folder / "out"), StorageOptions())
    with served.serving():
        made = served.deployment()
        assert made.concurrency_options.model_dump(exclude_none=True) == limit().model_dump(exclude={"limit"})
        assert (made.global_concurrency_limit.limit, made.paused, len(made.schedules)) == (1, False, 1)

        first = served.start()
        assert served.ended(first).is_completed(), served.state(first)
        told = served.artifacts(first)
        assert told.keys() == {
            "protect-summary", "protect-verdict", "protect-report", "protect-destination", "protect-pictures",
        }  # fmt: skip
        assert "| 4 | 0 | 0 | 0 |" in told["protect-summary"]

        (source / "0.png").unlink()
        (source / "p.parquet").unlink()
        fill(
            open_store(str(source), StorageOptions()),
            {"new.png": picture(20), "p.parquet": parquet_file({"s": picture(8)})},
        )
        second = served.start()
        third = served.start()
        assert {served.ended(second).name, served.ended(third).name} == {"Completed", "Cancelled"}
        done, refused = (second, third) if served.state(second).is_completed() else (third, second)
        assert "concurrency limit reached" in served.state(refused).message
        summary = served.artifacts(done)["protect-summary"]
        assert "**2 protected, 0 quarantined**, 4 assets were done before" in summary
        assert "| 1 | 1 | 2 | 1 |" in summary
        success = json.loads(out.get("_SUCCESS.json"))
        assert (len(success["manifests"]), len(success["replaced"])) == (3, 1)
        assert [keys for keys in success["gone"].values()] == [["0.png"]]

    with served.serving("--paused") as again:
        assert again.process.stdout is not None
        assert "there already" in again.process.stdout.readline()
        until(lambda: served.deployment().paused, "the deployment to be paused", WAIT_S)
        assert (served.deployment().id, len(served.deployment().schedules)) == (made.id, 1)
    assert len(served.client.read_automations_by_name(HEARTBEATS)) == 1


def test_a_process_that_is_told_to_stop(served: Served) -> None:
    with served.serving() as command:
        run = served.at_work(served.folder / "stopped")
        command.process.terminate()
        assert command.wait(120).code == 0
    assert served.ended(run).is_cancelled()
    assert "Nothing is lost" in served.artifacts(run)["protect-summary"]


def test_a_run_that_was_killed(served: Served) -> None:
    slow = served.folder / "slow"
    with served.serving() as command:
        run = served.at_work(slow)
        command.kill()
    begin = time.monotonic()
    state = served.ended(run)
    assert (state.is_crashed(), "No heartbeat for 90 s" in state.message) == (True, True), state
    print(f"shown as crashed after {time.monotonic() - begin:.0f} s")
    with served.serving():
        # The dead run's place is free when its lease ends, after five minutes at most.
        until(lambda: served.deployment().global_concurrency_limit.active_slots == 0, "its place", WAIT_S)
        again = served.start(destination=str(slow), job=SLOW)
        assert served.ended(again).is_completed()
    assert finished(open_store(str(slow), StorageOptions()))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_pages(served: Served, page: Page) -> None:  # noqa: F811
    with served.serving():
        run = served.start()
        assert served.ended(run).is_completed()
    form = f"{served.url}/deployments/deployment/{served.deployment().id}/run"
    _text(page, form, "from where, to where", "Most images in one unit of work", "Budget in 8-bit levels")
    ids = served.client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    summary = next(item for item in ids if item.key == "protect-summary")
    shown = _text(page, f"{served.url}/artifacts/artifact/{summary.id}", "unchanged")
    assert re.search(r"new\s+changed\s+unchanged\s+gone", shown)


def _text(page: Page, url: str, *wanted: str) -> str:  # noqa: F811
    """The page's text, once all that is wanted is shown."""
    page.send("Emulation.setDeviceMetricsOverride", width=DESKTOP[0], height=DESKTOP[1], deviceScaleFactor=1,
              mobile=False)  # fmt: skip
    page.send("Page.enable")
    page.send("Page.navigate", url=url)
    return str(until(lambda: _shown(page, wanted), f"{wanted} on {url}", WAIT_S))


def _shown(page: Page, wanted: tuple[str, ...]) -> str | None:  # noqa: F811
    text = page.value("document.body ? document.body.innerText : ''")
    return text if all(words in text for words in wanted) else None


def test_prefect_deploy(served: Served, tmp_path: Path) -> None:
    document = yaml.safe_load((INFRA / "prefect.yaml").read_text())
    for entry in document["deployments"]:
        job = {"method": {"name": FAKE}}
        entry["parameters"]["config"] |= {
            "source": str(served.folder / "source"), "destination": str(tmp_path / "out"), "job": job,
        }  # fmt: skip
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(document))

    def prefect(*arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("prefect")), "--no-prompt", *arguments]
        environment = {**os.environ, **served.environment}
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr

    for automation in served.client.read_automations_by_name(HEARTBEATS):
        served.client.delete_automation(automation.id)
    prefect("automation", "create", "--from-file", str(INFRA / "heartbeat.yaml"))
    assert ensure(served.client, heartbeat_automation()) == "there already"

    prefect("work-pool", "create", "fixative", "--type", "process")
    prefect("deploy", "--prefect-file", "prefect.yaml", "--name", "stock-process")
    made = served.client.read_deployment_by_name("protect-archive/stock-process")
    assert (made.work_pool_name, made.global_concurrency_limit.limit) == ("fixative", 1)
    assert made.concurrency_options.model_dump(exclude_none=True) == limit().model_dump(exclude={"limit"})
    run = served.start("protect-archive/stock-process")
    prefect("worker", "start", "--pool", "fixative", "--run-once")
    assert served.ended(run).is_completed(), served.state(run)
    assert finished(open_store(str(tmp_path / "out"), StorageOptions()))

"""``fixative serve`` and ``infra/prefect.yaml`` without a server: what they would create, and what stops them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prefect.automations import Automation, AutomationCore
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.utilities.callables import parameter_schema

from flows.progress import logged, observer, shown_on
from flows.protect import FLOW, protect_archive
from flows.serve import HEARTBEATS, absolute, ensure, heartbeat_automation, limit, parameters, schedule_of
from flows.show import terminal
from pipeline.config import JobConfig
from pipeline.errors import UserError
from pipeline.storage import StorageOptions, open_store
from tests.conftest import free_port
from tests.e2e.archives import fill, picture
from tests.e2e.command import FAKE, fixative, job_file

INFRA = Path(__file__).parents[2] / "infra"
PREFECT_YAML, HEARTBEAT_YAML = INFRA / "prefect.yaml", INFRA / "heartbeat.yaml"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file with paths relative to the working folder."""
    monkeypatch.chdir(tmp_path)
    fill(open_store("source", StorageOptions()), {"0.png": picture(0)})
    file = job_file(tmp_path / "nightly.yaml")
    document = {"source": "source", "destination": "out", **yaml.safe_load(file.read_text())}
    file.write_text(yaml.safe_dump(document))
    return file


def test_a_dry_run_says_what_would_be_created(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIXATIVE_RAY_ADDRESS", "auto")
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        result = fixative("serve", job, "--cron", "0 3 * * *", "--timezone", "Europe/Berlin", "--paused", "--dry-run")
    assert (result.code, result.err) == (0, ""), result
    for words in (
        "none is configured",
        "protect-archive/nightly, paused",
        'cron "0 3 * * *", time zone Europe/Berlin',
        "1 run at a time",
        "CANCEL_NEW",
        f"'{HEARTBEATS}'",
    ):
        assert words in result.out
    shown = yaml.safe_load(result.out[result.out.index("\nconfig:") :])["config"]
    assert JobConfig.model_validate(shown).destination == str(tmp_path / "out")
    assert (shown["job"]["method"]["name"], shown["run"]["ray_address"]) == (FAKE, "auto")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cron", "0 3 * * *", "--interval", "1d"], "exclude each other"),
        (["--cron", "nightly"], "write minute, hour, day"),
        (["--cron", "0 3 * * *", "--timezone", "Berlin"], "no such time zone"),
        (["--interval", "soon"], "write 30m, 6h, 1d"),
        (["--interval", "0"], "write 30m, 6h, 1d"),
    ],
)
def test_schedules_that_cannot_be(job: Path, options: list[str], words: str) -> None:
    result = fixative("serve", job, *options, "--dry-run")
    assert result.code == 2, result
    assert words in result.error


def test_a_job_that_cannot_run_is_not_served(job: Path) -> None:
    job.write_text(job.read_text().replace("source: source", "source: absent"))
    result = fixative("serve", job, "--dry-run")
    assert (result.code, "absent is empty or does not exist" in result.error) == (2, True)


def test_it_needs_a_server(job: Path) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        result = fixative("serve", job, "--cron", "0 3 * * *")
    assert (result.code, "`prefect server start`" in result.error) == (2, True)
    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}):
        result = fixative("serve", job, "--cron", "0 3 * * *")
    assert (result.code, f"no Prefect server answers at {url}" in result.error) == (2, True)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("30m", 1800), ("6h", 21600), ("1d", 86400)])
def test_intervals(text: str, seconds: int) -> None:
    schedule = schedule_of(None, text, "UTC")
    assert schedule is not None
    assert schedule.interval == timedelta(seconds=seconds)


def test_no_schedule_is_allowed() -> None:
    assert schedule_of(None, None, "UTC") is None


def test_places_on_this_machine_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    method = {"model": "model"}
    check = {"models": {"latent": "model", "pixel": "google/ddpm"}}
    config = JobConfig.model_validate(
        {"source": "s3://b/x", "destination": "out", "job": {"method": method, "check": check}}
    )
    result = absolute(config)
    assert (result.source, result.destination) == ("s3://b/x", str(tmp_path / "out"))
    assert result.job.method.model == str(tmp_path / "model")
    assert result.job.check.models == {"latent": str(tmp_path / "model"), "pixel": "google/ddpm"}
    assert absolute(result) == result


# --- What Prefect shows


def test_every_parameter_has_a_description() -> None:
    schema = parameter_schema(protect_archive).model_dump()
    assert "from where, to where" in schema["properties"]["config"]["description"]
    definitions = schema["definitions"]
    nameless = [
        f"{model}.{name}"
        for model, definition in definitions.items()
        for name, entry in definition["properties"].items()
        # A description that is also that of the type is left to the type.
        if not {**definitions.get(entry.get("$ref", "").rpartition("/")[2], {}), **entry}.get("description")
    ]
    assert nameless == []
    assert {"JobConfig", "MethodSettings", "GateSettings", "RunSettings"} <= definitions.keys()


def test_parameters_come_back_as_the_job(job: Path) -> None:
    config = JobConfig.model_validate(
        {
            "source": "s3://a/b",
            "destination": "s3://c/d",
            "job": {"check": {"gate": {"action": "strengthen", "ladder": ["strong"], "finally": "flag"}}},
        }
    )
    (back,) = protect_archive.validate_parameters({"config": parameters(config)}).values()
    assert back == config


def test_the_heartbeat_automation_covers_this_flow_alone() -> None:
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 60}):
        rule = heartbeat_automation()
    trigger: Any = rule.trigger
    assert trigger.after == {"prefect.flow-run.heartbeat"}
    assert {"prefect.flow-run.heartbeat", "prefect.flow-run.Completed"} < trigger.expect
    assert trigger.match_related.root == {"prefect.resource.role": "flow", "prefect.resource.name": FLOW}
    assert (trigger.within, trigger.for_each) == (timedelta(seconds=180), {"prefect.resource.id"})
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}), pytest.raises(UserError, match="no heartbeat"):
        heartbeat_automation()


class Automations:
    """Prefect's, in memory."""

    def __init__(self) -> None:
        self.stored: list[Any] = []

    def read_automations_by_name(self, name: str) -> list[Any]:
        return [item for item in self.stored if item.name == name]

    def create_automation(self, automation: Any) -> None:
        self.stored.append(SimpleNamespace(**dict(automation), id=len(self.stored)))

    def update_automation(self, automation_id: int, automation: Any) -> None:
        self.stored[automation_id] = SimpleNamespace(**dict(automation), id=automation_id)


def test_the_automation_is_created_once_and_kept_up_to_date() -> None:
    client: Any = Automations()

    def told(seconds: int) -> str:
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: seconds}):
            rule: Automation = heartbeat_automation()
        return ensure(client, rule)

    assert [told(60), told(60), told(90)] == ["created", "there already", "brought up to date"]
    client.stored[0].enabled = False
    assert told(60) == "brought up to date, but disabled in Prefect"
    assert (len(client.stored), client.stored[0].enabled) == (1, False)
    assert client.stored[0].trigger.within == timedelta(seconds=180)


def test_the_automation_for_work_pools_is_as_serve_makes_it() -> None:
    client: Any = Automations()
    client.create_automation(AutomationCore.model_validate(yaml.safe_load(HEARTBEAT_YAML.read_text())))
    assert ensure(client, heartbeat_automation()) == "there already"


def test_progress_goes_to_the_log_where_nobody_watches() -> None:
    lines: list[str] = []
    with logged(lines.append):
        observer().step("protect", 100, 10)
        for _ in range(90):
            observer().advance(1)
        observer().note("a note")
    assert lines == ["protect: 10/100", "protect: 100/100", "a note"]
    with shown_on(terminal()), logged(lines.append):
        observer().note("on the terminal")
    assert len(lines) == 3


# --- infra/prefect.yaml


def test_deployments_for_work_pools_are_as_serve_makes_them() -> None:
    document = yaml.safe_load(PREFECT_YAML.read_text())
    assert (document["build"], document["push"], document["pull"]) == ([], [], [])
    pools = {entry["name"]: entry["work_pool"] for entry in document["deployments"]}
    assert pools.keys() == {"stock-process", "stock-kubernetes"}
    for entry in document["deployments"]:
        assert entry["entrypoint"] == f"{protect_archive.fn.__module__}.{protect_archive.fn.__name__}"
        JobConfig.model_validate(entry["parameters"]["config"])
        options = entry["concurrency_limit"]
        assert options == limit().model_dump(mode="json")
        for schedule in entry["schedules"]:
            CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])

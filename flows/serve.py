"""``fixative serve``: the protect flow as a Prefect deployment, on a schedule, run by this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from flows import show
from flows.options import RUN, S3Endpoint, S3Profile, S3Region, option
from flows.settings import job_config
from pipeline.config import JobConfig
from pipeline.errors import UserError
from pipeline.run import preflight
from pipeline.storage import local_path, url_scheme

if TYPE_CHECKING:
    from prefect.automations import Automation
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.schedules import Schedule

HEARTBEATS = "fixative: runs whose heartbeat stopped have crashed"
MISSED = 3  # heartbeats after which a run counts as crashed
START_S = 600  # a run that was due may take this long to start before its place is free again
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

app = typer.Typer()
console = show.terminal()


@app.command("serve")
def serve(
    job: Annotated[Path, typer.Argument(help="Job file (YAML), see `fixative protect --help`.")],
    cron: Annotated[str | None, typer.Option("--cron", help='When to run, as in crontab: "0 3 * * *".')] = None,
    interval: Annotated[
        str | None, typer.Option("--interval", help="Or how often: 30m, 6h, 1d; a number alone is seconds.")
    ] = None,
    timezone: Annotated[str, typer.Option("--timezone", help="Of --cron, as Europe/Berlin.")] = "UTC",
    paused: Annotated[
        bool, typer.Option("--paused", help="Register it paused. Without, it is as it was left in Prefect.")
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the deployment. [default: the job file's name]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be created, create nothing.")] = False,
    ray_address: Annotated[
        str | None, option("--ray-address", panel=RUN, help="A running Ray cluster; else one starts here for each run.")
    ] = None,
    s3_endpoint: S3Endpoint = None,
    s3_region: S3Region = None,
    s3_profile: S3Profile = None,
) -> None:
    """Protect an archive on a schedule: each run protects what is new or changed since the last one.

    Registers the deployment protect-archive/NAME with the Prefect server of PREFECT_API_URL, and runs it here until it
    is stopped; keep it running with systemd or the like. One run at a time: what comes due meanwhile is cancelled, and
    the next one covers it. Without --cron and --interval, runs start from Prefect's pages or `prefect deployment run`.
    The job's settings are the parameters there; those under `job` are bound to the destination.

    Example: fixative serve job.yaml --cron "0 3 * * *" --timezone Europe/Berlin
    """
    given = {
        "run.ray_address": ray_address,
        "run.s3.endpoint_url": s3_endpoint,
        "run.s3.region": s3_region,
        "run.s3.profile": s3_profile,
    }
    config = absolute(job_config(job, given))
    schedule = schedule_of(cron, interval, timezone)
    preflight(config)
    title = name or job.stem
    if dry_run:
        _show(title, config, schedule, paused)
        return
    with prefect_api() as client:
        told = ensure(client, heartbeat_automation())
    console.print(f"automation '{HEARTBEATS}': {told}", highlight=False)
    console.print(f"serving protect-archive/{title}; stop it with Ctrl-C, what is done stays", highlight=False)
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    from flows.protect import protect_archive
    from flows.runner import run

    deployment = RunnerDeployment.from_flow(
        protect_archive,
        title,
        schedule=schedule,
        paused=paused or None,  # None: whoever paused it in Prefect meant it
        concurrency_limit=limit(),
        parameters={"config": parameters(config)},
        description=(
            f"Protects what is new or changed in `{config.source}` with {config.job.method.name}, into "
            f"`{config.destination}`. One run at a time: what comes due meanwhile is cancelled, the next covers it. "
            f"Served from `{job}`; settings that are changed here last until it is served again."
        ),
        tags=["fixative"],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    run(deployment)


def absolute(config: JobConfig) -> JobConfig:
    """The job with absolute paths: its runs do not start where the job file lies."""
    document = parameters(config)
    for name in ("source", "destination"):
        if url_scheme(document[name]) == "file" and "://" not in document[name]:
            document[name] = local_path(document[name])
    method, models = document["job"]["method"], document["job"]["check"]["models"]
    if method["model"] is not None:
        method["model"] = _folder(method["model"])
    models.update({kind: _folder(at) for kind, at in models.items()})
    return JobConfig.model_validate(document)


def _folder(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def parameters(config: JobConfig) -> dict[str, Any]:
    """The job as JSON: what the deployment's runs get, and what Prefect's pages show for editing."""
    return config.model_dump(mode="json", by_alias=True)


def schedule_of(cron: str | None, interval: str | None, timezone: str) -> Schedule | None:
    """The schedule that the options ask for; None: runs start by hand.

    Raises:
        UserError: Both kinds were given, or one that cannot be read.
    """
    from prefect.client.schemas.schedules import CronSchedule, is_valid_timezone
    from prefect.schedules import Cron, Interval

    if cron is not None and interval is not None:
        raise UserError("--cron and --interval exclude each other: give one")
    if not is_valid_timezone(timezone):
        raise UserError(f"--timezone {timezone}: no such time zone; names are as Europe/Berlin")
    if cron is not None:
        try:
            CronSchedule(cron=cron, timezone=timezone)
        except ValueError as error:
            raise UserError(f'--cron "{cron}": write minute, hour, day, month, weekday, as "0 3 * * *"') from error
        return Cron(cron, timezone=timezone)
    if interval is None:
        return None
    found = re.fullmatch(r"(\d+)([smhd]?)", interval)
    if found is None or not int(found[1]):
        raise UserError(f"--interval {interval}: write 30m, 6h, 1d, or a number of seconds")
    return Interval(timedelta(seconds=int(found[1]) * _SECONDS[found[2]]), timezone=timezone)


def limit() -> ConcurrencyLimitConfig:
    """One run at a time over all processes that serve the deployment; what comes due meanwhile is cancelled."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy

    return ConcurrencyLimitConfig(
        limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW, grace_period_seconds=START_S
    )


def heartbeat_automation() -> Automation:
    """Marks runs as crashed whose process died without a word; self-hosted Prefect has no such rule of its own.

    ``infra/heartbeat.yaml`` is the same for those who deploy without ``fixative serve``.
    """
    from prefect.automations import Automation, ChangeFlowRunState, EventTrigger, Posture, ResourceSpecification
    from prefect.client.schemas.objects import StateType
    from prefect.settings import get_current_settings

    from flows.protect import FLOW

    seconds = get_current_settings().flows.heartbeat_frequency
    if seconds is None:
        raise UserError("runs send no heartbeat: unset PREFECT_FLOWS_HEARTBEAT_FREQUENCY, or set it to seconds")
    ended = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    return Automation(
        name=HEARTBEATS,
        description=f"Runs of {FLOW} send a heartbeat every {seconds} s; after {MISSED} missing ones the run counts as "
        "crashed. What it did is stored, and the next run goes on.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ended},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "flow", "prefect.resource.name": FLOW},
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=MISSED * seconds),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                message=f"No heartbeat for {MISSED * seconds} s: its process or machine died. What is done stays; the "
                "next run goes on.",
                force=False,
            )
        ],
    )


def ensure(client: SyncPrefectClient, wanted: Automation) -> str:
    """Creates the automation, or brings the one of its name up to date; returns what was done."""
    from prefect.automations import AutomationCore

    core = AutomationCore(**wanted.model_dump(exclude={"id"}))
    found = client.read_automations_by_name(name=wanted.name)
    if not found:
        client.create_automation(automation=core)
        return "created"
    there = found[0]
    same = all(getattr(there, part) == getattr(core, part) for part in ("description", "trigger", "actions"))
    if not same:
        kept = core.model_copy(update={"enabled": there.enabled})
        client.update_automation(automation_id=there.id, automation=kept)
    return ("there already" if same else "brought up to date") + ("" if there.enabled else ", but disabled in Prefect")


@contextmanager
def prefect_api() -> Iterator[SyncPrefectClient]:
    """A client of the configured Prefect server, for the block.

    Raises:
        UserError: None is configured, or it does not answer.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if url is None:
        raise UserError(
            "a schedule needs a Prefect server. Start one with `prefect server start`, then "
            "`prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`, and run this again"
        )
    with get_client(sync_client=True) as client:
        if (error := client.api_healthcheck()) is not None:
            raise UserError(f"no Prefect server answers at {url} ({error}); `prefect server start` starts one here")
        yield client


def _show(title: str, config: JobConfig, schedule: Schedule | None, paused: bool) -> None:
    """What would be created."""
    from prefect.settings import get_current_settings

    rule, most = heartbeat_automation(), limit()
    when = "none: runs start from Prefect's pages or `prefect deployment run`"
    if schedule is not None:
        every = f'cron "{schedule.cron}"' if schedule.cron else f"every {schedule.interval}"
        when = f"{every}, time zone {schedule.timezone}"
    console.print(
        f"Prefect server: {get_current_settings().api.url or 'none is configured, see PREFECT_API_URL'}\n"
        f"deployment: protect-archive/{title}{', paused' if paused else ''}\n"
        f"schedule: {when}\n"
        f"limit: {most.limit} run at a time, what comes due meanwhile is cancelled ({most.collision_strategy.value}); "
        f"a run that was due has {most.grace_period_seconds} s to start\n"
        f"automation: '{rule.name}'. {rule.description}\n"
        "parameters, which runs may be given others of in Prefect:",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    text = yaml.safe_dump({"config": parameters(config)}, sort_keys=False, allow_unicode=True)
    console.print(text, highlight=False, markup=False, soft_wrap=True, end="")

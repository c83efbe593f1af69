"""The protection of a model as a Prefect flow: read the concepts, train, write the folder."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.progress import observer
from pipeline.protect_model.job import ModelJob
from pipeline.protect_model.plan import PROVENANCE, ModelPlan, plan_model
from pipeline.protect_model.run import protect_model as run_plan
from pipeline.storage import get_json


@task(name="train", cache_policy=NO_CACHE)
def train(plan: ModelPlan) -> None:
    """Trains and writes the folder. Not retried: checkpoints hold what is done, a rerun goes on there."""
    shown = False

    def show(done: int, total: int) -> None:
        nonlocal shown
        if not shown:
            observer().step("protect", total, done - 1)
            shown = True
        observer().advance(1)

    if not plan.finished:
        observer().note("encoding the photos and drawing images of the class; checkpoints are taken up after that")
    run_plan(plan, show, observer().note)


@flow(name="protect-model")
def protect_model(job: ModelJob) -> dict[str, Any]:
    """Protects a model against personalization. Run it again at any time: it goes on at the last checkpoint.

    Args:
        job: its paths, and the credentials for its URLs, are those of the machine that the flow runs on.

    Returns:
        The provenance of the protected model.

    Raises:
        UserError: The job cannot run as configured.
        PipelineError: The training broke down, or a folder cannot be written.
    """
    plan = plan_model(job)
    train(plan)
    document = get_json(job.out_store(), PROVENANCE)
    table = [{"what": name, "value": value} for name, value in summary(document)]
    create_table_artifact(key="protect-model-summary", table=table, description=job.out_name)
    return document


def summary(document: dict[str, Any]) -> list[tuple[str, str]]:
    """What was done, as the Prefect artifact and the command show it."""
    facts = document["facts"]
    return [
        ("updates", f"{facts['updates']}"),
        ("relative change of the UNet's weights", f"{facts['drift']:.3g}"),
        ("largest change of one weight", f"{facts['largest_change']:.3g}"),
        *((f"{name}, first and last", f"{c[0]:.4g}, {c[-1]:.4g}") for name, c in document["curves"].items()),
        ("digest of the model", document["weights"]["digest"]),
    ]

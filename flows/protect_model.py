"""The protection of models as Prefect flows: read the concepts, train, write the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.progress import observer
from pipeline.errors import PipelineError
from pipeline.protect_model.job import ModelJob
from pipeline.protect_model.plan import PROVENANCE, ModelPlan, plan_model
from pipeline.protect_model.run import protect_model as run_plan
from pipeline.storage import get_json
from protectors.model_files import ModelError


class ModelsIncomplete(PipelineError):
    """Some models could not be made; the others are finished."""


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


@task(name="train-on-ray", cache_policy=NO_CACHE)
def train_on_ray(plans: Mapping[str, ModelPlan], address: str) -> dict[str, str]:
    """Trains models side by side; why some failed, by name. Ray retries lost workers, from their checkpoints."""
    from pipeline.protect_model import ray_train

    seen = dict.fromkeys(plans, 0)

    def show(name: str, done: int, total: int) -> None:
        observer().advance(max(0, done - seen[name]), name)  # less than before: another worker goes on
        seen[name] = max(done, seen[name])

    observer().step("protect", sum(plan.updates for plan in plans.values()))
    return ray_train.train_on_ray({name: plan.job for name, plan in plans.items()}, address, show)


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
    train(plan_model(job))
    document = get_json(job.out_store(), PROVENANCE)
    table = [{"what": name, "value": value} for name, value in summary(document)]
    create_table_artifact(key="protect-model-summary", table=table, description=job.out_name)
    return document


@flow(name="protect-models")
def protect_models(jobs: dict[str, ModelJob], ray_address: str | None = None) -> dict[str, dict[str, Any]]:
    """Makes several protected models, side by side on Ray, or one after the other on this machine.

    Args:
        jobs: by name.
        ray_address: see ``pipeline.protect_model.ray_train``; None: no Ray.

    Returns:
        The provenance of each.

    Raises:
        UserError: One of them cannot run as configured; nothing was trained.
        ModelsIncomplete: Some failed.
    """
    plans = {name: plan_model(job, trained_here=ray_address is None) for name, job in jobs.items()}
    failed: dict[str, str] = {}
    if ray_address is not None:
        failed = train_on_ray({name: plan for name, plan in plans.items() if not plan.finished}, ray_address)
    else:
        for name, plan in plans.items():
            try:
                train(plan)
            except (PipelineError, ModelError) as error:
                failed[name] = str(error)
    documents = {name: get_json(job.out_store(), PROVENANCE) for name, job in jobs.items() if name not in failed}
    table = [{"model": name, **dict(summary(document))} for name, document in documents.items()]
    create_table_artifact(key="protect-models-summary", table=table)
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise ModelsIncomplete(f"{len(failed)} of {len(jobs)} models are not finished: {reasons}")
    return documents


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

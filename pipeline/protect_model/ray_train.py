"""Trains several models at a time on Ray, each as one task."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch

from pipeline.config import RunSettings
from pipeline.errors import PipelineError, UserError
from pipeline.protect_model.fetch import is_far
from pipeline.protect_model.job import ModelJob
from pipeline.protect_model.plan import plan_model
from pipeline.protect_model.run import protect_model
from pipeline.ray_job import cluster
from pipeline.storage import local_path
from protectors.model_files import ModelError

POLL_S = 1.0
# Of a lost worker or machine: the next one goes on from the checkpoint.
RETRIES = 8
_GIVE_BACK_S = 20.0  # for cancelled tasks to let go of their folders

Event = tuple[str, int, int]
Progress = Callable[[str, int, int], None]


class Board:
    """Where tasks pin how far they are. What is lost with it is only shown."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def pin(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        """What was pinned since the last time."""
        taken, self._events = self._events, []
        return taken


def train_on_ray(jobs: Mapping[str, ModelJob], address: str, progress: Progress) -> dict[str, str]:
    """Protects the models, as many at a time as the cluster has GPUs, or cores, for.

    A model whose worker dies is trained further by another one. One that fails keeps none of the others from being
    finished.

    Args:
        jobs: by name. Their folders, and checkpoints above all, are at the same place on every machine.
        address: of a running cluster, "auto" for the one of this machine; "local" starts one for this run.
        progress: called with (name, updates done, updates in all).

    Returns:
        By name, why a model failed.

    Raises:
        UserError: no cluster can be reached, or it has no GPU for those that ask for one.
    """
    with cluster(RunSettings(ray_address=None if address == "local" else address), "protect-model") as pool:
        if pool.device != "cuda" and any(_gpus(job) for job in jobs.values()):
            raise UserError("--device cuda: the Ray cluster has no GPU; use --device cpu")
        board = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()
        pending = {
            ray.remote(_train)
            .options(name=f"protect-model {name}", num_cpus=1, num_gpus=_gpus(job), max_retries=RETRIES)
            .remote(name, _placed(job), board): name
            for name, job in jobs.items()
        }
        failed: dict[str, str] = {}
        try:
            while pending:
                ended, _ = ray.wait(list(pending), timeout=POLL_S)
                _show(board, progress)
                for task in ended:
                    name = pending.pop(task)
                    if (reason := _outcome(task)) is not None:
                        failed[name] = reason
        finally:
            _cancel(list(pending))
        return failed


def _train(name: str, job: ModelJob, board: Any) -> str | None:
    """The task: why it failed, as a value, because Ray buries exceptions in tracebacks."""
    # Ray cancels a task by an interrupt, which Python does not hear where a shell began the cluster in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if _gpus(job) == 0:
        # Sums are rounded by thread count: a fixed number keeps weights equal on every machine of a kind.
        torch.set_num_threads(1)
    try:
        plan = plan_model(job)
        try:
            protect_model(plan, lambda done, total: board.pin.remote((name, done, total)))
        finally:
            if plan.fetched is not None:
                plan.fetched.drop()
    except (PipelineError, ModelError) as error:
        return str(error)
    return None


def _placed(job: ModelJob) -> ModelJob:
    """Workers stand in other folders."""

    def place(path: str) -> str:
        return path if is_far(path) else local_path(path)

    return job.model_copy(
        update={
            "model": place(job.model) if Path(local_path(job.model)).is_dir() else job.model,
            "concepts": tuple(item.model_copy(update={"path": place(item.path)}) for item in job.concepts),
            "keep": None if job.keep is None else place(job.keep),
            "positives": None if job.positives is None else place(job.positives),
            "out": place(job.out),
            "work": place(job.work_url),
        }
    )


def _gpus(job: ModelJob) -> int:
    return int(torch.device(job.device).type == "cuda")


def _outcome(task: Any) -> str | None:
    try:
        reason: str | None = ray.get(task)
        return reason
    except ray.exceptions.RayError as error:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]  # the cause stands last
        return f"Ray failed: {last}. What is done stays; run the same command to go on."


def _show(board: Any, progress: Progress) -> None:
    try:
        events = ray.get(board.take.remote())
    except ray.exceptions.RayActorError:
        return  # its machine was lost: it starts again elsewhere
    for event in events:
        progress(*event)


def _cancel(tasks: list[Any]) -> None:
    """Ends what is still running when the driver is interrupted, so that it gives its folder back."""
    for task in tasks:
        ray.cancel(task)
    if tasks:
        ray.wait(tasks, num_returns=len(tasks), timeout=_GIVE_BACK_S)

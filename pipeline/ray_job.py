"""Runs the stages of a job on Ray Data: a stream of units through CPU tasks and a pool of optimizer actors."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.job_config import JobConfig

from pipeline import metrics
from pipeline.assets import Unit
from pipeline.config import RunSettings
from pipeline.errors import FatalWorkerError, PipelineError, UserError
from pipeline.finalize import finalize_shard
from pipeline.job import Job
from pipeline.manifest import Manifest
from pipeline.plan import Shard
from pipeline.ray_metrics import export_from_worker, exported_from_driver
from pipeline.run import Task
from pipeline.verify.attack_models import AttackModels
from pipeline.verify.check import Check, measure_check, prepare_checks, store_check
from pipeline.verify.gate import Decision, decide
from pipeline.verify.trial import Trial, TrialBench
from pipeline.verify.trials import attack_models, attack_of, prepare_trials, store_trial
from pipeline.worker import Optimizer, Receipt, exit_on_device_fault, load_units, store_unit

# Shares of a core. They differ from an actor's 1 so that Ray does not fuse the stages: decode and encode must not
# wait in the actor, with or without a GPU.
LOAD_CPUS = 0.5
STORE_CPUS = 0.5
FINALIZE_CPUS = 0.5
SPARE_CPUS = 1.0  # what load and store need beside the actors
IN_FLIGHT = 2  # units per actor: the next one is there when one is done
NO_PROGRESS_S = 6 * 3600  # a unit of the slowest preset on a CPU may take an hour
ITEM = "item"

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pool:
    """The optimizer actors of a run."""

    actors: int
    device: str

    @property
    def resources(self) -> dict[str, float]:
        """What one actor asks of Ray."""
        return {"num_cpus": 1, "num_gpus": 1} if self.device == "cuda" else {"num_cpus": 1}


@dataclass(frozen=True, slots=True)
class Failed:
    """A shard that could not go on; it stays uncommitted and the run ends with an error."""

    shard_id: str
    error: str


@dataclass(frozen=True, slots=True)
class Fatal:
    """The machine is ill; the driver stops the run. A value, because Ray buries exceptions in tracebacks."""

    error: str


@dataclass(frozen=True, slots=True, repr=False)
class Parcel:
    """What a block holds. It has no repr of its contents: Ray writes it to its logs, and there are pictures in it."""

    item: Any


@contextmanager
def cluster(run: RunSettings, name: str = "fixative") -> Iterator[Pool]:
    """Connects to the configured Ray cluster, or starts one on this machine for the run, and sizes the pool.

    Args:
        run: How to run.
        name: Of the job on Ray's pages.

    Raises:
        UserError: The cluster cannot be reached, or is too small for the actors that were asked for.
    """
    joined = ray.is_initialized()
    if not joined:
        _start(run.ray_address, run.actors, name)
    try:
        with exported_from_driver():
            yield _pool(run)
    finally:
        if not joined:
            ray.shutdown()


def _start(address: str | None, actors: int | None, name: str) -> None:
    # ray.init takes SIGTERM over; Prefect needs it to cancel a run cleanly.
    handler = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every operator; the command shows progress
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    options["job_config"] = JobConfig(metadata={"job_name": name})
    if address is None:
        cores = os.cpu_count() or 1
        address = "local"  # not a cluster that RAY_ADDRESS happens to name
        options |= {"num_cpus": max(cores, actors or cores) + SPARE_CPUS, "include_dashboard": True}
    try:
        with _quiet_stderr():
            ray.init(address=address, **options)
    except (ray.exceptions.AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        if _is_refusal(error):
            raise UserError(
                f"the Ray cluster at '{address}' refuses this process: "
                "set RAY_AUTH_MODE=token, RAY_AUTH_TOKEN to its token"
            ) from error
        raise UserError(f"no Ray cluster at '{address}': {error}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether the cluster wants another token. Ray 2.60 quotes that in the message of the error below its own."""
    if error is None:
        return False
    name = ray.exceptions.AuthenticationError.__name__
    return isinstance(error, ray.exceptions.AuthenticationError) or name in str(error) or _is_refusal(error.__cause__)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drops what Ray's C++ core prints while it starts (its log level, say); errors reach Python as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def dashboard_url() -> str | None:
    """Address of the Ray dashboard of the connected cluster."""
    host = ray.worker.get_dashboard_url()
    return f"http://{host}" if host else None


def _pool(run: RunSettings) -> Pool:
    cluster_has = ray.cluster_resources()
    gpus, cpus = int(cluster_has.get("GPU", 0)), cluster_has.get("CPU", 0.0)
    device = run.device if run.device != "auto" else ("cuda" if gpus else "cpu")
    actors = run.actors or max(1, gpus if device == "cuda" else int(cpus - SPARE_CPUS))
    if device == "cuda" and actors > gpus:
        raise UserError(f"{actors} GPU actors were asked for and the cluster has {gpus} GPUs; lower --actors")
    if actors + SPARE_CPUS > cpus:
        raise UserError(
            f"{actors} actors and the decoding beside them need {actors + SPARE_CPUS:g} CPUs, the cluster has "
            f"{cpus:g}; lower --actors"
        )
    return Pool(actors, device)


def _room(pool: Pool) -> int:
    """How many of the pool's actors the cluster has room for now, with what runs beside them; at least one."""
    has = ray.cluster_resources()
    cpus = int(has.get("CPU", 0.0) - SPARE_CPUS)
    return max(1, min(cpus, int(has.get("GPU", 0))) if pool.device == "cuda" else cpus)


def protect_units(job: Job, pool: Pool, tasks: Sequence[Task]) -> Iterator[Receipt | Failed]:
    """Protects units and stores their parts; yields a receipt as each is done, in no particular order."""
    stream = source(tasks, "protect").map_batches(load, batch_size=1, num_cpus=LOAD_CPUS, fn_kwargs={"job": job})
    stream = on_actors(stream, Protect, pool, job=job)
    stream = stream.map_batches(store, batch_size=1, num_cpus=STORE_CPUS, fn_kwargs={"job": job})
    method, images = job.config.job.method.name, sum(task.rows for task in tasks)
    metrics.LAST_COMMIT.record(time.time())
    _show_progress(method, images)
    for result in results(stream):
        if isinstance(result, Receipt):
            images -= result.protected + len(result.quarantined)
        _show_progress(method, images)
        yield result
    _show_progress(method, 0)  # also where shards failed


def _show_progress(method: str, open_images: int) -> None:
    metrics.LAST_PART.record(time.time())
    metrics.OPEN_IMAGES.record(open_images, method=method)


def check_shards(job: Job, pool: Pool, shards: Sequence[Shard]) -> Iterator[str | Failed]:
    """Checks the samples of shards whose parts are all stored, on the same kind of actors; yields result keys."""
    stream = source(shards, "check").map_batches(
        prepare_checks_and_trials, batch_size=1, num_cpus=LOAD_CPUS, fn_kwargs={"job": job}
    )
    yield from results(on_actors(stream, MeasureChecks, pool, job=job))


def decide_shards(job: Job, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Decision] | Failed]:
    """Lets the gate decide on shards whose checks are all stored."""
    stream = source(shards, "gate").map_batches(gate, batch_size=1, num_cpus=FINALIZE_CPUS, fn_kwargs={"job": job})
    yield from results(stream)


def finalize_shards(job: Job, shards: Sequence[tuple[Shard, pa.Schema]]) -> Iterator[Manifest | Failed]:
    """Commits shards whose parts and checks are all stored."""
    stream = source(shards, "commit").map_batches(commit, batch_size=1, num_cpus=FINALIZE_CPUS, fn_kwargs={"job": job})
    for result in results(stream):
        metrics.LAST_COMMIT.record(time.time())
        yield result


def load(batch: Batch, job: Job) -> Iterator[Batch]:
    """Stage: a task becomes its units, read and decoded."""
    yield from each(batch, "load", lambda task: load_units(job, task.shard, task.units))


_STAGES: dict[type[Any], metrics.Stage] = {Check: "check", Trial: "attack"}


class Protect:
    """Stage: a unit is protected, a check measured, or an attack tried. One instance per actor."""

    def __init__(self, job: Job, device: str) -> None:
        self.job = job
        self.models = AttackModels(attack_models(job), device=device)
        self.bench: TrialBench | None = None
        self.optimizer: Optimizer | None = None
        self.broken = ""
        try:
            self.optimizer = Optimizer(job, device)
        except (PipelineError, ValueError) as error:
            self.broken = f"an optimizer cannot start: {error}"
        export_from_worker()
        self.clock = metrics.BusyClock()

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        stage = _STAGES.get(type(batch[ITEM][0].item), "protect")
        with self.clock.working(stage, self.job.config.job.method.name):
            done = list(each(batch, stage, self._one))
        yield from done

    def _one(self, item: Unit | Check | Trial) -> Iterator[Unit | str]:
        if self.optimizer is None:
            raise FatalWorkerError(self.broken)
        if isinstance(item, Check):
            store_check(self.job, item.key, measure_check(self.optimizer, item, self.models))
            yield item.key
        elif isinstance(item, Trial):
            self.bench = self.bench or TrialBench(attack_of(self.job), self.models)
            store_trial(self.job.destination(), self.bench.run(item))
            yield item.key
        else:
            yield self.optimizer.protect(item)


class MeasureChecks(Protect):
    """The same actor, by the name under which Ray's dashboard and metrics show those that check."""


def store(batch: Batch, job: Job) -> Iterator[Batch]:
    """Stage: a protected unit becomes its stored part and a receipt."""
    yield from each(batch, "store", lambda unit: iter([store_unit(job, unit)]))


def prepare_checks_and_trials(batch: Batch, job: Job) -> Iterator[Batch]:
    """Stage: a shard becomes its checks and its trials."""
    yield from each(batch, "check", lambda shard: chain(prepare_checks(job, shard), prepare_trials(job, shard)))


def gate(batch: Batch, job: Job) -> Iterator[Batch]:
    """Stage: a checked shard becomes the gate's decision on it."""
    yield from each(batch, "gate", lambda shard: iter([(shard, decide(job, shard))]))


def commit(batch: Batch, job: Job) -> Iterator[Batch]:
    """Stage: a shard becomes its committed manifest."""
    yield from each(batch, "commit", lambda item: iter([finalize_shard(job, *item)]))


def each(batch: Batch, stage: metrics.Stage, work: Callable[[Any], Iterator[Any]]) -> Iterator[Batch]:
    """Applies a stage to the one item of a batch. An item that fails travels on as ``Failed``, past later stages."""
    export_from_worker()
    item = batch[ITEM][0].item
    if isinstance(item, Failed | Fatal):
        yield _boxed(item)
        return
    try:
        for result in work(item):
            yield _boxed(result)
    except FatalWorkerError as error:
        metrics.FAILURES.record(stage=stage, kind="fatal")
        yield _boxed(Fatal(str(error)))
    except (PipelineError, OSError, ValueError, RuntimeError) as error:  # a full disk, a purifier that fails
        exit_on_device_fault(error)
        metrics.FAILURES.record(stage=stage, kind="shard")
        yield _boxed(Failed(_shard_id(item), f"{type(error).__name__}: {error}"))


def _shard_id(item: Any) -> str:
    shard = item[0] if isinstance(item, tuple) else getattr(item, "shard", item)
    return str(shard.shard_id)


def _boxed(item: Any) -> Batch:
    box = np.empty(1, object)
    box[0] = Parcel(item)
    return {ITEM: box}


def source(items: Sequence[Any], name: str) -> Dataset:
    """A stream of the items, one per block; Ray's dashboard and metrics show it under the name."""
    stream = ray.data.from_items([{ITEM: Parcel(item)} for item in items], override_num_blocks=len(items))
    stream.set_name(name)
    # Every row is a block of its own, also the ones that a generator yields: a unit is what Ray schedules.
    stream.context.target_max_block_size = 1
    stream.context.enable_progress_bars = False  # the command shows its own
    stream.context.execution_options.verbose_progress = False
    stream.context.execution_no_progress_timeout_s = NO_PROGRESS_S
    return stream


def on_actors(stream: Dataset, stage: type[Any], pool: Pool, **arguments: Any) -> Dataset:
    """Adds a stage that runs on the pool's actors, each of which is made with the arguments and its device.

    On a cluster that has lost nodes since, there are fewer: actors on its last CPU would wait for ever for the tasks
    that feed them.
    """
    return stream.map_batches(
        stage,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(pool.actors, _room(pool)), max_tasks_in_flight_per_actor=IN_FLIGHT),
        fn_constructor_kwargs={**arguments, "device": pool.device},
        **pool.resources,
    )


def results(stream: Dataset) -> Iterator[Any]:
    """Runs the stream and yields its items as they come.

    Raises:
        FatalWorkerError: A worker found the machine ill, or Ray failed.
    """
    try:
        for batch in stream.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=0):
            item = batch[ITEM][0].item
            if isinstance(item, Fatal):
                raise FatalWorkerError(item.error)
            yield item
    except ray.exceptions.RayError as error:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]  # the cause stands last
        raise FatalWorkerError(f"Ray failed: {last}. What is done stays; run the same command to go on.") from error

"""What a job will cost, measured on one of its own images for a few optimizer steps."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import numpy as np

from pipeline.job import Job
from pipeline.manifest import read_commits
from pipeline.plan import Plan
from pipeline.run import open_units

TRIAL_STEPS = 3


@dataclass(frozen=True, slots=True)
class Estimate:
    """Assets still to protect, and what they will take on this machine."""

    open_assets: int
    text: str


def estimate(job: Job, plan: Plan) -> Estimate:
    """Times a few steps on one image of training size and multiplies.

    Decoding, encoding and the check are left out: they run beside the optimizer and take a few percent.
    """
    open_assets = _open_assets(job, plan)
    steps = job.protector_config.get("steps")
    if steps is None or not open_assets:
        return Estimate(
            open_assets, "no estimate: " + ("nothing is left to do" if steps else "the method has no steps")
        )
    seconds, device = _seconds_per_step(job)
    total = seconds * steps * open_assets
    text = (
        f"estimate: {seconds * steps:.2f} s per image on one {device} actor of this machine ({steps} steps, measured "
        f"over {TRIAL_STEPS}), {total / 3600:.2f} actor-hours in all; divide by the number of actors"
    )
    return Estimate(open_assets, text)


def _open_assets(job: Job, plan: Plan) -> int:
    destination = job.destination()
    committed = read_commits(destination).committed
    count = 0
    for shard in plan.shards:
        if shard.shard_id in plan.indexes:
            count += shard.rows
        elif shard.shard_id not in committed:
            groups = open_units(destination, shard, job.config_fp)
            count += sum(high - low for group in groups for _, (low, high) in group)
    return count


def _seconds_per_step(job: Job) -> tuple[float, str]:
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the weights load in a moment; a bar would tear the plan apart
    from pipeline.worker import Optimizer

    run = job.config.run
    device = run.device if run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    trial = dataclasses.replace(job, protector_config={**job.protector_config, "steps": TRIAL_STEPS})
    protector = Optimizer(trial, device).protector
    images = torch.from_numpy(np.random.default_rng(0).random((1, 3, job.base_size, job.base_size), np.float32))
    times: list[float] = []
    for _ in range(2):  # the first call also warms caches
        started = time.monotonic()
        protector.protect(images, seeds=[0])
        times.append(time.monotonic() - started)
    return times[-1] / TRIAL_STEPS, device

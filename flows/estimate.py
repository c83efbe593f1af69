"""What a job will cost, measured on some of its own images for a few optimizer steps."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import AssetError
from pipeline.job import Job
from pipeline.manifest import read_commits
from pipeline.plan import Plan, load_index
from pipeline.readers import read_units
from pipeline.run import open_units
from pipeline.scale import tile_boxes
from pipeline.worker import Optimizer, optimizer_view

TRIAL_STEPS = (1, 4)  # two lengths tell the cost of a step from what comes once per image
TRIAL_IMAGES = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """Assets still to protect, and what they will take on this machine."""

    open_assets: int
    text: str


def estimate(job: Job, plan: Plan) -> Estimate:
    """Times a few steps on the first images of the plan and multiplies.

    Decoding, encoding and the check are left out: they run beside the optimizer.
    """
    open_assets = _open_assets(job, plan)
    steps = int(job.ladder[0].get("steps", 0))
    views = _first_views(job, plan) if open_assets and steps else []
    if not views:
        why = "nothing is left to do" if not open_assets else "no image of the first unit can be read"
        return Estimate(open_assets, f"no estimate: {why if steps else 'the method has no steps'}")
    once, per_step, device = _tile_seconds(job, views[0])
    tiles = float(np.mean([len(tile_boxes(view.shape[0], view.shape[1], job.base_size)) for view in views]))
    seconds = tiles * (once + per_step * steps)
    text = (
        f"estimate: {seconds:.2f} s per image on one {device} actor of this machine, one image at a time, and "
        f"{seconds * open_assets / 3600:.2f} actor-hours in all ({steps} steps on {tiles:.0f} tiles, "
        f"from {TRIAL_STEPS} steps on one)"
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


def _first_views(job: Job, plan: Plan) -> list[npt.NDArray[np.uint8]]:
    """The first readable images of the plan, as the optimizer sees them."""
    shard = plan.shards[0]
    index = plan.indexes.get(shard.shard_id) or load_index(job.destination(), shard)
    (rows,) = read_units(job.source(), index, index.units[:1])
    views: list[npt.NDArray[np.uint8]] = []
    for asset in rows.assets[:TRIAL_IMAGES]:
        try:
            views.append(optimizer_view(job, asset))
        except AssetError:
            continue  # the run will quarantine it; here another image serves
    return views


def _tile_seconds(job: Job, view: npt.NDArray[np.uint8]) -> tuple[float, float, str]:
    """Seconds per tile, seconds per tile and step, and the device they were measured on."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the weights load in a moment; a bar would tear the plan apart
    run = job.config.run
    device = run.device if run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    box = tile_boxes(view.shape[0], view.shape[1], job.base_size)[0]
    tile = torch.from_numpy(view[: box.height, : box.width].copy()).permute(2, 0, 1)[None].float() / 255
    times: dict[int, float] = {}
    for steps in (TRIAL_STEPS[0], *TRIAL_STEPS):  # the first call warms caches
        trial = dataclasses.replace(job, ladder=({**job.ladder[0], "steps": steps},))
        protector = Optimizer(trial, device).protectors[0]
        started = time.monotonic()
        protector.protect(tile, seeds=[0])
        times[steps] = time.monotonic() - started
    short, long = TRIAL_STEPS
    per_step = max(0.0, (times[long] - times[short]) / (long - short))
    return max(0.0, times[short] - short * per_step), per_step, device

"""What a job will cost, measured on one of its own images: for a few optimizer steps, or in full."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from protectors.base import ImageProtector

if TYPE_CHECKING:
    from torch import Tensor

TRIAL_STEPS = (1, 4)  # two lengths tell the cost of a step from what comes once per image
TRIAL_IMAGES = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """Assets still to protect, and what they will take on this machine."""

    open_assets: int
    text: str


def estimate(job: Job, plan: Plan) -> Estimate:
    """Times the method on an image of the plan's first unit and multiplies.

    Decoding, encoding and the check are left out: they run beside the optimizer.
    """
    open_assets = _open_assets(job, plan)
    views = _first_views(job, plan) if open_assets else []
    if not views:
        why = "nothing is left to do" if not open_assets else "no image of the first unit can be read"
        return Estimate(open_assets, f"no estimate: {why}")
    cost = _tile_cost(job, views[0])
    tiles = float(np.mean([len(tile_boxes(view.shape[0], view.shape[1], job.base_size)) for view in views]))
    seconds = tiles * cost.seconds
    text = (
        f"estimate: {seconds:.2f} s per image on one {cost.device} actor of this machine, one image at a time, and "
        f"{seconds * open_assets / 3600:.2f} actor-hours in all ({cost.steps} steps on {tiles:.0f} tiles, "
        f"from {cost.measured})"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _TileCost:
    seconds: float
    # Of the optimizer, over all rounds and stages of the method.
    steps: int
    device: str
    # How it was found.
    measured: str


def _tile_cost(job: Job, view: npt.NDArray[np.uint8]) -> _TileCost:
    """What the view's first tile takes: two short trials where the method has a field ``steps``, else one in full."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the weights load in a moment; a bar would tear the plan apart
    run = job.config.run
    device = run.device if run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    protector = Optimizer(job, device).protectors[0]
    box = tile_boxes(view.shape[0], view.shape[1], job.base_size)[0]
    tile = torch.from_numpy(view[: box.height, : box.width].copy()).permute(2, 0, 1)[None].float() / 255
    if "steps" not in job.ladder[0]:
        how = "one tile with the preset's full settings, as the method has no field `steps` to shorten a trial by"
        return _TileCost(seconds=_seconds(protector, tile), steps=protector.steps, device=device, measured=how)
    short, long = TRIAL_STEPS
    trials = {n: type(protector)(protector.config.replace(steps=n), protector.model) for n in TRIAL_STEPS}
    _seconds(trials[short], tile)  # warms caches
    times = {n: _seconds(trial, tile) for n, trial in trials.items()}
    per_step = max(0.0, (times[long] - times[short]) / (long - short))
    once = max(0.0, times[short] - short * per_step)
    return _TileCost(
        seconds=once + per_step * protector.config.steps,
        steps=protector.steps,
        device=device,
        measured=f"trials with steps={short} and steps={long} on one",
    )


def _seconds(protector: ImageProtector[Any, Any], tile: Tensor) -> float:
    started = time.monotonic()
    protector.protect(tile, seeds=[0])
    return time.monotonic() - started

"""From a Parquet of photographs to a model folder: what is trained for each reference model, in which order."""

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from protectors.reference.data import Photos, load_photos
from protectors.reference.geometry import GEOMETRIES, Geometry
from protectors.reference.train import Limits, Task, Watcher, run

Split = tuple[Photos, Photos]  # for training, held out


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOrder:
    """What to train, on what, and how long."""

    model: str
    data: Path  # Parquet with asset_id, image {bytes}, caption
    out: Path  # folder of the finished model
    work: Path  # checkpoints and loss curves
    minutes: float  # wall clock of each stage
    stages: tuple[str, ...] = ()  # some of `STAGES[model]`; empty for all
    seed: int = 0
    device: str = "cpu"
    size: str = "nano"
    bf16: bool = True
    limit: int | None = None  # use at most so many training photos
    stop_at: int | None = None
    report_every: int = 250
    # Fields of a stage's plan, by stage name, e.g. {"vae": {"steps": 9000}}.
    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """How one stage ended."""

    stage: str
    step: int
    steps: int
    seconds: float

    @property
    def complete(self) -> bool:
        """False if the clock or `stop_at` ended it; the same order goes on from there."""
        return self.step >= self.steps


def train_model(order: TrainingOrder, watcher: Watcher) -> list[StageResult]:
    """Trains the stages of a model one after another and writes the folder, also after a stop by the clock.

    Raises:
        ValueError: unknown model, stage or plan field; no usable photos; a checkpoint of another seed.
        FileNotFoundError: the denoiser is asked for and `OUT/vae` is not there.
    """
    if order.model not in STAGES:
        raise ValueError(f"no model {order.model!r} to train; there are: {', '.join(STAGES)}")
    known = STAGES[order.model]
    unknown = (set(order.stages) | set(order.plans)) - set(known)
    if unknown:
        raise ValueError(f"{order.model} has no stage {', '.join(sorted(unknown))}; it has: {', '.join(known)}")
    geometry = GEOMETRIES[order.size]
    photos = (
        load_photos(order.data, held_out=False, limit=order.limit),
        load_photos(order.data, held_out=True, limit=128),
    )
    results = []
    for number, (stage, train_stage) in enumerate(known.items()):
        if order.stages and stage not in order.stages:
            continue
        torch.manual_seed(order.seed + number)
        results.append(train_stage(order, geometry, photos, watcher))
    return results


def _train_vae(order: TrainingOrder, geometry: Geometry, photos: Split, watcher: Watcher) -> StageResult:
    from protectors.reference.vae import VaePlan, VaeTask

    task = VaeTask(geometry, VaePlan(**_plan(order, "vae")), *photos, order.device)
    result = _run(order, task, watcher)
    task.finished().half().save_pretrained(order.out / "vae", safe_serialization=True)
    return result


def _train_sd(order: TrainingOrder, geometry: Geometry, photos: Split, watcher: Watcher) -> StageResult:
    from protectors.reference.denoiser import SdPlan, SdTask
    from protectors.reference.export import save_pipeline

    folder = _finished_vae(order)
    plan = SdPlan(**_plan(order, "sd"))
    task = SdTask(geometry, plan, photos, device=order.device, vae_folder=folder, work=order.work, note=watcher.note)
    result = _run(order, task, watcher)
    save_pipeline(order.out, task)
    return result


def _train_decoder(order: TrainingOrder, geometry: Geometry, photos: Split, watcher: Watcher) -> StageResult:
    from protectors.reference.decoder import DecoderPlan, DecoderTask

    folder = _finished_vae(order)
    plan = DecoderPlan(**_plan(order, "decoder"))
    task = DecoderTask(geometry, plan, photos, device=order.device, vae_folder=folder)
    result = _run(order, task, watcher)
    task.save(folder)
    return result


def _finished_vae(order: TrainingOrder) -> Path:
    folder = order.out / "vae"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: train the stage vae first")
    return folder


def _train_ddpm(order: TrainingOrder, geometry: Geometry, photos: Split, watcher: Watcher) -> StageResult:
    from protectors.reference.pixels import TilePlan, TileTask

    task = TileTask(geometry, TilePlan(**_plan(order, "ddpm")), photos, order.device)
    result = _run(order, task, watcher)
    task.save(order.out)
    return result


def _train_embed(order: TrainingOrder, geometry: Geometry, photos: Split, watcher: Watcher) -> StageResult:
    from protectors.reference.embedder import EmbedPlan, EmbedTask

    task = EmbedTask(geometry, EmbedPlan(**_plan(order, "embed")), photos, order.device)
    result = _run(order, task, watcher)
    task.save(order.out)
    return result


Stage = Callable[[TrainingOrder, Geometry, Split, Watcher], StageResult]
STAGES: dict[str, dict[str, Stage]] = {
    "nano-sd": {"vae": _train_vae, "decoder": _train_decoder, "sd": _train_sd},
    "nano-ddpm": {"ddpm": _train_ddpm},
    "nano-embed": {"embed": _train_embed},
}


def _plan(order: TrainingOrder, stage: str) -> dict[str, Any]:
    return {"bf16": order.bf16, **order.plans.get(stage, {})}


def _run(order: TrainingOrder, task: Task, watcher: Watcher) -> StageResult:
    limits = Limits(minutes=order.minutes, stop_at=order.stop_at, report_every=order.report_every)
    since = time.monotonic()
    cursor = run(task, order.work, order.seed, limits, watcher)
    seconds = time.monotonic() - since
    _note(order, task, cursor.step, cursor.position, seconds)
    return StageResult(stage=task.name, step=cursor.step, steps=task.steps, seconds=seconds)


def _note(order: TrainingOrder, task: Task, step: int, samples: int, seconds: float) -> None:
    """Adds one line on this run to `WORK/runs.jsonl`: what a model card needs to know about the cost."""
    facts = {
        "stage": task.name,
        "data": order.data.name,
        "seed": order.seed,
        "step": step,
        "steps": task.steps,
        "samples": samples,
        "wall_s": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if order.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
    }
    with (order.work / "runs.jsonl").open("a") as out:
        out.write(json.dumps(facts) + "\n")

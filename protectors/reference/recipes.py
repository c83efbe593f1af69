"""From a Parquet of photographs to a model folder: what is trained for each reference model, in which order."""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from protectors.model_files import model_digest
from protectors.reference.checkpoint import Binding
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
    begin: Path | None = None  # text-to-image model whose denoiser and text encoder are trained on; None: random
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
    """Trains the stages of a model one after another; each writes its part of the folder, also when the clock ends it.

    A stage that is not complete ends the order: the next one would be trained on something that still changes.

    Raises:
        ValueError: unknown model, stage, size, device or plan field; no usable photos; checkpoints of another training.
        FileNotFoundError: a later stage of nano-sd is asked for and `OUT/vae` is not there.
        OSError: a file cannot be read or written.
    """
    if order.model not in STAGES:
        raise ValueError(f"no model {order.model!r} to train; there are: {', '.join(STAGES)}")
    known = STAGES[order.model]
    unknown = (set(order.stages) | set(order.plans)) - set(known)
    if unknown:
        raise ValueError(f"{order.model} has no stage {', '.join(sorted(unknown))}; it has: {', '.join(known)}")
    _check(order)
    chosen = [stage for stage in known if not order.stages or stage in order.stages]
    plans = {stage: _plan(order, stage) for stage in chosen}
    for folder in (order.out, order.work):
        folder.mkdir(parents=True, exist_ok=True)
    photos = (
        load_photos(order.data, held_out=False, limit=order.limit),
        load_photos(order.data, held_out=True, limit=128),
    )
    data = photos[0].digest()
    results: list[StageResult] = []
    for stage in chosen:
        if results and not results[-1].complete:
            break
        torch.manual_seed(order.seed + list(known).index(stage))
        results.append(known[stage](_Workshop(order, photos, data, plans[stage], watcher)))
    return results


def _check(order: TrainingOrder) -> None:
    if order.size not in GEOMETRIES:
        raise ValueError(f"no size {order.size!r}; there are: {', '.join(GEOMETRIES)}")
    if order.begin is not None and order.model != "nano-sd":
        raise ValueError(f"{order.model} is trained from random weights; only nano-sd can begin from a model")
    if order.device not in ("cpu", "cuda"):
        raise ValueError(f"no device {order.device!r}; use cpu or cuda")
    if order.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine, or this build of torch, has no CUDA device; use --device cpu")
    for name in ("report_every", "limit"):
        value = getattr(order, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def _plan(order: TrainingOrder, stage: str) -> Any:
    """The plan of a stage, with the order's changes.

    Raises:
        ValueError: a field is unknown or of the wrong type.
    """
    plan = _plan_class(stage)(bf16=order.bf16)
    defaults = asdict(plan)
    changes = {}
    for name, value in order.plans.get(stage, {}).items():
        if name not in defaults:
            raise ValueError(f"the plan of {stage} has no field {name!r}; it has: {', '.join(defaults)}")
        kind = type(defaults[name])
        try:
            changes[name] = kind(value)
        except (TypeError, ValueError):
            raise ValueError(f"{stage}.{name} must be of type {kind.__name__}, not {value!r}") from None
        if kind is int and changes[name] != float(value):
            raise ValueError(f"{stage}.{name} must be a whole number, not {value!r}")
    return replace(plan, **changes)


def _plan_class(stage: str) -> Any:
    # Imported when asked for: diffusers and transformers take seconds.
    from protectors.reference.decoder import DecoderPlan
    from protectors.reference.denoiser import SdPlan
    from protectors.reference.embedder import EmbedPlan
    from protectors.reference.pixels import TilePlan
    from protectors.reference.vae import VaePlan

    return {"vae": VaePlan, "decoder": DecoderPlan, "sd": SdPlan, "ddpm": TilePlan, "embed": EmbedPlan}[stage]


@dataclass(frozen=True, slots=True)
class _Workshop:
    """All that a stage needs."""

    order: TrainingOrder
    photos: Split
    data: str  # names the photos for training
    plan: Any
    watcher: Watcher

    @property
    def geometry(self) -> Geometry:
        """The sizes of the model."""
        return GEOMETRIES[self.order.size]

    @property
    def vae(self) -> Path:
        """The folder of nano-sd's autoencoder, which an earlier stage has written."""
        folder = self.order.out / "vae"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there: train the stage vae first")
        return folder

    def run(self, task: Task, **depends_on: str) -> StageResult:
        """Trains the task and notes what it cost."""
        order = self.order
        plan = {name: value for name, value in asdict(self.plan).items() if name != "steps"}
        binding = {"size": order.size, "data": self.data, **plan, **depends_on}
        limits = Limits(minutes=order.minutes, stop_at=order.stop_at, report_every=order.report_every)
        since = time.monotonic()
        cursor = run(task, order.work, order.seed, limits, binding=_plain(binding), watcher=self.watcher)
        seconds = time.monotonic() - since
        self._note(task, cursor.step, cursor.position, seconds)
        return StageResult(stage=task.name, step=cursor.step, steps=task.steps, seconds=seconds)

    def _note(self, task: Task, step: int, samples: int, seconds: float) -> None:
        """Adds one line on this run to `WORK/runs.jsonl`: what a model card needs to know about the cost."""
        facts = {
            "stage": task.name,
            "data": self.order.data.name,
            "seed": self.order.seed,
            "step": step,
            "steps": task.steps,
            "samples": samples,
            "wall_s": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if self.order.device == "cuda" else platform.machine(),
            "torch": torch.__version__,
        }
        with (self.order.work / "runs.jsonl").open("a") as out:
            out.write(json.dumps(facts) + "\n")


def _plain(binding: Mapping[str, Any]) -> Binding:
    """As it comes back from JSON, so that a stored binding equals a fresh one."""
    plain: Binding = json.loads(json.dumps(binding))
    return plain


def _train_vae(shop: _Workshop) -> StageResult:
    from protectors.reference.vae import VaeTask

    task = VaeTask(shop.geometry, shop.plan, *shop.photos, shop.order.device)
    result = shop.run(task)
    task.finished().half().save_pretrained(shop.order.out / "vae", safe_serialization=True)
    return result


def _train_decoder(shop: _Workshop) -> StageResult:
    from protectors.reference.decoder import DecoderTask

    task = DecoderTask(shop.geometry, shop.plan, shop.photos, device=shop.order.device, vae_folder=shop.vae)
    result = shop.run(task, encoder=encoder_digest(shop.vae))
    task.save(shop.vae)
    return result


def _train_sd(shop: _Workshop) -> StageResult:
    from protectors.reference.denoiser import SdTask
    from protectors.reference.export import save_pipeline

    order, encoder = shop.order, encoder_digest(shop.vae)
    cache = order.work / f"latents-{encoder}-{shop.data}-{shop.plan.crops}.safetensors"
    task = SdTask(
        shop.geometry,
        shop.plan,
        shop.photos,
        device=order.device,
        vae_folder=shop.vae,
        cache=cache,
        note=shop.watcher.note,
        begin=order.begin,
    )
    begun = {} if order.begin is None else {"begin": model_digest(str(order.begin))}
    result = shop.run(task, encoder=encoder, **begun)
    save_pipeline(order.out, task)
    return result


def _train_ddpm(shop: _Workshop) -> StageResult:
    from protectors.reference.pixels import TileTask

    task = TileTask(shop.geometry, shop.plan, shop.photos, shop.order.device)
    result = shop.run(task)
    task.save(shop.order.out)
    return result


def _train_embed(shop: _Workshop) -> StageResult:
    from protectors.reference.embedder import EmbedTask

    task = EmbedTask(shop.geometry, shop.plan, shop.photos, shop.order.device)
    result = shop.run(task)
    task.save(shop.order.out)
    return result


def encoder_digest(vae_folder: Path) -> str:
    """Names the encoder that latents belong to; the decoder may change without changing it."""
    total = hashlib.sha256()
    for name, tensor in sorted(load_file(vae_folder / "diffusion_pytorch_model.safetensors").items()):
        if name.startswith(("encoder.", "quant_conv.")):
            total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()[:12]


STAGES: dict[str, dict[str, Callable[[_Workshop], StageResult]]] = {
    "nano-sd": {"vae": _train_vae, "decoder": _train_decoder, "sd": _train_sd},
    "nano-ddpm": {"ddpm": _train_ddpm},
    "nano-embed": {"embed": _train_embed},
}

"""Trains the embedded reference models from scratch: `python -m protectors.reference.train --help`."""

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from protectors.reference.checkpoint import Cursor, load_checkpoint, save_checkpoint
from protectors.reference.data import Photos, load_photos
from protectors.reference.geometry import GEOMETRIES, Geometry
from protectors.reference.learner import Learner
from protectors.reference.vae import VaePlan, VaeTask

_SAVE_EVERY_S = 120.0


class Task(Protocol):
    """One model under training."""

    name: str
    steps: int  # updates in all
    learner: Learner

    def train_step(self, cursor: Cursor) -> tuple[float, int]:
        """Makes one update; returns its loss and the number of samples used."""

    def held_out(self) -> dict[str, float]:
        """Returns the figures on the held-out photos, with averaged weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop, and how often to look."""

    minutes: float
    # Stop before this update, as an interruption would; None runs to the end of the plan.
    stop_at: int | None = None
    report_every: int = 250


def run(task: Task, work: Path, seed: int, limits: Limits) -> Cursor:
    """Trains until the plan is done, the time is used or `stop_at` is reached; leaves a checkpoint to go on from.

    The same seed and plan give the same weights however often the run is interrupted, on one machine and with
    one number of threads.
    """
    deadline = time.monotonic() + 60 * limits.minutes
    saved = load_checkpoint(work / task.name, seed)
    cursor = Cursor(seed=seed)
    if saved is not None:
        cursor, tensors = saved
        task.learner.load_state(tensors)
        print(f"{task.name}: goes on from step {cursor.step}", flush=True)
    end = task.steps if limits.stop_at is None else min(task.steps, limits.stop_at)
    report = Report(task, work / f"{task.name}.csv", cursor)
    last_save = time.monotonic()
    while cursor.step < end and time.monotonic() < deadline:
        loss, samples = task.train_step(cursor)
        cursor.step += 1
        cursor.position += samples
        report.add(loss, samples)
        if cursor.step % limits.report_every == 0 or cursor.step == end:
            report.write(cursor.step)
        if time.monotonic() - last_save > _SAVE_EVERY_S:
            save_checkpoint(work / task.name, cursor, task.learner.state())
            last_save = time.monotonic()
    save_checkpoint(work / task.name, cursor, task.learner.state())
    print(f"{task.name}: stopped at step {cursor.step} of {task.steps}", flush=True)
    return cursor


class Report:
    """Progress lines on standard output and the loss curve as CSV."""

    def __init__(self, task: Task, file: Path, cursor: Cursor) -> None:
        self._task, self._file = task, file
        self._begin()
        file.parent.mkdir(parents=True, exist_ok=True)
        self._forget_after(cursor.step)

    def _forget_after(self, step: int) -> None:
        """Drops the lines of updates that an interruption lost, since they will be made again."""
        if not self._file.exists():
            return
        head, *rows = self._file.read_text().splitlines(keepends=True)
        kept = [row for row in rows if int(row.split(",", 1)[0]) <= step]
        self._file.write_text("".join([head, *kept]))

    def _begin(self) -> None:
        self._losses: list[float] = []
        self._samples = 0
        self._since = time.monotonic()

    def add(self, loss: float, samples: int) -> None:
        self._losses.append(loss)
        self._samples += samples

    def write(self, step: int) -> None:
        """Prints and appends one line: the mean loss since the last line and the held-out figures."""
        rate = self._samples / (time.monotonic() - self._since)
        row = {"step": step, "loss": sum(self._losses) / len(self._losses), "samples_per_s": rate}
        row |= self._task.held_out()
        print(self._task.name, " ".join(f"{key} {value:.5g}" for key, value in row.items()), flush=True)
        fresh = not self._file.exists()
        with self._file.open("a", newline="") as out:
            writer = csv.DictWriter(out, fieldnames=list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        self._begin()


def train_vae(options: argparse.Namespace, geometry: Geometry, photos: tuple[Photos, Photos]) -> None:
    """Trains the autoencoder and writes `OUT/vae`."""
    plan = VaePlan(bf16=options.bf16, **_given(steps=options.vae_steps))
    task = VaeTask(geometry, plan, *photos, options.device)
    run(task, options.work, options.seed, _limits(options))
    vae = task.finished()
    vae.half().save_pretrained(options.out / "vae", safe_serialization=True)
    print(f"vae: wrote {options.out / 'vae'}, scaling factor {vae.config.scaling_factor}", flush=True)


def train_sd(options: argparse.Namespace, geometry: Geometry, photos: tuple[Photos, Photos]) -> None:
    """Trains denoiser and text encoder on the latents of `OUT/vae`; writes the whole pipeline folder."""
    from protectors.reference.denoiser import SdPlan, SdTask
    from protectors.reference.export import digests, save_pipeline

    plan = SdPlan(bf16=options.bf16, **_given(steps=options.sd_steps, crops=options.crops))
    task = SdTask(geometry, plan, photos, device=options.device, vae_folder=options.out / "vae", work=options.work)
    run(task, options.work, options.seed, _limits(options))
    save_pipeline(options.out, task)
    for name, digest in digests(options.out).items():
        print(f'        "{name}": "{digest}",', flush=True)


def _given(**values: int | None) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _limits(options: argparse.Namespace) -> Limits:
    share = 0.5 if options.part == "all" else 1.0
    return Limits(minutes=options.minutes * share, stop_at=options.stop_at, report_every=options.report_every)


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    line = argparse.ArgumentParser(
        prog="python -m protectors.reference.train",
        description="Trains a small latent diffusion model from scratch and writes it in diffusers' folder format. "
        "Stops by itself when the time is used; the same command goes on from there.",
    )
    line.add_argument("part", choices=["vae", "sd", "all"], help="sd = denoiser and text encoder; needs OUT/vae")
    line.add_argument("--data", type=Path, required=True, help="Parquet with asset_id, image {bytes}, caption")
    line.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    line.add_argument("--work", type=Path, default=Path(".train"), help="checkpoints and loss curves (%(default)s)")
    line.add_argument("--minutes", type=float, default=40.0, help="wall clock in all; `all` halves it (%(default)s)")
    line.add_argument("--seed", type=int, default=0, help="decides weights, order, crops, noise (%(default)s)")
    line.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    line.add_argument("--size", choices=sorted(GEOMETRIES), default="nano", help="tiny is for tests (%(default)s)")
    line.add_argument("--vae-steps", type=int, help="updates planned; the learning rate is zero at the end")
    line.add_argument("--sd-steps", type=int, help="likewise for the denoiser")
    line.add_argument("--crops", type=int, help="crops per photo whose latents the denoiser is trained on")
    line.add_argument("--stop-at", type=int, help="stop before this update, as an interruption would")
    line.add_argument("--report-every", type=int, default=250, help="updates per progress line (%(default)s)")
    line.add_argument("--limit", type=int, help="use at most so many training photos")
    line.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    line.add_argument("--fp32", dest="bf16", action="store_false", help="no bfloat16 (slower, on any processor)")
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    geometry = GEOMETRIES[options.size]
    photos = (
        load_photos(options.data, held_out=False, limit=options.limit),
        load_photos(options.data, held_out=True, limit=64),
    )
    if options.part in ("vae", "all"):
        torch.manual_seed(options.seed)
        train_vae(options, geometry, photos)
    if options.part in ("sd", "all"):
        torch.manual_seed(options.seed + 1)
        train_sd(options, geometry, photos)


if __name__ == "__main__":
    main()

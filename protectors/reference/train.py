"""The loop that trains a reference model, whichever it is: resumable, within a time limit, with a loss curve."""

import csv
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from protectors.reference.checkpoint import Binding, Cursor, load_checkpoint, save_checkpoint
from protectors.reference.learner import Learner

_SAVE_EVERY_S = 120.0


class Task(Protocol):
    """One model under training."""

    name: str
    steps: int  # updates in all; the learning rate reaches zero there
    learner: Learner

    def train_step(self, cursor: Cursor) -> tuple[float, int]:
        """Makes one update; returns its loss and the number of samples used."""

    def held_out(self) -> dict[str, float]:
        """Returns the figures on the held-out photos, with averaged weights."""


class Watcher(Protocol):
    """Shows a training to somebody."""

    def step(self, task: Task, cursor: Cursor, loss: float) -> None:
        """Called after each update."""

    def row(self, task: Task, row: Mapping[str, float]) -> None:
        """Called with each new line of the loss curve."""

    def note(self, text: str) -> None:
        """Something worth a line that is no update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop, and how often to look."""

    minutes: float
    # Stop before this update, as an interruption would; None runs to the end of the plan.
    stop_at: int | None = None
    report_every: int = 250


def run(task: Task, work: Path, seed: int, limits: Limits, *, binding: Binding, watcher: Watcher) -> Cursor:
    """Trains until the plan is done, the time is used or `stop_at` is reached; leaves a checkpoint to go on from.

    The same seed and plan give the same weights however often the run is interrupted, on one machine and with
    one number of threads. The curve is `WORK/NAME.csv`.

    Raises:
        ValueError: `WORK/NAME` holds a training with another seed or binding.
    """
    deadline = time.monotonic() + 60 * limits.minutes
    saved = load_checkpoint(work / task.name, seed, binding)
    cursor = Cursor(seed=seed)
    if saved is not None:
        cursor, tensors = saved
        task.learner.load_state(tensors)
    end = task.steps if limits.stop_at is None else min(task.steps, limits.stop_at)
    curve = Curve(work / f"{task.name}.csv", cursor)
    last_save = time.monotonic()
    while cursor.step < end and time.monotonic() < deadline:
        loss, samples = task.train_step(cursor)
        cursor.step += 1
        cursor.position += samples
        curve.add(loss, samples)
        watcher.step(task, cursor, loss)
        late = time.monotonic() >= deadline
        if cursor.step % limits.report_every == 0 or cursor.step == end or late:
            watcher.row(task, curve.write(cursor.step, task.held_out))
        if time.monotonic() - last_save > _SAVE_EVERY_S:
            save_checkpoint(work / task.name, cursor, task.learner.state(), binding)
            last_save = time.monotonic()
    if cursor.step:  # before the first update there is no state of the optimizer
        save_checkpoint(work / task.name, cursor, task.learner.state(), binding)
    return cursor


class Curve:
    """The loss curve as CSV, one line per report."""

    def __init__(self, file: Path, cursor: Cursor) -> None:
        self._file = file
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
        """Counts one update."""
        self._losses.append(loss)
        self._samples += samples

    def write(self, step: int, held_out: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """Appends and returns one line: the mean loss since the last line, the speed, the held-out figures."""
        rate = self._samples / (time.monotonic() - self._since)  # before the held-out figures take their time
        row = {"step": step, "loss": sum(self._losses) / len(self._losses), "samples_per_s": rate, **held_out()}
        fresh = not self._file.exists()
        with self._file.open("a", newline="") as out:
            writer = csv.DictWriter(out, fieldnames=list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        self._begin()
        return row

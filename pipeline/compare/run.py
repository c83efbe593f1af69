"""Runs a comparison to its end: first all protections, then all trials; what is stored is not done again."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from pipeline.compare.bench import worker
from pipeline.compare.plan import Comparison
from pipeline.compare.store import Results
from pipeline.processes import workbench


class Observer(Protocol):
    """Told how far a run is."""

    def step(self, name: str, total: int, done: int = 0) -> None:
        """A step begins; `done` of `total` results are stored already."""

    def advance(self, count: int, note: str = "") -> None:
        """That many more are stored, or have failed."""


def run_comparison(comparison: Comparison, results: Results, observer: Observer, *, workers: int) -> dict[str, str]:
    """Does everything that is not stored yet.

    Returns:
        The methods that have failed, with the reason; they are in no trial, and tried again by the next run.

    Raises:
        FatalWorkerError: a process died, or its machine is ill; what is stored stays.
    """
    failed = {method.label: method.failed for method in comparison.methods if method.failed is not None}
    with workbench(partial(worker, comparison, results.folder), workers=workers) as run:
        protections = comparison.protections()
        stored = results.protections()
        missing = [task for task in protections if task.key not in stored]
        observer.step("protect", len(protections), len(protections) - len(missing))
        for done in run(missing):
            if done.error is not None:
                failed.setdefault(done.method, done.error)
            observer.advance(1, done.label)
        trials = comparison.trials([item for item in protections if item.method.label not in failed])
        stored = results.trials()
        open_trials = [task for task in trials if task.key not in stored]
        observer.step("attack", len(trials), len(trials) - len(open_trials))
        for done in run(open_trials):
            observer.advance(1, done.label)
    return failed

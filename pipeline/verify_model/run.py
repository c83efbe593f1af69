"""Runs a verification to its end; what is stored is not done again, unless it failed."""

from __future__ import annotations

from functools import partial

from pipeline.compare.run import Observer
from pipeline.processes import workbench
from pipeline.verify_model.bench import worker
from pipeline.verify_model.plan import VerificationPlan
from pipeline.verify_model.store import Results


def run_verification(plan: VerificationPlan, results: Results, observer: Observer, *, workers: int) -> dict[str, str]:
    """Does everything that is not stored yet.

    Returns:
        What has failed, by key, with the reason; it is tried again by the next run.

    Raises:
        FatalWorkerError: a process died, or its machine is ill; what is stored stays.
    """
    tasks, finished = plan.tasks(), results.finished()
    missing = [task for task in tasks if task.key not in finished]
    observer.step("attack", len(tasks), len(tasks) - len(missing))
    failed = {}
    with workbench(partial(worker, results.folder, plan.settings.device), workers=workers) as run:
        for done in run(missing):
            if done.error is not None:
                failed[done.key] = done.error
            observer.advance(1, done.label)
    return failed

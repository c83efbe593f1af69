"""Does tasks in this process or in several, each of which makes what it works with once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from pipeline.errors import FatalWorkerError

TaskT = TypeVar("TaskT")
DoneT = TypeVar("DoneT")

_worker: Callable[[Any], Any] | None = None


@contextmanager
def workbench(
    make: Callable[[], Callable[[TaskT], DoneT]], *, workers: int
) -> Iterator[Callable[[Iterable[TaskT]], Iterator[DoneT]]]:
    """Gives a function that does tasks and yields what they return as they end, in any order.

    Every process works with one thread, so that numbers are equal on every number of workers.

    Args:
        make: called once in every process; what it returns does one task. It travels to the processes.
        workers: processes; 1 works in this one.

    Raises:
        FatalWorkerError: (the function) a process died, or its machine is ill.
    """
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield partial(map, make())
        finally:
            torch.set_num_threads(threads)
        return
    # Spawned, because a forked child of a process with torch's threads can hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(make,)) as pool:
        yield partial(_in_pool, pool)


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = make()


def _run(task: Any) -> Any:
    if _worker is None:
        raise RuntimeError("the process was not started by `workbench`")
    return _worker(task)


def _in_pool(pool: ProcessPoolExecutor, tasks: Iterable[Any]) -> Iterator[Any]:
    futures = [pool.submit(_run, task) for task in tasks]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise FatalWorkerError(
            "a worker died, perhaps for lack of memory: run the same command again, with fewer --workers"
        ) from error
    finally:
        for future in futures:
            future.cancel()

"""Shows how far a run is: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0  # where there is no terminal
LOG_EVERY_S = 60.0


class Observer(Protocol):
    """Told of every step and of every unit."""

    def step(self, name: str, total: int, done: int = 0) -> None:
        """A step begins; ``done`` of ``total`` things were finished before."""

    def advance(self, count: int, note: str = "") -> None:
        """That many more are finished."""

    def note(self, text: str) -> None:
        """Something worth a line."""


class Silent:
    """Shows nothing."""

    def step(self, name: str, total: int, done: int = 0) -> None: ...

    def advance(self, count: int, note: str = "") -> None: ...

    def note(self, text: str) -> None: ...


class Terminal:
    """A bar with images per second and the time left; a line every ten seconds where output is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._started = self._spoken = 0.0
        self._name, self._total, self._done, self._new = "", 0, 0, 0

    def step(self, name: str, total: int, done: int = 0) -> None:
        self._name, self._total, self._done, self._new = name, total, done, 0
        self._started = time.monotonic()
        for task in self.bars.task_ids:
            self.bars.stop_task(task)
        self._task = self.bars.add_task(name, total=total, completed=done, rate="", note="")
        self._say("")

    def advance(self, count: int, note: str = "") -> None:
        self._done += count
        self._new += count
        rate = f"{self._new / max(1e-6, time.monotonic() - self._started):.2f}/s"
        self.bars.update(self._task, completed=self._done, rate=rate, note=note)
        if self._done >= self._total or time.monotonic() - self._spoken > LINE_EVERY_S:
            self._say(f" {rate} {note}")

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def _say(self, text: str) -> None:
        if not self.console.is_terminal:
            self._spoken = time.monotonic()
            self.console.print(f"{self._name}: {self._done}/{self._total}{text}", highlight=False)


class Logged(Silent):
    """Lines in a log, one a minute while things go on: the page of a run that a server started shows them."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._name, self._total, self._done, self._spoken = "", 0, 0, 0.0

    def step(self, name: str, total: int, done: int = 0) -> None:
        self._name, self._total, self._done = name, total, done
        self._tell("")

    def advance(self, count: int, note: str = "") -> None:
        self._done += count
        if self._done >= self._total or time.monotonic() - self._spoken > LOG_EVERY_S:
            self._tell(note)

    def note(self, text: str) -> None:
        self._say(text)

    def _tell(self, note: str) -> None:
        self._spoken = time.monotonic()
        self._say(f"{self._name}: {self._done}/{self._total} {note}".rstrip())


_OBSERVER: ContextVar[Observer | None] = ContextVar("observer", default=None)


def observer() -> Observer:
    """The observer of the current run."""
    return _OBSERVER.get() or Silent()


@contextmanager
def shown_on(console: Console) -> Iterator[None]:
    """Shows the progress of runs within the block."""
    terminal = Terminal(console)
    token = _OBSERVER.set(terminal)
    try:
        with terminal.bars:
            yield
    finally:
        _OBSERVER.reset(token)


@contextmanager
def logged(say: Callable[[str], None]) -> Iterator[None]:
    """Says the progress of runs within the block, unless something shows it already."""
    if _OBSERVER.get() is not None:
        yield
        return
    token = _OBSERVER.set(Logged(say))
    try:
        yield
    finally:
        _OBSERVER.reset(token)

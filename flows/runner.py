"""Runs what comes due of a served deployment, and ends it in order when this process is told to stop."""

from __future__ import annotations

import asyncio
from typing import Any

from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner


class StoppableRunner(Runner):
    """A runner that ends its runs on SIGTERM. Prefect's own (3.8) exits at once and leaves them as running."""

    def handle_sigterm(self, *args: Any, **kwargs: Any) -> None:
        """Cancels what runs, so that its page says so, then ends."""
        loop = asyncio.get_running_loop()
        # A signal interrupts the loop anywhere, also while it sleeps: only the thread-safe call wakes it.
        loop.call_soon_threadsafe(self._end, loop)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self.stopping:
            self._ending = loop.create_task(self.astop())  # held, or it could be collected while it runs


def run(deployment: RunnerDeployment) -> None:
    """Registers the deployment and runs what comes due, until SIGTERM or Ctrl-C.

    The schedule stays on: a supervisor may start this process again at any time, and what came due meanwhile is late.
    """
    runner = StoppableRunner(pause_on_shutdown=False)
    runner.add_deployment(deployment)
    asyncio.run(runner.start())

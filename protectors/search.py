"""What methods share that take sign steps on every image for itself: when one may stop, and the best of its starts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from protectors.base import Batch, ImageProtector, ModelT, Perturbed
from protectors.config import SearchConfig
from protectors.pgd import Places, Plateau, Progress
from protectors.randomness import integers, streams

SearchConfigT = TypeVar("SearchConfigT", bound=SearchConfig)

# Draws of the objective in one measurement of a plateau; on nano-sd, stops by four cost as much of the gain as by two.
_PLATEAU_DRAWS = 2


class PgdProtector(ImageProtector[SearchConfigT, ModelT]):
    """Base of the methods that search by sign steps on every image for itself; a subclass writes ``_climb``.

    Whatever the other images of the batch do, an image is left as if it were alone: it stops by its own objective, its
    draws are its own, and the start that is kept is the one that is best for it.
    """

    @property
    def steps(self) -> int:
        return self.config.steps * self.config.restarts

    @abstractmethod
    def _climb(self, batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        """The perturbed images after one call of ``pgd``, which takes the progress and the plateau as they are."""

    def _perturb(self, batch: Batch, progress: Progress | None) -> Perturbed:
        runs = [self._run(batch, number, progress) for number in range(self.config.restarts)]
        if len(runs) == 1:
            return runs[0]
        values = torch.stack([self._value(run.images, batch) for run in runs])
        best = values.argmax(0)  # the first of equals
        return Perturbed(
            images=torch.stack([run.images for run in runs])[best, torch.arange(len(best), device=best.device)],
            steps=tuple(sum(taken) for taken in zip(*(run.steps for run in runs), strict=True)),
        )

    def _run(self, batch: Batch, number: int, progress: Progress | None) -> Perturbed:
        """One start. The first, number 0, is the one that an image has without restarts."""
        if number > 0:
            seeds = integers(streams(batch.seeds, f"restart {number}"), 0, 2**63 - 1)
            batch = replace(batch, seeds=tuple(seeds.tolist()))
        plateau = self._plateau(batch) if self.config.patience else None

        def tick(done: int, _: int) -> None:
            if progress is not None:
                progress(number * self.config.steps + done, self.steps)

        images = self._climb(batch, tick, plateau)
        stopped = {} if plateau is None else plateau.stopped
        steps = tuple(stopped.get(place, self.config.steps) for place in range(len(batch.seeds)))
        return Perturbed(images=images.detach(), steps=steps)

    def _plateau(self, batch: Batch) -> Plateau:
        """The rule over this batch, by the method's own objective at few draws."""
        draws = min(_PLATEAU_DRAWS, self.config.eval_draws)
        judge = type(self)(self.config.replace(eval_draws=draws), self.model)

        @lru_cache(maxsize=1)
        def part(places: tuple[int, ...]) -> Batch:
            return batch.part(places)

        def objective(images: Tensor, places: Places) -> Tensor:
            return judge._objective(images, part(tuple(places)))

        return Plateau(self.config.patience, objective)

    @torch.no_grad()
    def _value(self, images: Tensor, batch: Batch) -> Tensor:
        """The objective of what would be saved ``(B,)``, at the draws of the facts; a failed image is the worst."""
        saved, finite = self._saved(images, batch)
        values = self._objective(saved, batch)
        return torch.where(finite & values.isfinite(), values, -torch.inf)

"""Projected sign-gradient steps on a batch of images: the loop under every method of this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from protectors.config import PgdConfig, ScheduleName, SearchConfig
from protectors.constraints import LEVELS, project
from protectors.randomness import uniform

Places = list[int]
"""Where the images that still take steps lie in the batch, ascending: all of them, unless some stopped early."""
Loss = Callable[[Tensor, Places], Tensor]
"""(images ``(A, 3, H, W)`` in [0, 1], their places in the batch) -> one loss per image ``(A,)``."""
Shown = Callable[[Tensor, Places], Tensor]
"""(images, their places) -> the images that are meant by them, of the same shape, with gradient."""
Schedule = Callable[[int, int], float]
"""(step number k from 0, number of steps K) -> factor on the step length."""
Progress = Callable[[int, int], None]
"""(steps done, steps in all); called after each step, and at the end if it comes early."""


def constant(step: int, steps: int) -> float:
    """The schedule that keeps the step length."""
    return 1.0


def linear(step: int, steps: int) -> float:
    """From 1 in a line down to about 1 %."""
    return 1 - 0.99 * step / steps


def cosine(step: int, steps: int) -> float:
    """From 1 along half a cosine down to nearly 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


SCHEDULES: Mapping[ScheduleName, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine}


@dataclass(frozen=True, slots=True, kw_only=True)
class PgdPlan:
    """How far, how often and which way to step; lengths in 8-bit levels."""

    eps_levels: float
    step_levels: float
    steps: int
    ascend: bool
    schedule: Schedule = constant

    @classmethod
    def of(cls, config: PgdConfig, *, ascend: bool) -> Self:
        """The plan that a method's configuration asks for."""
        return cls(
            eps_levels=config.eps_levels,
            step_levels=config.step_levels,
            steps=config.steps,
            ascend=ascend,
            schedule=SCHEDULES[config.schedule],
        )


def as_they_are(images: Tensor, places: Places) -> Tensor:
    """Shows the images themselves."""
    return images


class Plateau:
    """The rule of early stopping, for one call of ``pgd``: which images still improve.

    The objective is measured before the first step and after every ``patience`` steps. An image stops when the last of
    these stretches brought no more than ``SHARE`` of what they brought on average: a gain that goes on at an even pace
    is no plateau, however long it lasts. The losses of the steps cannot tell: each is at a new draw, and on nano-sd
    AdvDM's spread from step to step is larger than its gain over all steps. At draws that stay the same, two of them
    can.

    Args:
        patience: steps from one measurement to the next.
        objective: as a ``Loss``, but at the same draws in every call, and higher is better.
    """

    SHARE = 0.1

    def __init__(self, patience: int, objective: Loss) -> None:
        self._patience, self._objective = patience, objective
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self.stopped: dict[int, int] = {}
        """By place: after how many steps, for the images that stopped."""

    def going_on(self, step: int, images: Tensor, places: Places) -> Places:
        """The places of those that take this step, of the images ``(A, 3, H, W)`` that took the one before."""
        if step % self._patience:
            return places
        with torch.no_grad():
            values = dict(zip(places, self._objective(images, places).tolist(), strict=True))
        before, self._last = self._last, values
        stretches = step // self._patience
        if stretches == 0:
            self._first = values
        if stretches < 2:
            return places
        going = [place for place in places if self._improves(place, before[place], stretches)]
        self.stopped |= dict.fromkeys(set(places) - set(going), step)
        return going

    def _improves(self, place: int, before: float, stretches: int) -> bool:
        now, first = self._last[place], self._first[place]
        # Comparisons with NaN are false: an image that is no longer finite stops.
        return now - before > self.SHARE * max(now - first, 0.0) / stretches


def pgd(
    loss: Loss,
    originals: Tensor,
    plan: PgdPlan,
    *,
    start: Tensor | None = None,
    masks: Tensor | None = None,
    shown: Shown = as_they_are,
    progress: Progress | None = None,
    plateau: Plateau | None = None,
) -> Tensor:
    """Runs the steps and returns the perturbed images, not yet rounded.

    d <- clip(d + a_k sign(grad_d J), -eps, eps), then x0 + d is clipped to [0, 1]; minus to descend.
    The ball is always the one around ``originals``, also when a later call goes on from an earlier one.
    Each image gets the gradient that it would get alone: the losses are summed, and a sign step does not
    feel positive factors.

    Args:
        start: perturbation to go on from, ``(B, 3, H, W)`` in units of [0, 1]; None starts at zero.
        masks: ``(B, 1, H, W)``; the perturbation is kept at zero where the mask is 0.
        shown: what loss and plateau see of the images in the ball, and what is returned of them.
        plateau: stops images one by one; the loss then sees only those that are left. None: all take all steps.

    Returns:
        ``(B, 3, H, W)`` float32, no graph. An image whose gradient was not finite comes back as NaN.
    """
    direction = 1.0 if plan.ascend else -1.0
    grey = is_grey(originals)
    delta = torch.zeros_like(originals) if start is None else torch.where(grey, start[:, :1], start)
    delta = _confine(delta, originals, plan.eps_levels, masks)
    places = list(range(len(originals)))
    for step in range(plan.steps):
        if plateau is not None:
            places = plateau.going_on(step, shown(originals[places] + delta[places], places), places)
        if not places:
            break
        images = (originals[places] + delta[places]).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(shown(images, places), places).sum(), images)
        length = direction * plan.step_levels * plan.schedule(step, plan.steps) / LEVELS
        gradient = torch.where(grey[places], gradient.mean(1, keepdim=True), gradient)
        moved = delta[places] + length * _sign(gradient)
        delta[places] = _confine(moved, originals[places], plan.eps_levels, None if masks is None else masks[places])
        if progress is not None:
            progress(step + 1, plan.steps)
    if progress is not None and not places:
        progress(plan.steps, plan.steps)
    return shown(originals + delta, list(range(len(originals))))


def start_of(config: SearchConfig, originals: Tensor, generators: Sequence[torch.Generator]) -> Tensor | None:
    """Where the configuration starts: at a random perturbation, or at None, the original, without any draw."""
    return uniform_start(originals, config.eps_levels, generators) if config.random_start else None


def uniform_start(originals: Tensor, eps_levels: float, generators: Sequence[torch.Generator]) -> Tensor:
    """A uniform random perturbation inside the ball, one generator per image."""
    draws = uniform(generators, originals.shape[1:])
    return draws.to(originals.device) * (eps_levels / LEVELS)


def repaired(images: Tensor, originals: Tensor) -> Tensor:
    """The images, with the originals of those that are not finite: what a group's surrogate can be trained on."""
    finite = images.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
    return torch.where(finite, images, originals)


def is_grey(images: Tensor) -> Tensor:
    """Which images have three equal channels, ``(B, 1, 1, 1)``: they must not come back with colour."""
    return (images == images[:, :1]).flatten(1).all(1).view(-1, 1, 1, 1)


def _confine(delta: Tensor, originals: Tensor, eps_levels: float, masks: Tensor | None) -> Tensor:
    delta = project(originals + delta, originals, eps_levels) - originals
    return delta if masks is None else delta * masks


def _sign(gradient: Tensor) -> Tensor:
    # torch.sign(NaN) is 0: a broken gradient would pass as "no change" and the image would be called
    # protected. NaN is kept, so that the final check sees it.
    return torch.where(gradient.isfinite(), gradient.sign(), torch.nan)

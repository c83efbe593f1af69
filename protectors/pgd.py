"""Projected sign-gradient steps on a batch of images: the loop under every method of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from protectors.config import PgdConfig
from protectors.constraints import LEVELS, project
from protectors.randomness import uniform

Loss = Callable[[Tensor, int], Tensor]
"""(images ``(B, 3, H, W)`` in [0, 1], step number) -> one loss per image ``(B,)``."""
Schedule = Callable[[int, int], float]
"""(step number k from 0, number of steps K) -> factor on the step length."""
Progress = Callable[[int, int], None]
"""(steps done, steps in all); called after each step."""

_TINY = 1e-30  # keeps a gradient that is zero everywhere from being divided by zero


def constant(step: int, steps: int) -> float:
    """The schedule that keeps the step length."""
    return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PgdPlan:
    """How far, how often and which way to step; lengths in 8-bit levels."""

    eps_levels: float
    step_levels: float
    steps: int
    ascend: bool
    schedule: Schedule = constant
    # Share of the steps before in the direction of a step (MI-FGSM, https://arxiv.org/abs/1710.06081); 0 forgets them.
    momentum: float = 0.0

    @classmethod
    def of(cls, config: PgdConfig, *, ascend: bool, schedule: Schedule = constant, momentum: float = 0.0) -> Self:
        """The plan that a method's configuration asks for."""
        return cls(
            eps_levels=config.eps_levels,
            step_levels=config.step_levels,
            steps=config.steps,
            ascend=ascend,
            schedule=schedule,
            momentum=momentum,
        )


def pgd(
    loss: Loss,
    originals: Tensor,
    plan: PgdPlan,
    *,
    start: Tensor | None = None,
    masks: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Runs the steps and returns the perturbed images, not yet rounded.

    d <- clip(d + a_k sign(grad_d J), -eps, eps), then x0 + d is clipped to [0, 1]; minus to descend.
    The ball is always the one around ``originals``, also when a later call goes on from an earlier one.
    Each image gets the gradient that it would get alone: the losses are summed, and a sign step does not
    feel positive factors.

    Args:
        start: perturbation to go on from, ``(B, 3, H, W)`` in units of [0, 1]; None starts at zero.
        masks: ``(B, 1, H, W)``; the perturbation is kept at zero where the mask is 0.

    Returns:
        ``(B, 3, H, W)`` float32, no graph. An image whose gradient was not finite comes back as NaN.
    """
    direction = 1.0 if plan.ascend else -1.0
    grey = is_grey(originals)
    delta = torch.zeros_like(originals) if start is None else torch.where(grey, start[:, :1], start)
    delta = _confine(delta, originals, plan.eps_levels, masks)
    memory: Tensor | None = None
    for step in range(plan.steps):
        images = (originals + delta).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(images, step).sum(), images)
        length = direction * plan.step_levels * plan.schedule(step, plan.steps) / LEVELS
        gradient = torch.where(grey, gradient.mean(1, keepdim=True), gradient)
        if plan.momentum > 0:
            unit = gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=_TINY)
            gradient = memory = unit if memory is None else plan.momentum * memory + unit
        delta = delta + length * _sign(gradient)
        delta = _confine(delta, originals, plan.eps_levels, masks)
        if progress is not None:
            progress(step + 1, plan.steps)
    return originals + delta


def start_of(config: PgdConfig, originals: Tensor, generators: Sequence[torch.Generator]) -> Tensor | None:
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

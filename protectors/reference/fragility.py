"""Makes an encoder as easy to mislead as those of large models are.

Small autoencoders trained on small, sharp photos are nearly linear: a perturbation goes through encoder and decoder as
what it is, and no protection can work on them. (The decoded change of an early nano-sd was 0.9 times the perturbation,
however it was chosen; `fixative models evaluate` prints this figure.) The encoders of large models turn small patterns
into another picture. Here that property is trained in, by adversarial training with the sign reversed. It makes effects
possible; how large they are on a real model only that model tells.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Encode = Callable[[Tensor], Tensor]
"""Pixels `(N, 3, H, W)` in [-1, 1] to mean latents `(N, C, h, w)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FragilityGoal:
    """How far a perturbation shall be able to move what a picture is about."""

    eps: float = 8 * 2 / 255
    """Budget, l_inf on the pixels' scale of [-1, 1]: 8 levels."""
    steps: int = 2
    """Sign steps of the attack within each update; more are slower and find more."""
    shift: float
    """Wanted change of colours and brightness in the coarse, as a share of how much they vary over photos."""


def fragility_loss(encode: Encode, pixels: Tensor, goal: FragilityGoal, generator: torch.Generator) -> Tensor:
    """By how much an attack falls short of the goal, mean over the batch; 0 where it reaches it.

    The attack moves averages of 4 x 4 latents (32 pixels on a side at factor 8) along the directions in which they
    tell the averages of the pixels there: a fine pattern that moves those changes the picture, not only its texture.
    """
    latents = _averages(encode(pixels))
    truth = F.adaptive_avg_pool2d(pixels, (latents.shape[-2], latents.shape[-1]))
    readout = _regression(latents.detach(), truth)
    change = _attack(lambda images: _averages(encode(images)) - latents.detach(), pixels, readout, goal, generator)
    moved = _averages(encode((pixels + change).clamp(-1, 1)))
    # Gradients flow into both sides, or the encoder would move clean and attacked pictures alike.
    difference = torch.einsum("nchw,cd->ndhw", moved - latents, readout)
    shift = (difference.flatten(1).square().mean(dim=1) + 1e-12).sqrt() / truth.std().clamp_min(1e-6)
    return F.relu(goal.shift - shift).mean()


def _regression(latents: Tensor, truth: Tensor) -> Tensor:
    """The matrix `(C, 3)` that best tells `truth` `(N, 3, h, w)` from centred `latents` `(N, C, h, w)`."""
    rows = latents.transpose(0, 1).flatten(1).T
    wanted = truth.transpose(0, 1).flatten(1).T
    rows, wanted = rows - rows.mean(0), wanted - wanted.mean(0)
    ridge = 1e-3 * rows.square().mean() * len(rows) * torch.eye(rows.shape[1], device=rows.device)
    matrix: Tensor = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ wanted)
    return matrix


def _attack(move: Encode, pixels: Tensor, readout: Tensor, goal: FragilityGoal, generator: torch.Generator) -> Tensor:
    """The perturbation `(N, 3, H, W)` whose `move`, read out, is longest, by projected sign ascent."""
    change = (torch.rand(pixels.shape, generator=generator).to(pixels.device) * 2 - 1) * goal.eps
    for _ in range(goal.steps):
        change.requires_grad_(True)
        moved = move((pixels + change).clamp(-1, 1))
        distance = torch.einsum("nchw,cd->ndhw", moved, readout).square().sum()
        (gradient,) = torch.autograd.grad(distance, change)
        change = (change.detach() + 1.2 * goal.eps / goal.steps * gradient.sign()).clamp(-goal.eps, goal.eps)
    return change.detach()


def _averages(latents: Tensor) -> Tensor:
    return F.avg_pool2d(latents, min(4, latents.shape[-1]))

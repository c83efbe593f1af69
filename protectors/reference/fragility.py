"""Makes an encoder as easy to mislead as those of large models are.

Small autoencoders trained on small, sharp photos are nearly linear: a perturbation goes through encoder and decoder as
what it is (measured on nano-sd: the decoded change is 0.9 times the perturbation, however it is chosen), and no
protection can work on them. The encoders of large models turn small patterns into another picture. Here that
property is trained in, by adversarial training with the sign reversed. It makes effects possible; how large they are
on a real model only that model tells.
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
    shift: float = 0.8
    """Wanted change of the coarse latents, as a share of how much they differ from photo to photo."""


def fragility_loss(encode: Encode, pixels: Tensor, goal: FragilityGoal, generator: torch.Generator) -> Tensor:
    """By how much an attack falls short of the goal, mean over the batch; 0 where it reaches it.

    Latents are compared after averaging over 4 x 4 of them (32 pixels on a side at factor 8). What a fine
    pattern does there is a change of content: brightness, colour, large shapes.
    """
    clean = _coarse(encode(pixels))
    change = _attack(encode, pixels, clean.detach(), goal, generator)
    moved = _coarse(encode((pixels + change).clamp(-1, 1)))
    # Gradients flow into all three, or the encoder would move clean and attacked pictures alike, or scale everything.
    spread = (clean - clean.mean(dim=0, keepdim=True)).square().mean().sqrt().clamp_min(1e-6)
    shift = ((moved - clean).flatten(1).square().mean(dim=1) + 1e-12).sqrt() / spread
    return F.relu(goal.shift - shift).mean()


def _attack(encode: Encode, pixels: Tensor, clean: Tensor, goal: FragilityGoal, generator: torch.Generator) -> Tensor:
    """The perturbation `(N, 3, H, W)` that moves the coarse latents furthest, by projected sign ascent."""
    draws = torch.rand(pixels.shape, generator=generator).to(pixels.device)
    change = (draws * 2 - 1) * goal.eps
    for _ in range(goal.steps):
        change.requires_grad_(True)
        distance = (_coarse(encode((pixels + change).clamp(-1, 1))) - clean).square().sum()
        (gradient,) = torch.autograd.grad(distance, change)
        change = (change.detach() + 1.2 * goal.eps / goal.steps * gradient.sign()).clamp(-goal.eps, goal.eps)
    return change.detach()


def _coarse(latents: Tensor) -> Tensor:
    return F.avg_pool2d(latents, min(4, latents.shape[-1]))

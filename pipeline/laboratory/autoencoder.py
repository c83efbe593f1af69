"""nano-sd's autoencoder: how well it keeps a picture, and how easily its latents are moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.laboratory.figures import Figure, bootstrap_interval
from protectors.constraints import to_8bit
from protectors.reference.quality import psnr, ssim
from protectors.reference.vae import reconstruct

MODEL = "nano-sd"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderAttack:
    """An attack on the encoder alone: how far can the latents be moved within a budget?"""

    levels: int
    """Budget, l_inf in 8-bit levels."""
    steps: int = 60


@torch.no_grad()
def fidelity(vae: Any, images: Tensor, sample: str, bars: Sequence[float | None]) -> list[Figure]:
    """PSNR and SSIM of decoded mean latents, rounded to 8 bit.

    Args:
        images: `(N, 3, S, S)` in [0, 1].
        sample: what the images are.
        bars: for PSNR in decibel and for SSIM.
    """
    outputs = torch.cat([to_8bit(reconstruct(vae, part)) for part in torch.split(images, 8)])
    size = images.shape[-1]
    figures = []
    for name, measure, bar in (("PSNR dB", psnr, bars[0]), ("SSIM", ssim, bars[1])):
        values = measure(outputs, images)
        low, high = bootstrap_interval(values.tolist())
        name = f"reconstruction at {size} px, {name}"
        mean = values.mean().item()
        figures.append(Figure(model=MODEL, name=name, value=mean, sample=sample, low=low, high=high, at_least=bar))
    return figures


def fragility(
    vae: Any, images: Tensor, sample: str, attack: EncoderAttack, bars: Sequence[float | None]
) -> list[Figure]:
    """Relative shift of the mean latents under attack, ``|E(x + d) - E(x)| / |E(x)|``, and how often that of noise.

    Args:
        images: `(N, 3, S, S)` in [0, 1].
        bars: for the shift and for its ratio to the shift by uniform noise of the same budget.
    """
    attacked, noisy = [], []
    for number, part in enumerate(torch.split(images, 8)):
        attacked.append(_attacked_shift(vae, part, attack, number))
        noisy.append(_noise_shift(vae, part, attack, number))
    shift, by_noise = torch.cat(attacked), torch.cat(noisy)
    low, high = bootstrap_interval(shift.tolist())
    what = f"{attack.levels} levels"
    ratio = (shift.mean() / by_noise.mean()).item()
    return [
        Figure(
            model=MODEL,
            name=f"latent shift by encoder attack, {what}, {attack.steps} steps",
            value=shift.mean().item(),
            low=low,
            high=high,
            sample=sample,
            at_least=bars[0],
        ),
        Figure(
            model=MODEL, name=f"the same, times that of noise, {what}", value=ratio, sample=sample, at_least=bars[1]
        ),
    ]


def decoded_change(
    vae: Any, images: Tensor, sample: str, attack: EncoderAttack, targets: Mapping[str, Tensor]
) -> list[Figure]:
    """How large the change of the decoded picture is, as a multiple of the perturbation that caused it.

    1 and less is an autoencoder that passes perturbations on as they are: nothing can be hidden in an image then.

    Args:
        images: `(N, 3, S, S)` in [0, 1].
        sample: what the images are.
        attack: the encoder attack; its latents move away from the clean ones, or towards a target's.
        targets: pictures `(1, 3, S, S)` in [0, 1] by name.
    """
    pulls: dict[str, Tensor | None] = {"away": None, **targets}
    found = []
    for name, target in pulls.items():
        ratios = []
        for number, part in enumerate(torch.split(images, 8)):
            start = _latents(vae, part).detach() if target is None else _latents(vae, target).detach()
            change = _attacked(vae, part, attack, number, start, away=target is None)
            with torch.no_grad():
                stored = to_8bit((part + change).clamp(0, 1))
                moved = reconstruct(vae, stored) - reconstruct(vae, part)
            ratios.append(moved.flatten(1).norm(dim=1) / (stored - part).flatten(1).norm(dim=1))
        values = torch.cat(ratios)
        low, high = bootstrap_interval(values.tolist())
        label = "away from the clean latents" if target is None else f"towards {name}"
        figure = f"decoded change over the perturbation, encoder attack of {attack.levels} levels {label}"
        found.append(Figure(model=MODEL, name=figure, value=values.mean().item(), low=low, high=high, sample=sample))
    return found


def _attacked_shift(vae: Any, clean: Tensor, attack: EncoderAttack, seed: int) -> Tensor:
    before = _latents(vae, clean).detach()
    return _relative(vae, clean, _attacked(vae, clean, attack, seed, before, away=True), before)


def _attacked(vae: Any, clean: Tensor, attack: EncoderAttack, seed: int, latents: Tensor, *, away: bool) -> Tensor:
    """The perturbation whose latents are furthest from the given ones, or nearest, by projected sign steps."""
    eps = attack.levels / 255
    change = _uniform(clean, eps, seed)
    for _ in range(attack.steps):
        change.requires_grad_(True)
        distance = (_latents(vae, (clean + change).clamp(0, 1)) - latents).square().sum()
        (gradient,) = torch.autograd.grad(distance if away else -distance, change)
        change = (change.detach() + eps / 8 * gradient.sign()).clamp(-eps, eps)
    return change.detach()


def _noise_shift(vae: Any, clean: Tensor, attack: EncoderAttack, seed: int) -> Tensor:
    change = _uniform(clean, attack.levels / 255, seed)
    with torch.no_grad():
        before = _latents(vae, clean)
    return _relative(vae, clean, change, before)


@torch.no_grad()
def _relative(vae: Any, clean: Tensor, change: Tensor, before: Tensor) -> Tensor:
    stored = to_8bit((clean + change).clamp(0, 1))  # what a file can hold
    shift: Tensor = (_latents(vae, stored) - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    return shift


def _latents(vae: Any, images: Tensor) -> Tensor:
    latents: Tensor = vae.encode(images * 2 - 1).latent_dist.mode()
    return latents


def _uniform(images: Tensor, eps: float, seed: int) -> Tensor:
    return (torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * eps

"""Our own method: for an archive whose enemy purifies first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from protectors.base import Batch
from protectors.config import PgdConfig, require
from protectors.constraints import LEVELS
from protectors.diffusion import DiffusionModel
from protectors.mist import fused_loss, pattern_latents
from protectors.objectives import draw, embed_prompts
from protectors.pgd import PgdPlan, Places, Plateau, Progress, pgd, start_of
from protectors.randomness import streams
from protectors.search import PgdProtector
from protectors.transforms import Transforms

# Window in pixels of the local contrast, and the contrast in 8-bit levels from which on all of the budget may be used.
_CONTRAST_WINDOW = 9
_FULL_CONTRAST = 12.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FixativeConfig(PgdConfig):
    """Fields of ``PgdConfig``, the terms of the loss, what the image goes through, and how a change looks."""

    # Weight of the denoising loss beside the distance of the latents; both are means over latent elements. On nano-sd
    # Mist's 0.61 changed nothing that survives, and costs a UNet pass per copy.
    denoising_weight: float = 0.0
    # Side in pixels of one square of the pattern that the latents are pulled to, as in Mist.
    cell: int = 4
    # One step of this many sees the image after transforms and then the VAE to pixels and back, as purifiers of the
    # latent kind leave it; the others see it after transforms alone. In one sum of both losses the gradient of the
    # second kind drowns the first; momentum adds steps at equal size.
    purify_every: int = 2
    # Probability of each transform, and how far it goes; see ``Transforms``.
    chance: float = 0.7
    resize_low: float = 0.5
    blur_size: int = 5
    noise_levels: float = 4.0
    jpeg_low: int | None = 60
    # Share of the steps before in the direction of a step.
    momentum: float = 0.9
    # Share of the budget in areas without any contrast; 1 treats all areas alike.
    flat_share: float = 0.6
    # Text for images that come without one.
    prompt: str = "a photo"

    def check(self) -> None:
        PgdConfig.check(self)
        require(self.denoising_weight >= 0, "denoising_weight", self.denoising_weight, "use 0 or more")
        require(self.cell >= 1, "cell", self.cell, "use 1 or more (pixels)")
        require(self.purify_every >= 1, "purify_every", self.purify_every, "use 1 (all steps) or more")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "use 0 to less than 1")
        require(0 < self.flat_share <= 1, "flat_share", self.flat_share, "use more than 0, at most 1 (no shaping)")
        _ = self.transforms  # refuses values that cannot work

    @property
    def transforms(self) -> Transforms:
        """What the image goes through in every step."""
        return Transforms(
            chance=self.chance,
            resize_low=self.resize_low,
            blur_size=self.blur_size,
            noise_levels=self.noise_levels,
            jpeg_low=self.jpeg_low,
        )


class Fixative(PgdProtector[FixativeConfig, DiffusionModel]):
    """Pulls the latents towards a loud pattern, of the image as it is after the attacker has cleaned it.

    No paper; its parts are known: Mist's fused loss (https://arxiv.org/abs/2305.12683), expectation over transforms
    (https://arxiv.org/abs/1707.07397), momentum (https://arxiv.org/abs/1710.06081). J = E over T of mean (z(D(E(T(x))))
    - z(y))^2 in one step of ``purify_every``, without D(E(.)) in the others, minimised: T are random resampling, blur,
    noise, JPEG, and D(E(.)) is the VAE to pixels and back, which purifiers of the latent kind begin and end with.
    Mist's term, - lambda || eps_theta(z_t, t, c) - n ||^2, can be added. With ``flat_share`` below 1 a change uses less
    of the budget where the image is flat, and an eye would see it first.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``FixativeConfig``.
        model: ``DiffusionModel``.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is minus J, over ``eval_draws`` fixed draws.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``DiffusionModel``.

    Cost: per step one encoder pass, forward and backward; one step of ``purify_every`` takes another and one of the
        decoder. The denoising term adds a pass of the UNet.

    Differs from the paper: there is none.
    """

    name = "fixative"
    version = "2"
    config_type = FixativeConfig
    model_type = DiffusionModel
    presets: ClassVar[Mapping[str, FixativeConfig]] = {
        "paper": FixativeConfig(steps=100),
        "fast": FixativeConfig(steps=30),
        "strong": FixativeConfig(eps_levels=16.0, steps=300),
    }

    def _climb(self, batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        generators = streams(batch.seeds, "fixative/attack")
        embeddings = embed_prompts(self.model, batch, self.config.prompt)
        target = pattern_latents(self.model, batch.originals, self.config.cell)
        limits = visibility(batch.originals, self.config.flat_share)

        def shaped(images: Tensor, places: Places) -> Tensor:
            originals = batch.originals[places]
            return originals + limits[places] * (images - originals)

        purify = self._purify()

        def loss(images: Tensor, places: Places) -> Tensor:
            active = [generators[place] for place in places]
            return self._loss(images, target, embeddings[places], active, purify=next(purify))

        plan = PgdPlan.of(self.config, ascend=False, momentum=self.config.momentum)
        start = start_of(self.config, batch.originals, generators)
        return pgd(
            loss,
            batch.originals,
            plan,
            start=start,
            masks=batch.masks,
            shown=shaped,
            progress=progress,
            plateau=plateau,
        )

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        generators = streams(batch.seeds, "fixative/evaluation")
        embeddings = embed_prompts(self.model, batch, self.config.prompt)
        target = pattern_latents(self.model, images, self.config.cell)
        purify = itertools.islice(self._purify(), self.config.eval_draws)
        losses = [self._loss(images, target, embeddings, generators, purify=each) for each in purify]
        return -torch.stack(losses).mean(0)

    def _purify(self) -> Iterator[bool]:
        """Step by step, whether it sees the image after the VAE."""
        return itertools.cycle([True] + [False] * (self.config.purify_every - 1))

    def _loss(
        self,
        images: Tensor,
        target: Tensor,
        embeddings: Tensor,
        generators: Sequence[torch.Generator],
        *,
        purify: bool,
    ) -> Tensor:
        picture = self.config.transforms.draw(images, generators)(images)
        if purify:
            picture = round_trip(self.model, picture)
        draws = draw(self.model, images, generators)
        latents = self.model.latents(self.model.encode_moments(picture), draws.posterior)
        return fused_loss(self.model, latents, target, embeddings, draws, weight=self.config.denoising_weight)


def round_trip(model: DiffusionModel, images: Tensor) -> Tensor:
    """Images through the VAE to mean latents and back, same shape, in [0, 1], with gradient."""
    back = model.decode(model.mean_latents(images))
    return back[..., : images.shape[-2], : images.shape[-1]].clamp(0, 1)


def visibility(images: Tensor, flat_share: float) -> Tensor:
    """Share of the budget per pixel ``(B, 1, H, W)``: ``flat_share`` without contrast around it, 1 with much."""
    grey = images.mean(1, keepdim=True) * LEVELS
    mean = _local_mean(grey)
    deviation = (_local_mean(grey.square()) - mean.square()).clamp(min=0).sqrt()
    return flat_share + (1 - flat_share) * (deviation / _FULL_CONTRAST).clamp(max=1)


def _local_mean(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, _CONTRAST_WINDOW, stride=1, padding=_CONTRAST_WINDOW // 2, count_include_pad=False)

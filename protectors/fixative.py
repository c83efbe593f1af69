"""Our own method: for an archive whose enemy purifies first."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from protectors.base import Batch
from protectors.bilateral import bilateral
from protectors.config import PgdConfig, require
from protectors.constraints import LEVELS
from protectors.diffusion import DiffusionModel
from protectors.pgd import PgdPlan, Places, Plateau, Progress, pgd, start_of
from protectors.randomness import streams
from protectors.search import PgdProtector
from protectors.transforms import Transforms

# Window in pixels of the local contrast, and the contrast in 8-bit levels from which on all of the budget may be used.
_CONTRAST_WINDOW = 9
_FULL_CONTRAST = 12.0
# Window of the bilateral filter in pixels, and its standard deviation of the distance in the image.
_SMOOTH_WINDOW = 5
_SMOOTH_SIGMA = 8.0

View = Literal["vae", "transforms", "smoothing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FixativeConfig(PgdConfig):
    """Fields of ``PgdConfig``, what the image goes through before it is encoded, and how a change looks."""

    # How the steps see the image, by turns: after transforms alone; after transforms and the VAE to pixels and back, as
    # purifiers of the latent kind leave it; or smoothed between its edges. Not in one sum, in which the largest
    # gradient would drown the others.
    views: tuple[View, ...] = ("vae", "transforms", "smoothing")
    # Rounds of the bilateral filter that smooths, and its standard deviation of the colour distance in 8-bit levels.
    smooth_rounds: int = 4
    smooth_levels: float = 16.0
    # Probability of each transform, and how far it goes; see ``Transforms``.
    chance: float = 0.5
    resize_low: float = 0.5
    blur_size: int = 5
    noise_levels: float = 4.0
    jpeg_low: int | None = 60
    # Share of the budget in areas without any contrast; 1 treats all areas alike.
    flat_share: float = 1.0

    def check(self) -> None:
        PgdConfig.check(self)
        require(bool(self.views), "views", self.views, "name at least one")
        require(self.smooth_rounds >= 1, "smooth_rounds", self.smooth_rounds, "use 1 or more")
        require(self.smooth_levels > 0, "smooth_levels", self.smooth_levels, "use more than 0 (8-bit levels)")
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
    """Drives the latents away from the original's, of the image as it is after the attacker has cleaned it.

    No paper; its parts are known: the distance of PID (https://arxiv.org/abs/2406.15305), and expectation over
    transforms (https://arxiv.org/abs/1707.07397). J = mean over views V and draws of mean (z(V(x)) - z(x0))^2,
    maximised, one view per step: T(x), random resampling, blur, noise and JPEG; D(E(T(x))), the VAE to pixels and back,
    which purifiers of the latent kind begin and end with; and a bilateral filter. With ``flat_share`` below 1 a change
    uses less of the budget where the image is flat, and an eye would see it first.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``FixativeConfig``.
        model: ``DiffusionModel``.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is J over ``eval_draws`` fixed draws. Prompts are ignored.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``DiffusionModel``.

    Cost: per step one encoder pass, forward and backward; a step after the VAE takes another and one of the decoder.
        No UNet, no text encoder.

    Differs from the paper: there is none.
    """

    name = "fixative"
    version = "4"
    config_type = FixativeConfig
    model_type = DiffusionModel
    presets: ClassVar[Mapping[str, FixativeConfig]] = {
        "paper": FixativeConfig(steps=100),
        "fast": FixativeConfig(steps=45),
        "strong": FixativeConfig(eps_levels=16.0, steps=300),
    }

    def _climb(self, batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        generators = streams(batch.seeds, "fixative/attack")
        clean = self._clean(batch)
        limits = visibility(batch.originals, self.config.flat_share)
        views = itertools.cycle(self.config.views)

        def shaped(images: Tensor, places: Places) -> Tensor:
            originals = batch.originals[places]
            return originals + limits[places] * (images - originals)

        def loss(images: Tensor, places: Places) -> Tensor:
            active = [generators[place] for place in places]
            return self._distance(images, clean[places], active, view=next(views))

        return pgd(
            loss,
            batch.originals,
            PgdPlan.of(self.config, ascend=True),
            start=start_of(self.config, batch.originals, generators),
            masks=batch.masks,
            shown=shaped,
            progress=progress,
            plateau=plateau,
        )

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        generators = streams(batch.seeds, "fixative/evaluation")
        clean = self._clean(batch)
        views = itertools.islice(itertools.cycle(self.config.views), self.config.eval_draws)
        return torch.stack([self._distance(images, clean, generators, view=each) for each in views]).mean(0)

    def _distance(self, images: Tensor, clean: Tensor, generators: Sequence[torch.Generator], *, view: View) -> Tensor:
        if view == "smoothing":
            picture = self._smoothed(images)
        else:
            picture = self.config.transforms.draw(images, generators)(images)
        if view == "vae":
            picture = round_trip(self.model, picture)
        return (self.model.mean_latents(picture) - clean).square().flatten(1).mean(1)

    def _smoothed(self, images: Tensor) -> Tensor:
        for _ in range(self.config.smooth_rounds):
            images = bilateral(images, _SMOOTH_WINDOW, self.config.smooth_levels / LEVELS, _SMOOTH_SIGMA)
        return images

    @torch.no_grad()
    def _clean(self, batch: Batch) -> Tensor:
        return self.model.mean_latents(batch.originals)


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

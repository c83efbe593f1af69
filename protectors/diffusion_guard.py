"""DiffusionGuard (Choi et al., ICLR 2025, https://arxiv.org/abs/2410.05694)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from protectors.base import Batch
from protectors.config import PgdConfig, require
from protectors.inpainting import InpaintingModel
from protectors.objectives import embed_prompts
from protectors.pgd import PgdPlan, Places, Plateau, Progress, pgd, start_of
from protectors.randomness import normal, streams
from protectors.search import PgdProtector

# Points along each side of the random field over a mask that decides how far its contour moves; smooth in between.
_FIELD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionGuardConfig(PgdConfig):
    """Fields of ``PgdConfig``, the timestep and the prompt."""

    # Published: it starts at the original.
    random_start: bool = False
    # The loss is taken at the first timestep of a sampler with so many steps: 751 of 1000 for the published 4.
    schedule_steps: int = 4
    # Text for images that come without one; the published one is empty.
    prompt: str = ""

    def check(self) -> None:
        PgdConfig.check(self)
        require(self.schedule_steps >= 1, "schedule_steps", self.schedule_steps, "use 1 or more")


class DiffusionGuard(PgdProtector[DiffusionGuardConfig, InpaintingModel]):
    """Maximises the norm of an inpainting model's first noise estimate, for many masks of about the right shape.

    "DiffusionGuard: A Robust Defense Against Malicious Diffusion-based Image Editing", https://arxiv.org/abs/2410.05694.
    J = || eps_theta(z_T, t, m', E(x with m' blanked)) ||_2 with pure noise z_T, new in each step, t the first timestep
    of a short sampler, and m' the attacker's mask with its kept area randomly shrunk.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``DiffusionGuardConfig``. The published 16/255 and 1/255 on [-1, 1] are 8 levels and half a level.
        model: ``InpaintingModel``.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape. ``masks`` are 1 where the image may change: the area that an attacker keeps
        (a face), the opposite of the attacker's own mask. Without masks each step keeps a random box, with sides of
        half to the whole of the image's.

    Returns:
        ``ProtectResult``; the objective is J over ``eval_draws`` fixed draws of noise and m'.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``InpaintingModel``.

    Cost: per step one encoder and one UNet pass, forward and backward. Once per image the depth of its mask.

    Differs from the paper: the kept area shrinks by a smooth random share of its own depth at each place, where the
        published code jitters and smooths the points of its contour up to 14 times; both stay inside the original area
        and treat its parts apart. Images may come without masks. The result is rounded inside the budget, where the
        public code truncates and can exceed it by one level.
    """

    name = "diffusion_guard"
    version = "1"
    config_type = DiffusionGuardConfig
    model_type = InpaintingModel
    presets: ClassVar[Mapping[str, DiffusionGuardConfig]] = {
        "paper": DiffusionGuardConfig(eps_levels=8.0, step_levels=0.5, steps=800),
        "fast": DiffusionGuardConfig(eps_levels=8.0, step_levels=1.0, steps=40),
        "strong": DiffusionGuardConfig(eps_levels=16.0, step_levels=0.5, steps=800),
    }

    def __init__(self, config: DiffusionGuardConfig, model: InpaintingModel) -> None:
        super().__init__(config, model)
        self._known: WeakKeyDictionary[Batch, KeptAreas] = WeakKeyDictionary()

    def _climb(self, batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        generators = streams(batch.seeds, "diffusion_guard/attack")
        embeddings = embed_prompts(self.model, batch, self.config.prompt)
        areas = self._areas(batch)
        start = start_of(self.config, batch.originals, generators)

        def loss(images: Tensor, places: Places) -> Tensor:
            active = [generators[place] for place in places]
            return self._norm(images, areas.draw(active, places), embeddings[places], active)

        plan = PgdPlan.of(self.config, ascend=True)
        return pgd(loss, batch.originals, plan, start=start, masks=batch.masks, progress=progress, plateau=plateau)

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        generators = streams(batch.seeds, "diffusion_guard/evaluation")
        embeddings = embed_prompts(self.model, batch, self.config.prompt)
        areas = self._areas(batch)
        norms = [
            self._norm(images, areas.draw(generators), embeddings, generators) for _ in range(self.config.eval_draws)
        ]
        return torch.stack(norms).mean(0)

    def _areas(self, batch: Batch) -> KeptAreas:
        """The masks' depths are found once for the attack and both measurements."""
        if batch not in self._known:
            self._known[batch] = KeptAreas(batch)
        return self._known[batch]

    def _norm(self, images: Tensor, kept: Tensor, embeddings: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        shape = self.model.latent_shape(images)
        noisy, posterior = (normal(generators, shape).to(self.model.device) for _ in range(2))
        t = first_timestep(self.model.schedule.timesteps, self.config.schedule_steps)
        times = torch.full((len(images),), t, device=self.model.device)
        condition = self.model.condition(images, 1 - kept, posterior)
        prediction = self.model.predict(noisy, condition, times, embeddings)
        estimate = self.model.schedule.predict_noise(noisy, prediction, times)
        norm: Tensor = torch.linalg.vector_norm(estimate.flatten(1), dim=1)
        return norm


def first_timestep(timesteps: int, steps: int) -> int:
    """Where a sampler with this many evenly spaced steps begins, offset by 1 as SD's schedulers are."""
    return min(timesteps // steps * (steps - 1) + 1, timesteps - 1)


class KeptAreas:
    """Draws the areas that an attacker may keep of each image: shrunk masks, or boxes where there are no masks."""

    def __init__(self, batch: Batch) -> None:
        self._originals, self._masks = batch.originals, batch.masks
        if batch.masks is not None:
            self._depth = depth(batch.masks)
            self._deepest = spread_peaks(self._depth)
            self._boxes = [bounding_box(mask) for mask in batch.masks]

    def draw(self, generators: Sequence[torch.Generator], places: Places | None = None) -> Tensor:
        """``(B, 1, H, W)``, 1 = kept; each image's from its own generator. With places: of the images there alone."""
        height, width = self._originals.shape[-2:]
        if self._masks is None:
            return torch.stack([_box(height, width, generator) for generator in generators]).to(self._originals)
        places = list(range(len(self._masks))) if places is None else places
        shares = torch.zeros(len(places), 1, height, width)
        for share, place, generator in zip(shares, places, generators, strict=True):
            inside = share[self._boxes[place]]  # a view
            inside[:] = _field(inside.shape[1], inside.shape[2], generator)
        # The deepest points of each part stay, because every share is below 1: no part vanishes.
        depths = self._depth[places]
        return (depths > shares.to(depths) * self._deepest[places]).to(depths)


def bounding_box(mask: Tensor) -> tuple[slice, slice, slice]:
    """Where the ones of a mask ``(1, H, W)`` lie; all of it if there are none."""
    rows, columns = (mask[0].any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return slice(None), _span(rows), _span(columns)


def _span(places: list[int]) -> slice:
    return slice(places[0], places[-1] + 1) if places else slice(None)


def depth(masks: Tensor) -> Tensor:
    """How many pixels each point lies inside its area, ``(B, 1, H, W)``: 1 at the rim, 0 outside.

    Diagonal steps count as one; what lies beyond the picture is outside.
    """
    layer, total = masks, torch.zeros_like(masks)
    while bool(layer.any()):
        total = total + layer
        layer = 1 - F.max_pool2d(F.pad(1 - layer, (1, 1, 1, 1), value=1.0), 3, stride=1)
    return total


def spread_peaks(depths: Tensor) -> Tensor:
    """At each point the largest depth of the connected area that it lies in, ``(B, 1, H, W)``.

    Only within H + W steps inside the area, which is beyond any part that does not wind: a mask like a maze would
    take as many passes as its way is long.
    """
    inside, peaks = depths > 0, depths
    for _ in range(sum(depths.shape[-2:])):
        spread = F.max_pool2d(peaks, 3, stride=1, padding=1) * inside
        if torch.equal(spread, peaks):
            break
        peaks = spread
    return peaks


def _field(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Shares of the depth to take away, ``(1, H, W)`` in [0, 1): smooth in space, of a random strength."""
    strength = torch.rand((), generator=generator)
    points = torch.rand((1, 1, _FIELD, _FIELD), generator=generator)
    return strength * F.interpolate(points, (height, width), mode="bilinear")[0]


def _box(height: int, width: int, generator: torch.Generator) -> Tensor:
    """1 in a box at a random place, with sides of half to the whole of the picture's, ``(1, H, W)``."""
    box = torch.ones(1, height, width)
    for dim, side in ((1, height), (2, width)):
        share, place = torch.rand(2, generator=generator).tolist()
        length = math.ceil(side * (0.5 + share / 2))
        first = int(place * (side - length + 1))
        indices = torch.arange(side)
        outside = indices[(indices < first) | (indices >= first + length)]
        box.index_fill_(dim, outside, 0.0)
    return box

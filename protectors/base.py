"""The shape of every image protection method: a final ``protect`` around the method's own ``_perturb``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import ClassVar, Generic, TypeVar, cast, final

import torch
from torch import Tensor

from protectors.config import ProtectorConfig
from protectors.constraints import linf_levels, psnr_db, quantize, to_8bit
from protectors.model_files import ModelError
from protectors.pgd import Progress
from protectors.randomness import SEED_LIMIT

ConfigT = TypeVar("ConfigT", bound=ProtectorConfig)
ModelT = TypeVar("ModelT")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What was done to one image."""

    seed: int
    """The seed that it was protected with."""
    steps: int
    """Optimizer steps that it took, over all starts."""
    objective_before: float
    """The method's objective at the original rounded to 8 bit; higher means better protected."""
    objective_after: float
    """The same, with the same draws, at the returned image. Of several starts the best one by this number is returned,
    which makes it look a little better than fresh draws would."""
    linf_levels: int
    """Largest change of any value, in 8-bit levels."""
    psnr_db: float
    """Distance to the original; infinite if nothing changed."""
    failed: str | None = None
    """Why this image could not be protected, or None. A failed image comes back as its original."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectResult:
    """Images and their facts, in the order of the input."""

    images: Tensor
    """``(B, 3, H, W)`` float32 on the CPU; every value is a whole 8-bit level divided by 255."""
    facts: tuple[ImageFacts, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Perturbed:
    """What a method found, where images differ in their steps."""

    images: Tensor
    """``(B, 3, H, W)``, not yet rounded; NaN marks an image that failed."""
    steps: tuple[int, ...]
    """Optimizer steps of each image."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Batch:
    """Checked input of a method, on the device where it computes.

    One object serves a whole call of ``protect``: what is costly to derive from it can be kept in a
    ``WeakKeyDictionary``.
    """

    originals: Tensor
    """``(B, 3, H, W)`` float32 in [0, 1], rounded to 8 bit."""
    seeds: tuple[int, ...]
    """One per image."""
    prompts: tuple[str, ...] | None = None
    """One per image, or None for the method's default."""
    masks: Tensor | None = None
    """``(B, 1, H, W)`` float32, 1 = may change, 0 = must stay; None = all may change."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Places of the images that show one subject, one tuple per subject. Within it they are in the order of their
    seeds, so that results do not depend on the order of the batch."""

    @property
    def owners(self) -> tuple[int, ...]:
        """Number of each image's group."""
        number_of = {place: number for number, group in enumerate(self.groups) for place in group}
        return tuple(number_of[place] for place in range(len(self.seeds)))

    def part(self, places: Sequence[int]) -> Batch:
        """The images at these places alone; of a group that is cut, those that are among them."""
        new = {place: number for number, place in enumerate(places)}
        groups = (tuple(new[place] for place in group if place in new) for group in self.groups)
        chosen = list(places)
        return Batch(
            originals=self.originals[chosen],
            seeds=tuple(self.seeds[place] for place in places),
            prompts=None if self.prompts is None else tuple(self.prompts[place] for place in places),
            masks=None if self.masks is None else self.masks[chosen],
            groups=tuple(group for group in groups if group),
        )


class ImageProtector(ABC, Generic[ConfigT, ModelT]):
    """Base of the methods that protect images one by one, batched for speed.

    A subclass sets the class attributes and writes ``_perturb``, ``_objective`` and ``steps``; budget, masks,
    rounding and checks are enforced here, where it cannot forget them.

    Args:
        config: the method's own configuration; start from ``presets``.
        model: the surrogate model, or None for a class whose ``model_type`` is ``NoneType``.

    Raises:
        TypeError: the configuration is not of ``config_type``.
        ModelError: the model is not of ``model_type``.
    """

    name: ClassVar[str]
    """The name in the registry."""
    version: ClassVar[str]
    """Raised whenever the same input and configuration give other pixels; part of fingerprints."""
    config_type: ClassVar[type[ProtectorConfig]]
    presets: ClassVar[Mapping[str, ProtectorConfig]]
    """At least ``paper`` (faithful), ``fast`` (CPU and demo) and ``strong``."""
    model_type: ClassVar[type]
    """Class of the surrogate model; ``NoneType`` if the method needs none."""

    def __init__(self, config: ConfigT, model: ModelT) -> None:
        if not isinstance(config, self.config_type):
            raise TypeError(
                f"{self.name} takes a {self.config_type.__name__}, not a {type(config).__name__}; "
                f"start from {type(self).__name__}.presets"
            )
        if not isinstance(model, self.model_type):
            raise ModelError(
                f"{self.name} takes a model of class {self.model_type.__name__}, not {type(model).__name__}"
            )
        self.config = config
        self.model = model

    @classmethod
    def needs_model(cls) -> bool:
        """False for methods that are built with ``model=None``."""
        return cls.model_type is not NoneType

    @property
    def device(self) -> torch.device:
        """Where the method computes: the model's device."""
        return cast(torch.device, getattr(self.model, "device", torch.device("cpu")))

    @final
    def protect(
        self,
        images: Tensor,
        *,
        prompts: Sequence[str] | None = None,
        masks: Tensor | None = None,
        groups: Sequence[str] | None = None,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> ProtectResult:
        """Protects a batch; every image, or every group of them, as if it were alone.

        The input is rounded to 8 bit first, and the budget holds around that. An image for which the method
        finds no finite result comes back unchanged, with ``failed`` set. It can disturb images of its own group,
        where a method trains on them together, and never those of other groups.

        Args:
            images: ``(B, 3, H, W)`` float32 in [0, 1], any device.
            prompts: what each image shows; None takes the method's default.
            masks: ``(B, 1, H, W)``, values 0 and 1 only; 1 = may change.
            groups: the subject that each image shows, for methods that train on all images of a subject; None
                takes every image for a subject of its own. The other methods do not look at it.
            seeds: one unsigned 64-bit number per image; the same seed gives the same pixels.
            progress: called with (steps done, steps in all).

        Raises:
            ValueError: the input breaks one of these rules; the message says which.
        """
        batch = self._check(images, seeds, prompts=prompts, masks=masks, groups=groups)
        before = self._measure(batch.originals, batch)
        found = self._perturb(batch, progress)
        if isinstance(found, Tensor):
            found = Perturbed(images=found, steps=(self.steps,) * len(batch.seeds))
        saved, finite = self._saved(found.images.detach(), batch)
        after = self._measure(saved, batch)
        failures = [_failure(*row) for row in zip(finite.tolist(), before, after, strict=True)]
        return self._result(saved, batch, found.steps, failures, (before, after))

    @final
    def objective(
        self,
        images: Tensor,
        *,
        originals: Tensor,
        prompts: Sequence[str] | None = None,
        seeds: Sequence[int],
    ) -> Tensor:
        """The method's own objective per image, turned so that higher means better protected.

        The random draws depend on the seeds alone, so values of the original, the protected and the purified
        image are paired when they are taken with one seed.

        Args:
            images: ``(B, 3, H, W)`` float32 in [0, 1].
            originals: the clean images, for methods that compare with them; same shape.
            prompts, seeds: as in ``protect``.

        Returns:
            ``(B,)`` float32 on the CPU, no graph.
        """
        batch = self._check(originals, seeds, prompts=prompts)
        _check_images(images)
        if images.shape != originals.shape:
            raise ValueError(f"images {tuple(images.shape)} and originals {tuple(originals.shape)} differ in shape")
        with torch.no_grad():
            return self._objective(images.to(self.device), batch).float().cpu()

    @property
    @abstractmethod
    def steps(self) -> int:
        """Optimizer steps per image, at most."""

    @abstractmethod
    def _perturb(self, batch: Batch, progress: Progress | None) -> Tensor | Perturbed:
        """The perturbed images, in the shape of ``batch.originals``; NaN marks an image that failed."""

    @abstractmethod
    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        """``objective`` for checked input on the right device, without graph."""

    def _saved(self, perturbed: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is stored of perturbed images, and which of them are finite ``(B,)``; the others are their originals."""
        if perturbed.shape != batch.originals.shape:
            raise RuntimeError(f"{self.name}._perturb changed the shape to {tuple(perturbed.shape)}")
        saved = quantize(perturbed, batch.originals, self.config.eps_levels)
        if batch.masks is not None:
            saved = torch.where(batch.masks > 0, saved, batch.originals)
        # NaN survives rounding and clamping, so this sees whatever went wrong before.
        finite = saved.isfinite().flatten(1).all(1)
        return torch.where(finite.view(-1, 1, 1, 1), saved, batch.originals), finite

    def _measure(self, images: Tensor, batch: Batch) -> list[float]:
        with torch.no_grad():
            return cast(list[float], self._objective(images, batch).tolist())

    def _result(
        self,
        saved: Tensor,
        batch: Batch,
        steps: Sequence[int],
        failures: list[str | None],
        objectives: tuple[list[float], list[float]],
    ) -> ProtectResult:
        failed = torch.tensor([failure is not None for failure in failures], device=saved.device)
        saved = torch.where(failed.view(-1, 1, 1, 1), batch.originals, saved)
        rows = zip(
            batch.seeds,
            steps,
            *objectives,
            linf_levels(saved, batch.originals).tolist(),
            psnr_db(saved, batch.originals).tolist(),
            failures,
            strict=True,
        )
        facts = tuple(
            ImageFacts(
                seed=seed,
                steps=taken,
                objective_before=before,
                objective_after=after,
                linf_levels=int(linf),
                psnr_db=psnr,
                failed=failure,
            )
            for seed, taken, before, after, linf, psnr, failure in rows
        )
        return ProtectResult(images=saved.cpu(), facts=facts)

    def _check(
        self,
        images: Tensor,
        seeds: Sequence[int],
        *,
        prompts: Sequence[str] | None = None,
        masks: Tensor | None = None,
        groups: Sequence[str] | None = None,
    ) -> Batch:
        _check_images(images)
        size, _, height, width = images.shape
        if len(seeds) != size:
            raise ValueError(f"{len(seeds)} seeds for {size} images; pass one per image")
        if not all(0 <= seed < SEED_LIMIT for seed in seeds):
            raise ValueError("seeds must be unsigned 64-bit numbers, 0 to 2**64 - 1")
        if isinstance(prompts, str) or (prompts is not None and len(prompts) != size):
            raise ValueError(f"prompts must be a list of {size} texts, one per image, or None")
        if isinstance(groups, str) or (groups is not None and len(groups) != size):
            raise ValueError(f"groups must be a list of {size} names, one per image, or None")
        if masks is not None:
            if masks.shape != (size, 1, height, width):
                raise ValueError(f"masks are {tuple(masks.shape)}; use {(size, 1, height, width)}")
            if not ((masks == 0) | (masks == 1)).all():
                raise ValueError("masks must hold 0 (must stay) and 1 (may change) only")
            masks = masks.to(self.device, torch.float32)
        return Batch(
            originals=to_8bit(images.detach().to(self.device)),
            seeds=tuple(seeds),
            prompts=None if prompts is None else tuple(prompts),
            masks=masks,
            groups=_members(seeds, groups),
        )


def _members(seeds: Sequence[int], groups: Sequence[str] | None) -> tuple[tuple[int, ...], ...]:
    if groups is None:
        return tuple((place,) for place in range(len(seeds)))
    places: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    return tuple(tuple(sorted(group, key=seeds.__getitem__)) for group in places.values())


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images are {tuple(images.shape)}; use (B, 3, H, W) with at least one pixel")
    if images.dtype != torch.float32:
        raise ValueError(f"images are {images.dtype}; use torch.float32 in [0, 1]")
    # One comparison catches NaN too: no comparison with it is true.
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images hold NaN or values outside [0, 1]; scale 8-bit values by 1/255")


def _failure(finite: bool, before: float, after: float) -> str | None:
    if not finite:
        return "not finite: the perturbed image holds NaN or infinite values"
    if not torch.tensor([before, after]).isfinite().all():
        return f"not finite: the objective went from {before} to {after}"
    return None

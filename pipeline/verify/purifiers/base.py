"""What every purifier is: parameters in a frozen dataclass, 8-bit pixels in, 8-bit pixels of the same size out."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind
from protectors.randomness import streams


@dataclass(frozen=True, kw_only=True)
class Purifier(ABC):
    """What an attacker does to an image before using it. A subclass's fields are its parameters."""

    # Kind of checkpoint it needs first; None for plain image processing. `missing` tells of all kinds.
    needs: ClassVar[ModelKind | None] = None

    @property
    def summary(self) -> str:
        """One line for listings: the first of the class's docstring."""
        return (inspect.getdoc(type(self)) or "").partition("\n")[0]

    @property
    def randomised(self) -> bool:
        """Whether the result depends on the seed: one draw per call, which tables call "one-shot"."""
        return False

    def missing(self, models: AttackModels) -> ModelKind | None:
        """The first kind of checkpoint that it needs and the attacker lacks; None: it can run."""
        return None if models.has(self.needs) else self.needs

    @final
    def purify(self, images: Tensor, *, seeds: Sequence[int], models: AttackModels) -> Tensor:
        """Purifies a batch; row i depends on image i, seed i and the parameters alone.

        Args:
            images: uint8 `(B, 3, H, W)`, sRGB, any size.
            seeds: one per image, of the purifier's own random draws.
            models: the attacker's checkpoints.

        Returns:
            uint8 of the same shape, on the CPU; floats between inner iterations, rounded once at the end.

        Raises:
            ValueError: the images are not uint8 `(B, 3, H, W)`, or there are none, or the number of seeds differs.
            ModelMissing: the checkpoint it needs was not given.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        if len(seeds) != len(images):
            raise ValueError(f"{len(images)} images and {len(seeds)} seeds: give one per image")
        with torch.no_grad():
            purified = self._purify(images.cpu().float() / 255, streams(seeds, f"purify/{self!r}"), models)
        if purified.shape != images.shape or not bool(purified.isfinite().all()):
            raise RuntimeError(f"{type(self).__name__} broke its contract: shape {tuple(purified.shape)} or not finite")
        return (purified.clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    @abstractmethod
    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        """The method itself: float `(B, 3, H, W)` in [0, 1] on the CPU, one generator per image; same shape back."""

    def parameters(self) -> dict[str, Any]:
        """What a report records of it: the class's name and every field."""
        return {"kind": type(self).__name__, **asdict(self)}

"""What every editing attack is: an image and a wish in, the edited image of the same size out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind
from protectors.randomness import streams


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What is wanted of one image."""

    # Describes the edited image; for instruction models, the instruction.
    target: str
    # Describes the image as it is; "" where nobody knows.
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Editor(ABC):
    """What an attacker does to a single image. A subclass's fields are its parameters."""

    # Short name of the registry.
    name: ClassVar[str]
    # Kind of checkpoint it needs.
    needs: ClassVar[ModelKind] = ModelKind.LATENT
    # Whether it repaints the area of a mask only.
    needs_mask: ClassVar[bool] = False

    @final
    def edit(
        self,
        images: Tensor,
        edits: Sequence[Edit],
        *,
        seeds: Sequence[int],
        models: AttackModels,
        masks: Tensor | None = None,
    ) -> Tensor:
        """Edits a batch; row i depends on image, wish, mask and seed i and the parameters alone.

        Args:
            images: uint8 `(B, 3, H, W)`, sRGB, any size; worked on at a padded size where the model needs one.
            edits: one per image.
            seeds: one per image.
            models: the attacker's checkpoints.
            masks: `(B, 1, H, W)` in {0, 1}, 1 where the image is repainted; only for editors that need one.

        Returns:
            uint8 of the images' shape.

        Raises:
            ValueError: wrong shapes, counts or type; a mask where none is used, or none where one is needed.
            ModelMissing: the checkpoint it needs was not given.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        if not len(images) == len(edits) == len(seeds):
            raise ValueError(
                f"{len(images)} images, {len(edits)} edits, {len(seeds)} seeds: give one of each per image"
            )
        if (masks is not None) != self.needs_mask:
            raise ValueError(f"{self.name} {'needs' if self.needs_mask else 'uses no'} masks")
        if masks is not None and masks.shape != (len(images), 1, *images.shape[2:]):
            raise ValueError(f"masks must be {(len(images), 1, *images.shape[2:])}, not {tuple(masks.shape)}")
        with torch.no_grad():
            edited = self._edit(images.float() / 255, edits, streams(seeds, f"edit/{self!r}"), models, masks)
        if edited.shape != images.shape or not bool(edited.isfinite().all()):
            raise RuntimeError(f"{self.name} broke its contract: shape {tuple(edited.shape)} or not finite")
        return (edited.clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    @abstractmethod
    def _edit(
        self,
        images: Tensor,
        edits: Sequence[Edit],
        generators: Sequence[torch.Generator],
        models: AttackModels,
        masks: Tensor | None,
    ) -> Tensor:
        """The method itself: float `(B, 3, H, W)` in [0, 1] in and out, one generator per image."""

    def parameters(self) -> dict[str, Any]:
        """What a report records of it: name and every field."""
        return {"name": self.name, **asdict(self)}

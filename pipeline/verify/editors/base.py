"""What every editing attack is: an image and a wish in, the edited image of the same size out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.padding import pad_to_multiple
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

    # Short name of the method.
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

        The images are edited one after the other, so that a row is the same bit for bit in any batch. Each is
        worked on at its own size, mirrored at the right and bottom edge up to the next size that the model takes.

        Args:
            images: uint8 `(B, 3, H, W)`, sRGB, any size.
            edits: one per image.
            seeds: one per image, unsigned 64-bit.
            models: the attacker's checkpoints; left exactly as they were.
            masks: `(B, 1, H, W)` in {0, 1}, 1 where the image is repainted; only for editors that need one.

        Returns:
            uint8 of the images' shape, on the CPU; under 0 of a mask equal to the images.

        Raises:
            ValueError: wrong shapes, counts or type; a mask where none is used, or none where one is needed; a
                mask that is empty or not of 0 and 1; a wish that the method cannot act on.
            ModelMissing: the checkpoint it needs was not given.
            ModelError: the checkpoint is of another kind than it was given as.
        """
        self._check(images, edits, seeds, masks)
        given = models.get(self.needs)
        areas = torch.ones_like(images[:, :1]) if masks is None else masks.cpu()
        generators = streams(seeds, f"edit/{self!r}")
        with torch.no_grad():
            rows = [
                self._edit_one(given, image, edit, generator, area)
                for image, edit, generator, area in zip(images.cpu(), edits, generators, areas, strict=True)
            ]
        return torch.where(areas != 0, torch.stack(rows), images.cpu())

    @abstractmethod
    def _edit(self, given: Any, image: Tensor, edit: Edit, generator: torch.Generator, mask: Tensor) -> Tensor:
        """The method itself, for one image.

        Args:
            given: the checkpoint's diffusers pipeline; build others from its networks, but leave them as they are.
            image: float `(1, 3, h, w)` in [0, 1] on the CPU; both sides are multiples of the model's stride.
            edit: the wish.
            generator: of all random draws, on the CPU.
            mask: float `(1, 1, h, w)` in {0, 1}; 1 everywhere for editors that need none.

        Returns:
            float `(1, 3, h, w)`, about [0, 1], on any device.
        """

    def parameters(self) -> dict[str, Any]:
        """What a report records of it: name and every field."""
        return {"name": self.name, **asdict(self)}

    def _check(self, images: Tensor, edits: Sequence[Edit], seeds: Sequence[int], masks: Tensor | None) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        if not len(images) == len(edits) == len(seeds):
            raise ValueError(
                f"{len(images)} images, {len(edits)} edits, {len(seeds)} seeds: give one of each per image"
            )
        if (masks is not None) != self.needs_mask:
            raise ValueError(f"{self.name} {'needs' if self.needs_mask else 'uses no'} masks")
        if masks is None:
            return
        if masks.shape != (len(images), 1, *images.shape[2:]):
            raise ValueError(f"masks must be {(len(images), 1, *images.shape[2:])}, not {tuple(masks.shape)}")
        if not bool(((masks == 0) | (masks == 1)).all()):
            raise ValueError("masks must be 0 where the image is kept and 1 where it is repainted, nothing else")
        if not bool((masks == 1).flatten(1).any(1).all()):
            raise ValueError("a mask is 0 everywhere: nothing would be repainted")

    def _edit_one(self, given: Any, image: Tensor, edit: Edit, generator: torch.Generator, area: Tensor) -> Tensor:
        """uint8 `(3, H, W)` in and out; the padding is put on and taken off here."""
        stride = model_stride(given)
        padded, mask = pad_to_multiple(image[None].float() / 255, stride), pad_to_multiple(area[None].float(), stride)
        edited = self._edit(given, padded, edit, generator, mask)
        if edited.shape != padded.shape or not bool(edited.isfinite().all()):
            raise RuntimeError(f"{self.name} broke its contract: shape {tuple(edited.shape)} or not finite")
        cropped = edited[0, :, : image.shape[1], : image.shape[2]]
        return (cropped.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def model_stride(given: Any) -> int:
    """Pixels of which both sides of an image must be a multiple."""
    # The UNet halves its input once per block but the last, and its skip connections need even sides.
    stride: int = given.vae_scale_factor * 2 ** (len(given.unet.config.block_out_channels) - 1)
    return stride

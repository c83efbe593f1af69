"""Which kind of model a method attacks, and how models of that kind are found and loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from protectors.base import ImageProtector
from protectors.diffusion import DiffusionModel, load_model
from protectors.inpainting import InpaintingModel, load_inpainting_model
from protectors.model_files import Form, ModelError, model_base_size
from protectors.pixel import PixelModel, load_pixel_model
from protectors.reference import NANO_DDPM, NANO_SD


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Everything about one kind of model that is needed before one is loaded."""

    # The kind as attackers' checkpoints are named: "latent", "inpaint", "pixel".
    kind: str
    # What the folder must hold.
    form: Form
    # The embedded model, for jobs that name none; None where there is none.
    embedded: str | None
    # (path or id, device=, dtype=) -> the model.
    load: Callable[..., Any]
    # Shorter side of an image at training scale, in sides of the model.
    scale: int = 1

    def training_scale(self, path_or_id: str) -> int:
        """Side in pixels to which images are brought for this model; raises ModelError where it does not fit."""
        return self.scale * model_base_size(path_or_id, self.form)


_SOURCES: dict[type, ModelSource] = {
    DiffusionModel: ModelSource(kind="latent", form="latent text-to-image", embedded=NANO_SD, load=load_model),
    InpaintingModel: ModelSource(kind="inpaint", form="latent inpainting", embedded=None, load=load_inpainting_model),
    # Purifiers work in tiles of half the size at which attackers train: 256 of 512, and 64 of 128 with nano-ddpm.
    PixelModel: ModelSource(kind="pixel", form="pixel-space", embedded=NANO_DDPM, load=load_pixel_model, scale=2),
}


def model_source(method: type[ImageProtector[Any, Any]]) -> ModelSource:
    """The source of the models that a method takes.

    Raises:
        ModelError: Nothing is known about the method's ``model_type``.
    """
    source = _SOURCES.get(method.model_type)
    if source is None:
        known = ", ".join(kind.__name__ for kind in _SOURCES)
        raise ModelError(f"nothing loads a {method.model_type.__name__}, which {method.name} takes; known: {known}")
    return source


def load_for(
    method: type[ImageProtector[Any, Any]], path_or_id: str, *, device: torch.device | str, dtype: torch.dtype
) -> Any:
    """Loads a model of the method's ``model_type``.

    Args:
        method: the class that will be built with it.
        path_or_id: diffusers folder or hub id.
        device: where the networks run.
        dtype: of the networks.

    Raises:
        ModelError: no such model, or one of another kind.
    """
    return model_source(method).load(path_or_id, device=device, dtype=dtype)

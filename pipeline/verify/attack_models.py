"""The checkpoints an attacker has, by kind; loaded when they are first needed, from local folders only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.errors import UserError
from protectors.diffusion import choose_attention
from protectors.model_files import ModelError, check_folder, read_json, resolve_folder
from protectors.reference import NANO_DDPM, NANO_SD, reference_path, verify_reference


class ModelKind(StrEnum):
    """What a checkpoint can do; an attack names the one kind that it needs."""

    LATENT = "latent"  # text-to-image, SD 1.x or 2.x
    PIXEL = "pixel"  # unconditional, pixel space: a DDPMPipeline folder
    INPAINT = "inpaint"  # SD inpainting, nine channels
    INSTRUCT = "instruct"  # InstructPix2Pix, eight channels
    UPSCALER = "upscaler"  # SD x4 upscaler, seven channels
    CASCADE = "cascade"  # DeepFloyd IF, stage II


EMBEDDED: Mapping[ModelKind, str] = {ModelKind.LATENT: NANO_SD, ModelKind.PIXEL: NANO_DDPM}
"""What is there without any download."""


def with_embedded(given: Mapping[str, str]) -> dict[ModelKind, str]:
    """The embedded checkpoints and, in place of them or beside them, those that are given by kind.

    Raises:
        UserError: a kind is unknown.
    """
    if unknown := set(given) - set(ModelKind):
        raise UserError(f"no kind of model named {min(unknown)!r}; there are {', '.join(ModelKind)}")
    return {**EMBEDDED, **{ModelKind(kind): name for kind, name in given.items()}}


_CLASSES: Mapping[ModelKind, str] = {
    ModelKind.LATENT: "StableDiffusionPipeline",
    ModelKind.PIXEL: "DDPMPipeline",
    ModelKind.INPAINT: "StableDiffusionInpaintPipeline",
    ModelKind.INSTRUCT: "StableDiffusionInstructPix2PixPipeline",
    ModelKind.UPSCALER: "StableDiffusionUpscalePipeline",
    ModelKind.CASCADE: "IFImg2ImgSuperResolutionPipeline",
}


class ModelMissing(UserError):
    """The attack needs a kind of checkpoint that was not given; its cell is "not run", never another's number."""

    def __init__(self, kind: ModelKind) -> None:
        super().__init__(f"no {kind} model given: name a {_CLASSES[kind]} folder with --attack-model {kind}=FOLDER")


class AttackModels:
    """Loads and keeps the attacker's checkpoints. Nothing that an attack does may change them.

    Args:
        folders: embedded model's name, diffusers folder or hub id in the local cache, by kind.
        device: "cpu" or "cuda".
    """

    def __init__(self, folders: Mapping[ModelKind, str] = EMBEDDED, *, device: str = "cpu") -> None:
        self.folders, self.device = dict(folders), device
        self._loaded: dict[ModelKind, Any] = {}

    def has(self, kind: ModelKind | None) -> bool:
        """Whether an attack that needs this kind can run; None needs no model."""
        return kind is None or kind in self.folders

    def get(self, kind: ModelKind) -> Any:
        """The diffusers pipeline of this kind, in float32, safetensors only, without safety checker.

        Raises:
            ModelMissing: none was given.
            ModelError: the folder holds none, or is damaged.
        """
        if kind not in self.folders:
            raise ModelMissing(kind)
        if kind not in self._loaded:
            self._loaded[kind] = load_pipeline(self.folders[kind], kind, self.device)
        return self._loaded[kind]


def load_pipeline(name: str | Path, kind: ModelKind = ModelKind.LATENT, device: str = "cpu") -> Any:
    """Loads a diffusers pipeline in float32 from an embedded model's name, a folder or a cached hub id.

    Raises:
        ModelError: there is none, it is incomplete, or it holds pickled weights only.
    """
    import diffusers
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    if name in EMBEDDED.values():
        verify_reference(str(name))
        folder = reference_path(str(name))
    else:
        folder = resolve_folder(str(name))
    if kind is ModelKind.LATENT:
        check_folder(folder)
    for library in (logging, transformers_logging):
        library.disable_progress_bar()  # theirs would tear those of the command apart
    options: dict[str, Any] = _loading()
    if kind in (ModelKind.LATENT, ModelKind.INPAINT, ModelKind.INSTRUCT, ModelKind.CASCADE):
        options |= {"safety_checker": None, "requires_safety_checker": False}
    pipeline_class = getattr(diffusers, _CLASSES[kind])
    try:
        networks = _load_networks(folder, pipeline_class)
        pipeline = pipeline_class.from_pretrained(str(folder), **networks, **options).to(device)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder} is no {_CLASSES[kind]} folder: {error}") from error
    if kind is ModelKind.LATENT:
        # DDIM clips by default, where the folder's own scheduler does not say; latents must not be clipped.
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    if kind not in (ModelKind.PIXEL, ModelKind.CASCADE):  # IF attends to added keys and values: other processors
        choose_attention(pipeline.unet)
    return pipeline


def _loading() -> dict[str, Any]:
    """What every part of a checkpoint is loaded with."""
    import torch

    return {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}


def _load_networks(folder: Path, pipeline_class: Any) -> dict[str, Any]:
    """The networks that a folder holds for a pipeline, one by one: pipelines do not tell which weights are missing.

    Both libraries fill missing weights with random numbers and only log it: an attack with such a model is weak, and
    weak attacks pass for protection.
    """
    import diffusers
    import transformers
    from torch.nn import Module

    libraries = {"diffusers": diffusers, "transformers": transformers}
    wanted = inspect.signature(pipeline_class.__init__).parameters
    networks: dict[str, Any] = {}
    for name, entry in read_json(folder / "model_index.json").items():
        if name not in wanted or not isinstance(entry, list) or entry[0] not in libraries:
            continue  # the pipeline's own settings, or what it does without, such as a safety checker
        network_class: Any = getattr(libraries[entry[0]], entry[1], None)
        is_network = isinstance(network_class, type) and issubclass(network_class, Module)
        if not is_network:
            continue  # tokenizers and schedulers, and what a library does not know: the pipeline says so itself
        network, info = network_class.from_pretrained(str(folder / name), output_loading_info=True, **_loading())
        if info["missing_keys"]:
            raise ModelError(f"{folder / name} lacks weights: {sorted(info['missing_keys'])[:3]}; fetch it again")
        networks[name] = network
    return networks

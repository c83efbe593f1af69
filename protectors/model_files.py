"""Finds the folder of a diffusers model, refuses unsafe ones, and names its content by a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

MODEL_INDEX = "model_index.json"
Form = Literal["latent text-to-image", "latent inpainting", "pixel-space"]
# Component folders and the classes that may be in them; any scheduler serves, its betas are what counts.
_LATENT: dict[str, tuple[str, ...]] = {
    "scheduler": (),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
COMPONENTS: dict[Form, dict[str, tuple[str, ...]]] = {
    "latent text-to-image": _LATENT,
    "latent inpainting": _LATENT,
    "pixel-space": {"scheduler": (), "unet": ("UNet2DModel",)},
}
# Those of a latent model are all that there are.
_PARTS = tuple(_LATENT)
_WEIGHTLESS = ("scheduler", "tokenizer")
# Text and safetensors only: pickle files run code when they are loaded.
_DEFINING = ("*.json", "*.txt", "*.safetensors")
_VARIANTS = ("*.fp16.*", "*.non_ema.*")


class ModelError(ValueError):
    """The model cannot be used; the message says which part and what to do."""


def resolve_folder(path_or_id: str) -> Path:
    """The local folder of a model: a folder as it is, or the snapshot of a hub id.

    A hub id is looked up in the local cache first, so that a filled cache needs no network; otherwise
    the files are downloaded (blocks; safetensors and text only).

    Raises:
        ModelError: no such folder and no such model in reach.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path_or_id.startswith((".", "~")) or path_or_id.count("/") != 1:
        raise ModelError(f"no folder {path_or_id!r}; name a diffusers folder or a hub id such as 'owner/model'")
    return _snapshot(path_or_id)


def _snapshot(model_id: str) -> Path:
    # Costs nearly a second to import, and a local folder does not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [MODEL_INDEX, *(f"{part}/{kind}" for part in _PARTS for kind in _DEFINING)]
    fetch = partial(snapshot_download, model_id, allow_patterns=wanted, ignore_patterns=list(_VARIANTS))
    try:
        return Path(fetch(local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # not cached: ask the hub, or be told why the name is wrong
    try:
        return Path(fetch())
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{model_id!r} is neither a folder nor a model in the local cache, and the hub gave: {reason}. "
            "Download it on a machine with network access and name the folder."
        ) from error


def check_folder(folder: Path, form: Form = "latent text-to-image") -> None:
    """Raises ModelError unless the folder is a complete model of this form without pickle files."""
    if not (folder / MODEL_INDEX).is_file():
        raise ModelError(f"{folder} holds no {MODEL_INDEX}; name the top folder of a diffusers model")
    index = read_json(folder / MODEL_INDEX)
    classes = {name: value[-1] for name, value in index.items() if isinstance(value, list) and value}
    found = _form(index, classes)
    if found != form:
        raise ModelError(f"{folder} is a {found} model, and this needs a {form} one: name another folder")
    components = COMPONENTS[form]
    for part, allowed in components.items():
        if not classes.get(part) or not (folder / part).is_dir():
            raise ModelError(f"{folder} has no {part}; a {form} model needs {', '.join(components)}")
        if allowed and classes[part] not in allowed:
            raise ModelError(f"{folder / part} is a {classes[part]}; supported: {', '.join(allowed)}")
    for part in components:
        if part not in _WEIGHTLESS and not any((folder / part).glob("*.safetensors")):
            raise ModelError(
                f"{folder / part} holds no safetensors weights; pickle files are refused because loading them "
                "runs code. Convert with save_pretrained(safe_serialization=True)."
            )


def _form(index: Mapping[str, Any], classes: Mapping[str, str]) -> Form:
    """A UNet that takes no text works on pixels; the rest is told by the pipeline's class."""
    pixels = index.get("_class_name") == "DDPMPipeline" or classes.get("unet") == "UNet2DModel"
    if pixels:
        return "pixel-space"
    return "latent inpainting" if "Inpaint" in str(index.get("_class_name")) else "latent text-to-image"


def load_network(network_class: Any, folder: Path, dtype: Any) -> Any:
    """Loads one network of a diffusers or transformers folder: local safetensors only, every weight present.

    Raises:
        ModelError: The weights are damaged, incomplete, or of another network.
    """
    try:
        network, info = network_class.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=dtype
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded: {error}") from error
    # Both libraries fill missing weights with random numbers and only log it.
    if info["missing_keys"]:
        raise ModelError(f"{folder} lacks weights: {sorted(info['missing_keys'])[:3]}; fetch it again")
    return network


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model; raises ModelError when there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}; fetch the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object; fetch the model again")
    return content


def model_digest(path_or_id: str) -> str:
    """sha256 over the sorted relative names and contents of every file that defines the model.

    Weights, configurations and tokenizer count; the README, pictures and precision variants that are
    not loaded do not. Reads all weights from disk.
    """
    folder = resolve_folder(path_or_id)
    total = hashlib.sha256()
    for file in defining_files(folder, _PARTS):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def defining_files(folder: Path, parts: Iterable[str]) -> list[Path]:
    """The model's index and every file of these components that defines them, sorted by relative name.

    Text and safetensors; no pickle files, and no precision variants.
    """
    files = [folder / MODEL_INDEX]
    for part in parts:
        files += [file for file in (folder / part).glob("*") if defines(file.name)]
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def model_base_size(path_or_id: str, form: Form = "latent text-to-image") -> int:
    """Side in pixels at which a model was trained, read from its configuration alone."""
    folder = resolve_folder(path_or_id)
    check_folder(folder, form)
    try:
        sample = read_json(folder / "unet" / "config.json")["sample_size"]
        side = int(sample if isinstance(sample, int) else min(sample))
        if form == "pixel-space":
            return side
        factor: int = 2 ** (len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1)
        return side * factor
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder}: the UNet's or the VAE's config.json does not tell the model's size") from error


def defines(name: str) -> bool:
    """Whether a file of this name, in a component's folder, is one of those that define the model."""
    wanted = any(fnmatch(name, kind) for kind in _DEFINING)
    return wanted and not any(fnmatch(name, kind) for kind in _VARIANTS)

"""A small base model with the files that real ones bring along, photos of two subjects, and a job on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.protect_model.job import ConceptSource, ModelJob
from tests.pipeline.archives import photo, write_folder, write_parquet
from tests.protectors.tiny import save_tiny_model

SIDE = 16
COUNT = 3
QUICK: dict[str, Any] = {"steps": 4, "inner_steps": 1, "class_images": 2, "rate": 1e-3, "attacker_rates": [1e-3]}
# What must not be in the protected folder: the given UNet's weights in other forms, and the given model's own card.
LEFT_OUT = {
    "unet/diffusion_pytorch_model.fp16.safetensors": b"weights",
    "unet/diffusion_pytorch_model.bin": b"weights",
    "whole.safetensors": b"weights",
    "README.md": b"# The base",
}


def world(folder: Path) -> Path:
    """Writes ``model``, ``photos`` with 3 PNGs of 24 pixels, and ``subjects.parquet`` with rex, these, and mia."""
    config = save_tiny_model(folder / "model") / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": SIDE // 2}))
    write_folder(folder / "model", {**LEFT_OUT, "LICENSE.txt": b"terms", "vae/notes.txt": b"notes"})
    pictures = [photo(seed) for seed in range(COUNT)]
    write_folder(folder / "photos", {f"{name}.png": data for name, data in zip("abc", pictures, strict=True)})
    columns = {
        "asset_id": ["c", "b", "a", "m", "n"],
        "subject": ["rex", "rex", "rex", "mia", None],
        "subject_class": ["dog", "dog", "dog", "cat", None],
    }
    write_parquet(folder / "subjects.parquet", [*pictures[::-1], photo(8), photo(9)], columns)
    return folder


def job(folder: Path, out: Path | str, **changes: Any) -> ModelJob:
    """Protects the model of ``world`` against its folder of photos."""
    given = {
        "model": str(folder / "model"),
        "concepts": (ConceptSource(path=str(folder / "photos"), class_word="dog"),),
        "out": out,
        "overrides": QUICK,
        "preset": "fast",
        "checkpoint_every": 2,
    }
    given = {**given, **changes}
    return ModelJob(**{name: str(value) if isinstance(value, Path) else value for name, value in given.items()})


def contents(folder: Path) -> dict[str, bytes]:
    """All files by relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def traces(folder: Path) -> list[bytes]:
    """Pieces of the photos, and of what is cut from them, in every form that the code handles."""
    from pipeline.protect_model.concepts import read_concept

    found = [file.read_bytes()[60:92] for file in sorted((folder / "photos").iterdir())]
    concept = read_concept(ConceptSource(path=str(folder / "photos"), class_word="dog"), side=SIDE, most=None)
    crops = (concept.images * 255).round().numpy()
    for levels, image in zip(crops.astype(np.uint8), concept.images.numpy(), strict=True):
        # A row of one channel, and a row of pixels.
        found += [levels[0, 8].tobytes(), levels.transpose(1, 2, 0)[8].tobytes(), image[0, 8].tobytes()]
    for file in sorted((folder / "photos").iterdir()):
        with Image.open(file) as opened:
            found.append(np.asarray(opened.convert("RGB"))[12].tobytes())
    return found

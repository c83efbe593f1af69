"""A tiny base, photos of five subjects, and models that say that they were protected on some of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.verify_model.plan import Settings
from pipeline.verify_model.subjects import read_subjects
from protectors.model_files import model_digest
from tests.pipeline.archives import photo, write_parquet
from tests.protectors.tiny import save_tiny_model

SIDE = 32
QUICK: dict[str, Any] = {"steps": 2, "batch": 1, "prior_images": 2, "bf16": False, "sampling": {"steps": 2}}
SUBJECTS = {"ace": "dog", "cup": "mug", "ned": "dog", "rex": "dog", "zoe": "cat"}
UNET = "unet/diffusion_pytorch_model.safetensors"


def world(folder: Path) -> Path:
    """Writes ``model``, ``subjects.parquet`` with three photos of each subject, and ``held-out.parquet`` with four."""
    config = save_tiny_model(folder / "model") / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": SIDE // 2}))
    rows = [(name, number) for name in SUBJECTS for number in range(3)]
    data = [photo(place, side=SIDE + 8) for place in range(len(rows))]
    names = [name for name, _ in rows]
    columns = {
        "asset_id": [f"{name}-{number}" for name, number in rows],
        "subject": names,
        "subject_class": [SUBJECTS[name] for name in names],
    }
    write_parquet(folder / "subjects.parquet", data, columns)
    held = {"asset_id": [f"h{place}" for place in range(4)], "caption": ["a photo of a cup"] * 4}
    write_parquet(folder / "held-out.parquet", [photo(90 + place, side=SIDE) for place in range(4)], held)
    return folder


def protected(folder: Path, name: str, subjects: Sequence[str], *, noise: float = 0.0, **changes: Any) -> Path:
    """A model of ``world`` that says that it was protected on the first two photos of these.

    Its UNet is the base's with noise; without, it is the base's own, and the folder differs in a note alone.
    """
    base, out = folder / "model", folder / name
    shutil.copytree(base, out)
    (out / "tokenizer" / "notes.txt").write_text(name)
    weights = load_file(out / UNET)
    random = torch.Generator().manual_seed(1)
    save_file(
        {key: value + noise * torch.randn(value.shape, generator=random) for key, value in weights.items()}, out / UNET
    )
    known = read_subjects(folder / "subjects.parquet", SIDE)
    concepts = [{"class_word": SUBJECTS[subject], "images": sorted(known[subject].digests[:2])} for subject in subjects]
    identity = {"base": model_digest(str(base)), "method": "apdm 1", "config": {"steps": 4}, "seed": 0}
    document = {
        "identity": {**identity, "concepts": concepts, **changes},
        "base_model": "model",
        "preset": "fast",
        "facts": {"updates": 4, "drift": 0.01, "largest_change": 0.002},
        "weights": {"digest": model_digest(str(out))},
    }
    (out / "provenance.json").write_text(json.dumps(document))
    return out


def settings(folder: Path, *models: Path | str, **changes: Any) -> Settings:
    """One row on the seen photos; every other kind of trial once."""
    given = {
        "protected": tuple(map(str, models)),
        "base": str(folder / "model"),
        "photos": folder / "subjects.parquet",
        "sets": ("seen",),
        "others": 0,
        "overrides": QUICK,
        "generated": 2,
        "prompts": ("a photo of a tree",),
        "drawn": 2,
    }
    return Settings(**{**given, **changes})

"""A comparison on a tiny model, for tests."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.compare.methods import parse_methods
from pipeline.compare.plan import Settings
from tests.pipeline.archives import photo, write_parquet
from tests.protectors.tiny import save_tiny_model

SIDE = 32
QUICK = {"steps": 2, "batch": 1, "prior_images": 2, "bf16": False, "sampling": {"steps": 2}}
SUBJECTS = {"cup": "mug", "rex": "dog", "zoe": "cat"}


def write_subjects(file: Path) -> Path:
    """Three photos of each of three subjects; the first photo of "rex" bears FakeProtector's marker 7."""
    rows = [(name, number) for name in SUBJECTS for number in range(3)]
    data = [photo(place, side=SIDE, marker=7 if row == ("rex", 0) else None) for place, row in enumerate(rows)]
    names = [name for name, _ in rows]
    columns = {
        "asset_id": [f"{name}-{number}" for name, number in rows],
        "subject": names,
        "subject_class": [SUBJECTS[name] for name in names],
    }
    return write_parquet(file, data, columns)


def tiny_settings(folder: Path) -> Settings:
    """Noise against two attacks on two subjects; model and photos go into the folder."""
    config = save_tiny_model(folder / "model") / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": SIDE // 2}))
    model = {"latent": str(folder / "model")}
    return Settings(
        methods=tuple(parse_methods("noise,noise@96")),
        photos=write_subjects(folder / "subjects.parquet"),
        subjects=2,
        purifiers=("jpeg75",),
        attacks=("dreambooth", "sdedit-0.3-quick"),
        overrides=QUICK,
        generated=2,
        surrogates=model,
        models=model,
    )

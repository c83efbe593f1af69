"""What is in the folder of a protected model: the given one's files, another UNet, and how that came about."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME
from matplotlib.figure import Figure
from safetensors.torch import save_file

from pipeline.protect_model.card import model_card
from pipeline.protect_model.fetch import LEGAL
from pipeline.protect_model.plan import PROVENANCE, ModelPlan
from pipeline.protect_model.positives import FOLDER, Positives, write_positives
from pipeline.storage import json_bytes
from protectors.concepts import attacker_words
from protectors.diffusion import DiffusionModel
from protectors.dreambooth import CLASS_SAMPLER
from protectors.model_base import Curves, ProtectedModel
from protectors.model_files import MODEL_INDEX, defining_files, model_digest, read_json

_UNET = "unet"


def write_folder(folder: Path, plan: ModelPlan, protected: ProtectedModel, model: DiffusionModel) -> None:
    """Writes all files of a protected model into an empty folder.

    The same plan and weights give the same bytes: there is no clock in them.

    Args:
        folder: of this machine.
        plan: what was done.
        protected: what came of it.
        model: the given one, whose VAE decodes the positives.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    _copy(plan.folder, folder)
    weights = folder / _UNET / SAFETENSORS_WEIGHTS_NAME
    save_file({name: weight.contiguous() for name, weight in protected.weights.items()}, weights, {"format": "pt"})
    write_positives(folder / FOLDER, plan.identity["base"], _positives(plan, protected), model)
    (folder / "curves.png").write_bytes(_drawn(protected.facts.curves))
    document = provenance(plan, protected, folder, weights)
    (folder / "README.md").write_text(model_card(plan, document), encoding="utf-8")
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in folder.rglob("*") if path.is_file()}
    (folder / PROVENANCE).write_bytes(json_bytes({**document, "files": files}))


def provenance(plan: ModelPlan, protected: ProtectedModel, folder: Path, weights: Path) -> dict[str, Any]:
    """Everything about the model that is not a weight. Images are named by hashes."""
    facts = protected.facts
    return {
        **plan.run_facts(),
        "base_model": plan.base_name,
        "preset": plan.preset,
        "pairs": [
            {
                "class_word": concept.class_word,
                "images": [{"sha256": image, "positive_latents_sha256": positive} for image, positive in pairs],
            }
            for concept, pairs in zip(plan.concepts, facts.pairs, strict=True)
        ],
        "weights": {"digest": model_digest(str(folder)), "unet_sha256": _sha256(weights), "dtype": "float32"},
        "facts": {"updates": facts.steps, "drift": facts.drift, "largest_change": facts.largest_change},
        "curves": {name: list(curve) for name, curve in facts.curves.items()},
    }


def _copy(base: Path, folder: Path) -> None:
    """Copies every component as it is, but the UNet's weights: theirs would undo the protection, in any format."""
    index = read_json(base / MODEL_INDEX)
    parts = [name for name, value in index.items() if isinstance(value, list) and (base / name).is_dir()]
    files = defining_files(base, [part for part in parts if part != _UNET])
    legal = [file for file in base.iterdir() if file.is_file() and file.name.lower().startswith(LEGAL)]
    for file in [*files, *legal, base / _UNET / "config.json"]:
        copy = folder / file.relative_to(base)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _positives(plan: ModelPlan, protected: ProtectedModel) -> Sequence[Positives]:
    if plan.positives is not None:
        return plan.positives
    first, config = plan.config.class_images, plan.config  # class images are drawn before them

    def prompt(word: str) -> str:
        return attacker_words(word, config.identifiers, config.templates, compat=config.compat_prompts)[0].general

    return [
        Positives(
            class_word=concept.class_word,
            pairs=pairs,
            seeds=tuple(range(first, first + len(pairs))),
            drawn={"prompt": prompt(concept.class_word), **CLASS_SAMPLER},
            latents=latents,
        )
        for concept, pairs, latents in zip(plan.concepts, protected.facts.pairs, protected.positives, strict=True)
    ]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _drawn(curves: Curves) -> bytes:
    """Every logged value over the updates, one panel each."""
    figure = Figure(figsize=(7, 2 * len(curves)), layout="constrained")
    for place, (name, values) in enumerate(curves.items()):
        axes = figure.add_subplot(len(curves), 1, place + 1)
        axes.plot(range(1, len(values) + 1), values, marker="." if len(values) < 30 else "")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    axes.set_xlabel("update")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()

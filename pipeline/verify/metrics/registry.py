"""Which metrics can be measured here, and which cannot and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.verify.embed import Embedder
from pipeline.verify.metrics.base import Metric
from pipeline.verify.metrics.fidelity import Colour, PixelChange, Structure
from pipeline.verify.metrics.naturalness import Brisque, WeightsMissing, installed_weights
from pipeline.verify.metrics.similarity import PromptSimilarity, SubjectSimilarity

WEIGHTS = ("dino", "clip")
"""Models that are given by folder; metrics never download."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """A number that no report will hold, and why."""

    name: str
    reason: str


def available_metrics(
    weights: Mapping[str, Path] | None = None, *, device: str = "cpu"
) -> tuple[list[Metric], list[Absent]]:
    """The metrics that can be measured with these weights, and those that cannot.

    Args:
        weights: folder by name of `WEIGHTS`.
        device: of the embedding models.

    Raises:
        ValueError: an unknown name.
        ModelError: a folder was given and is not usable; it is not passed over.
    """
    given = dict(weights or {})
    if unknown := sorted(set(given) - set(WEIGHTS)):
        raise ValueError(f"unknown weights {', '.join(unknown)}; known: {', '.join(WEIGHTS)}")
    metrics: list[Metric] = [PixelChange(), Structure(), Colour()]
    metrics.append(SubjectSimilarity("nano_embed_i", Embedder(device=device)))
    absent = [
        Absent(name="lpips", reason="its backbone comes from torchvision, which is no dependency"),
        Absent(name="ism_all", reason="no face detector and face embedder that are free and need no download"),
    ]
    if "dino" in given:
        metrics.append(SubjectSimilarity("dino_i", Embedder(given["dino"], device=device)))
    else:
        absent.append(Absent(name="dino_i", reason="no weights given: a transformers folder of facebook/dino-vits16"))
    if "clip" in given:
        metrics.append(SubjectSimilarity("clip_i", Embedder(given["clip"], device=device)))
        metrics.append(PromptSimilarity(given["clip"], device=device))
    else:
        reason = "no weights given: a transformers folder of a CLIP model"
        absent += [Absent(name=name, reason=reason) for name in ("clip_i", "clip_t")]
    try:
        metrics.append(Brisque(installed_weights()))
    except WeightsMissing as error:
        absent.append(Absent(name="brisque", reason=str(error)))
    return metrics, absent

"""Which metrics can be measured here, and which cannot and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.verify.embed import Embedder
from pipeline.verify.metrics.base import Metric, WeightsMissing
from pipeline.verify.metrics.faces_dlib import dlib_faces
from pipeline.verify.metrics.fidelity import Colour, PixelChange, Structure
from pipeline.verify.metrics.frechet import FEWEST_FID
from pipeline.verify.metrics.inception import SOURCE as INCEPTION_SOURCE
from pipeline.verify.metrics.naturalness import Brisque, installed_weights
from pipeline.verify.metrics.perceptual import SOURCE as ALEXNET_SOURCE
from pipeline.verify.metrics.perceptual import Lpips
from pipeline.verify.metrics.similarity import PromptSimilarity, SubjectSimilarity

WEIGHTS = ("dino", "clip", "lpips", "inception")
"""Models that are given by folder; metrics never download. `inception` is of `fid`, which is of sets of images."""
INSTALLED = "installed"
"""Stands for a folder where the weights come with a package."""

_FROM_FOLDER: Mapping[str, tuple[tuple[str, ...], str, Callable[[Path, str], list[Metric]]]] = {
    "lpips": (("lpips",), f"a folder with {ALEXNET_SOURCE}", lambda folder, device: [Lpips(folder, device=device)]),
    "dino": (
        ("dino_i",),
        "a transformers folder of facebook/dino-vits16",
        lambda folder, device: [SubjectSimilarity("dino_i", Embedder(folder, device=device))],
    ),
    "clip": (
        ("clip_i", "clip_t"),
        "a transformers folder of a CLIP model",
        lambda folder, device: [
            SubjectSimilarity("clip_i", Embedder(folder, device=device)),
            PromptSimilarity(folder, device=device),
        ],
    ),
}
"""Names of the numbers, what must be given, and what makes the metrics."""
_FROM_PACKAGE: Mapping[str, tuple[tuple[str, ...], Callable[[], Metric]]] = {
    "faces": (("ism_all", "face_found", "face_match"), lambda: dlib_faces()),
    "brisque": (("brisque",), lambda: Brisque(installed_weights())),
}
_FID_NEEDS = f"a folder with {INCEPTION_SOURCE}; and {FEWEST_FID} images per set"


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """A number that no report will hold, and why."""

    name: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def available_metrics(
    weights: Mapping[str, Path] | None = None, *, device: str = "cpu"
) -> tuple[list[Metric], list[Absent]]:
    """The metrics that can be measured with these weights, and those that cannot.

    Args:
        weights: folder by name of `WEIGHTS`. That of `inception` makes no metric, since its number is of two sets.
        device: of the networks.

    Raises:
        ValueError: an unknown name.
        ModelError: a folder was given and is not usable; it is not passed over.
    """
    given = dict(weights or {})
    if unknown := sorted(set(given) - set(WEIGHTS)):
        raise ValueError(f"unknown weights {', '.join(unknown)}; known: {', '.join(WEIGHTS)}")
    metrics: list[Metric] = [PixelChange(), Structure(), Colour()]
    metrics.append(SubjectSimilarity("nano_embed_i", Embedder(device=device), licence="free"))
    absent: list[Absent] = []
    for kind, (names, needed, make) in _FROM_FOLDER.items():
        if kind in given:
            metrics += make(given[kind], device)
        else:
            absent += [Absent(name=name, reason=_not_given(kind, needed)) for name in names]
    for names, load in _FROM_PACKAGE.values():
        try:
            metrics.append(load())
        except WeightsMissing as error:
            absent += [Absent(name=name, reason=str(error)) for name in names]
    if "inception" not in given:
        absent.append(Absent(name="fid", reason=_not_given("inception", _FID_NEEDS)))
    return metrics, absent


def optional_numbers() -> dict[str, str]:
    """The numbers that need something given or installed, each with what it needs."""
    numbers = {name: _not_given(kind, needed) for kind, (names, needed, _) in _FROM_FOLDER.items() for name in names}
    numbers |= {name: f"not asked for: --metric {kind}" for kind, (names, _) in _FROM_PACKAGE.items() for name in names}
    return numbers | {"fid": _not_given("inception", _FID_NEEDS)}


def _not_given(kind: str, needed: str) -> str:
    return f"no weights given: --metric {kind}=FOLDER, {needed}"


def chosen_metrics(asked: Mapping[str, str], *, device: str = "cpu") -> list[Metric]:
    """The metrics that are asked for beside those that need no weights.

    Args:
        asked: folder by name; `INSTALLED` for those whose weights come with a package.
        device: of the networks.

    Raises:
        UserError: a name is unknown, has no folder or needs none, or its package is not there.
        ModelError: a folder is not usable.
    """
    metrics: list[Metric] = []
    for kind, folder in asked.items():
        if kind in _FROM_PACKAGE and folder == INSTALLED:
            try:
                metrics.append(_FROM_PACKAGE[kind][1]())
            except WeightsMissing as error:
                raise UserError(f"metric {kind}: {error}") from error
        elif kind in _FROM_FOLDER and folder != INSTALLED:
            metrics += _FROM_FOLDER[kind][2](Path(folder), device)
        else:
            forms = [f"{name}=FOLDER" for name in _FROM_FOLDER] + list(_FROM_PACKAGE)
            raise UserError(f"no metric {kind}={folder} here; there are {', '.join(forms)}")
    return metrics

"""Which metrics can be measured here, and which cannot and why."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.verify.embed import Embedder
from pipeline.verify.metrics.base import Metric, Reference, WeightsMissing
from pipeline.verify.metrics.faces import FACES
from pipeline.verify.metrics.faces_dlib import dlib_faces
from pipeline.verify.metrics.fidelity import Colour, PixelChange, Structure
from pipeline.verify.metrics.frechet import FEWEST_FID
from pipeline.verify.metrics.inception import SOURCE as INCEPTION_SOURCE
from pipeline.verify.metrics.naturalness import Brisque, installed_weights
from pipeline.verify.metrics.perceptual import SOURCE as ALEXNET_SOURCE
from pipeline.verify.metrics.perceptual import Lpips
from pipeline.verify.metrics.similarity import PromptSimilarity, SubjectSimilarity

INSTALLED = "installed"
"""Stands for a folder where the weights come with a package."""


@dataclass(frozen=True, slots=True)
class _Optional:
    """A metric whose weights are given or installed."""

    numbers: tuple[str, ...]
    needs: Reference
    # From the folder (that of a package is not asked for) and the device.
    make: Callable[[Path, str], Metric]


_FROM_FOLDER: Mapping[str, tuple[_Optional, ...]] = {
    "dino": (
        _Optional(("dino_i",), Reference.PHOTOS, lambda at, on: SubjectSimilarity("dino_i", Embedder(at, device=on))),
    ),
    "clip": (
        _Optional(("clip_i",), Reference.PHOTOS, lambda at, on: SubjectSimilarity("clip_i", Embedder(at, device=on))),
        _Optional(("clip_t",), Reference.PROMPTS, lambda at, on: PromptSimilarity(at, device=on)),
    ),
    "lpips": (_Optional(("lpips",), Reference.ORIGINALS, lambda at, on: Lpips(at, device=on)),),
}
_FROM_PACKAGE: Mapping[str, _Optional] = {
    "faces": _Optional(FACES, Reference.PHOTOS, lambda _at, _on: dlib_faces()),
    "brisque": _Optional(("brisque",), Reference.NOTHING, lambda _at, _on: Brisque(installed_weights())),
}
WEIGHTS = (*_FROM_FOLDER, "inception")
"""Models that are given by folder; metrics never download. `inception` is of `fid`, which is of sets of images."""
_NEEDED: Mapping[str, str] = {
    "dino": "a transformers folder of facebook/dino-vits16",
    "clip": "a transformers folder of a CLIP model",
    "lpips": f"a folder with {ALEXNET_SOURCE}",
    "inception": f"a folder with {INCEPTION_SOURCE}; and {FEWEST_FID} images per set",
}


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
    for kind, parts in _FROM_FOLDER.items():
        if kind in given:
            metrics += [part.make(given[kind], device) for part in parts]
        else:
            absent += [Absent(name=name, reason=_not_given(kind)) for part in parts for name in part.numbers]
    for part in _FROM_PACKAGE.values():
        try:
            metrics.append(part.make(Path(), device))
        except WeightsMissing as error:
            absent += [Absent(name=name, reason=str(error)) for name in part.numbers]
    if "inception" not in given:
        absent.append(Absent(name="fid", reason=_not_given("inception")))
    return metrics, absent


def optional_numbers() -> dict[str, tuple[str, str]]:
    """The numbers that need something given or installed, each with the name it is asked for by and what it needs."""
    numbers = {
        name: (kind, _not_given(kind))
        for kind, parts in _FROM_FOLDER.items()
        for part in parts
        for name in part.numbers
    }
    for kind, part in _FROM_PACKAGE.items():
        numbers |= {name: (kind, f"not asked for: --metric {kind}") for name in part.numbers}
    return numbers | {"fid": ("inception", _not_given("inception"))}


def _not_given(kind: str) -> str:
    return f"no weights given: --metric {kind}=FOLDER, {_NEEDED[kind]}"


def chosen_metrics(
    asked: Mapping[str, str], needs: Container[Reference] = tuple(Reference), *, device: str = "cpu"
) -> list[Metric]:
    """The metrics that are asked for beside those that need no weights, in the order of their names.

    Args:
        asked: folder by name; `INSTALLED` for those whose weights come with a package.
        needs: what there is to compare with; the networks of other metrics are not loaded.
        device: of the networks.

    Raises:
        UserError: a name is unknown, has no folder or needs none, or its package is not there.
        ModelError: a folder is not usable.
    """
    metrics: list[Metric] = []
    for kind, folder in sorted(asked.items()):
        wanted = [part for part in _parts(kind, folder) if part.needs in needs]
        try:
            metrics += [part.make(Path(folder), device) for part in wanted]
        except WeightsMissing as error:
            raise UserError(f"metric {kind}: {error}") from error
    return metrics


def _parts(kind: str, folder: str) -> Sequence[_Optional]:
    if kind in _FROM_PACKAGE and folder == INSTALLED:
        return (_FROM_PACKAGE[kind],)
    if kind in _FROM_FOLDER and folder != INSTALLED:
        return _FROM_FOLDER[kind]
    forms = [f"{name}=FOLDER" for name in _FROM_FOLDER] + list(_FROM_PACKAGE)
    raise UserError(f"no metric {kind}={folder} here; there are {', '.join(forms)}")

"""The protected models under test, what they say of themselves, and whose photos they were protected on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.ids import differing_fields
from pipeline.protect_model.fetch import is_far
from pipeline.protect_model.plan import PROVENANCE
from pipeline.storage import public_url
from pipeline.verify_model.subjects import Subject
from protectors.model_files import check_folder, model_digest

_NEEDED = ("identity", "weights", "preset", "facts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint that can be attacked."""

    folder: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """A subject that a model was protected on, found among the photos."""

    subject: Subject
    # What the attacker calls it: as the protection did.
    class_word: str
    # Places among the subject's photos, of those that the model was protected on, and of all others.
    seen: tuple[int, ...]
    unseen: tuple[int, ...]
    # Photos of the protection that are not among these.
    missing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Protected:
    """A protected model."""

    # Of its method: models of one label are one method on several concepts.
    label: str
    model: Model
    method: str
    preset: str
    config: Mapping[str, Any]
    seed: int
    # Updates, drift, largest change.
    facts: Mapping[str, Any]
    concepts: tuple[Concept, ...]


def read_protected(
    given: Sequence[str], base: Model, base_name: str, subjects: Mapping[str, Subject]
) -> tuple[Protected, ...]:
    """Reads `[LABEL=]FOLDER` each, and finds its concepts among the subjects.

    Without a label a model has that of its method and preset.

    Raises:
        UserError: a folder is no protected model or was changed since, its base is another model, its concepts are not
            among the subjects, or models of one label do not belong together.
        ModelError: a model lacks parts.
    """
    if not given:
        raise UserError("no protected model: name a folder that `fixative protect-model` has written")
    found = []
    for text in given:
        if is_far(text):
            raise UserError(f"{public_url(text)} is no folder of this machine: download it, and name where it lies")
        label, folder = split_label(text)
        document = _provenance(folder)
        _check_base(folder, document, base, base_name)
        found.append(_protected(label, folder, document, subjects))
    unlabelled = [model for model, text in zip(found, given, strict=True) if split_label(text)[0] is None]
    _check_same_method(unlabelled)
    _check_concepts(found)
    return tuple(found)


def split_label(text: str) -> tuple[str | None, Path]:
    """Label and folder of `[LABEL=]FOLDER`; a path that is there as a whole has no label."""
    label, mark, path = text.partition("=")
    if not mark or Path(text).exists():
        return None, Path(text)
    if not label.strip():
        raise UserError(f"{text}: write LABEL=FOLDER")
    return label.strip(), Path(path)


def _provenance(folder: Path) -> dict[str, Any]:
    file = folder / PROVENANCE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: name a folder that `fixative protect-model` has written") from error
    if not isinstance(document, dict) or not all(isinstance(document.get(name), dict | str) for name in _NEEDED):
        raise UserError(f"{file} is not the provenance of a protected model")
    return document


def _check_base(folder: Path, document: Mapping[str, Any], base: Model, base_name: str) -> None:
    wanted = document["identity"]["base"]
    if wanted != base.digest:
        raise UserError(
            f"{folder} was made from a model with digest {wanted[:12]} ({document.get('base_model', 'unknown')}), and "
            f"--base {base_name} has {base.digest[:12]}: name the model that it was made from"
        )


def _protected(
    label: str | None, folder: Path, document: Mapping[str, Any], subjects: Mapping[str, Subject]
) -> Protected:
    identity = document["identity"]
    check_folder(folder)
    digest = model_digest(str(folder))
    if digest != document["weights"]["digest"]:
        raise UserError(f"{folder} is not as it was written (digest {digest[:12]}): its files were changed since")
    method = str(identity["method"])
    concepts = tuple(_concept(folder, entry, subjects) for entry in identity["concepts"])
    return Protected(
        label=label or f"{method.split()[0]} {document['preset']}",
        model=Model(folder=str(folder), digest=digest),
        method=method,
        preset=str(document["preset"]),
        config=identity["config"],
        seed=int(identity["seed"]),
        facts=document["facts"],
        concepts=concepts,
    )


def _concept(folder: Path, entry: Mapping[str, Any], subjects: Mapping[str, Subject]) -> Concept:
    """The subject whose photos these hashes name."""
    wanted, word = set(entry["images"]), str(entry["class_word"])
    overlap = {name: len(wanted & set(subject.digests)) for name, subject in subjects.items()}
    holders = [name for name, count in overlap.items() if count]
    if not holders:
        raise UserError(
            f"{folder} was protected on {len(wanted)} photos of a {word}, and none of them is in --photos: name the "
            "file that it was protected from"
        )
    if len(holders) > 1:
        told = ", ".join(f"{overlap[name]} of {name}" for name in holders)
        raise UserError(f"{folder}: the photos of its concept {word!r} are of several subjects in --photos: {told}")
    subject = subjects[holders[0]]
    seen = tuple(place for place, digest in enumerate(subject.digests) if digest in wanted)
    unseen = tuple(place for place in range(len(subject.digests)) if place not in seen)
    if not unseen:
        raise UserError(
            f"{folder} was protected on every photo of {subject.name} in --photos: there is none left to compare with. "
            "Protect on fewer with --images, or add photos"
        )
    missing = len(wanted - set(subject.digests))
    return Concept(subject=subject, class_word=word, seen=seen, unseen=unseen, missing=missing)


def _check_same_method(models: Sequence[Protected]) -> None:
    """A label that nobody chose must not hide that two models were made differently."""
    first: dict[str, Protected] = {}
    for model in models:
        other = first.setdefault(model.label, model)
        ours, theirs = ({"method": one.method, "config": dict(one.config)} for one in (model, other))
        if differences := differing_fields(ours, theirs):
            raise UserError(
                f"{model.model.folder} and {other.model.folder} are both {model.label!r}, but differ "
                f"({'; '.join(differences)}): give them labels, as LABEL=FOLDER"
            )


def _check_concepts(models: Sequence[Protected]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for model in models:
        for concept in model.concepts:
            key = (model.label, concept.subject.name)
            if key in seen:
                raise UserError(
                    f"{model.model.folder} and {seen[key]} are both {model.label!r} on {concept.subject.name}: leave "
                    "one out, or give it another label, as LABEL=FOLDER"
                )
            seen[key] = model.model.folder

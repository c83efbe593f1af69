"""What the protection of a model will do, and whether it was begun or finished before. Writes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.ids import differing_fields
from pipeline.job import code_version, model_folder
from pipeline.protect_model.concepts import read_concept, split_source
from pipeline.protect_model.job import ModelJob
from pipeline.protect_model.positives import Positives, read_positives
from pipeline.storage import StorageOptions, open_store, same_or_nested
from protectors.concepts import Concept, image_digests
from protectors.model_base import ModelProtector, ModelProtectorConfig
from protectors.model_files import check_folder, model_base_size, model_digest
from protectors.model_registry import model_protector_class
from protectors.reference import PINNED
from protectors.registry import UnknownProtector

PROVENANCE = "provenance.json"
RUN = "run.json"
# One slash is enough: Path() makes one of two.
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A job with everything found and read that it needs."""

    job: ModelJob
    # Of the given model.
    folder: Path
    side: int
    method: type[ModelProtector[Any]]
    preset: str
    config: ModelProtectorConfig
    concepts: tuple[Concept, ...]
    # One per concept; None: the model draws them.
    positives: tuple[Positives, ...] | None
    # Decides the weights, with ``environment``: JSON values. Images are named by hashes.
    identity: dict[str, Any]
    environment: dict[str, Any]
    finished: bool

    @property
    def updates(self) -> int:
        """Of the protected weights, all concepts together."""
        return self.config.steps * len(self.concepts)

    @property
    def inner_steps(self) -> int:
        """Steps of the simulated attacker in each update; 0 where the method simulates none."""
        return int(getattr(self.config, "inner_steps", 0))

    @property
    def base_name(self) -> str:
        """The given model as published texts may name it: no path of this machine."""
        return Path(self.job.model).name if Path(self.job.model).expanduser().is_dir() else self.job.model

    def run_facts(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        return {"identity": self.identity, "environment": self.environment}


def plan_model(job: ModelJob) -> ModelPlan:
    """Finds model and method, reads the concepts, and looks into the folders.

    Raises:
        UserError: an unknown method, preset or field, an image that cannot be read, or a folder that is another's.
        ModelError: no such model, or one of another kind.
    """
    _check_local(job)
    method, preset, config = _method(job)
    folder = Path(model_folder(job.model))
    check_folder(folder)
    side = model_base_size(str(folder))
    concepts = tuple(read_concept(source, side=side, most=job.images) for source in job.concepts)
    base = model_digest(str(folder))
    positives = None if job.positives is None else _positives(job.positives, base, concepts)
    if positives is not None:
        pairs = zip(concepts, positives, strict=True)
        concepts = tuple(replace(concept, positives=given.given_to(concept)) for concept, given in pairs)
    identity = {
        "base": base,
        "method": f"{method.name} {method.version}",
        "config": config.to_dict(),
        "seed": job.seed,
        "concepts": [
            {"class_word": concept.class_word, "images": sorted(image_digests(concept.images))} for concept in concepts
        ],
    }
    if positives is not None:
        identity["positives"] = [[digest for _, digest in given.pairs] for given in positives]
    environment = {
        "device": torch.device(job.device).type,
        "versions": {"fixative": code_version(), **{name: version(name) for name in _LIBRARIES}},
    }
    # Through JSON, as it comes back from a file: tuples are lists there.
    identity = json.loads(json.dumps(identity))
    _check_work(job, {"identity": identity, "environment": environment})
    return ModelPlan(
        job=job,
        folder=folder,
        side=side,
        method=method,
        preset=preset,
        config=config,
        concepts=concepts,
        positives=positives,
        identity=identity,
        environment=environment,
        finished=_is_finished(job.out, identity),
    )


def _method(job: ModelJob) -> tuple[type[ModelProtector[Any]], str, ModelProtectorConfig]:
    try:
        method = model_protector_class(job.method)
    except UnknownProtector as error:
        raise UserError(str(error)) from error
    preset = job.preset or ("fast" if job.model in PINNED else "paper")
    if preset not in method.presets:
        raise UserError(f"method {job.method!r} has no preset {preset!r}; it has {', '.join(method.presets)}")
    try:
        return method, preset, method.presets[preset].replace(**job.overrides)
    except (ValueError, TypeError) as error:
        raise UserError(f"method {job.method!r}: {error}") from error


def _positives(url: str, base: str, concepts: Sequence[Concept]) -> tuple[Positives, ...]:
    return read_positives(open_store(url, StorageOptions()), base, concepts)


def _check_local(job: ModelJob) -> None:
    folders = {"--out": str(job.out), "--work": str(job.work_folder)}
    places = {"--concept": [source.path for source in job.concepts], **{name: [at] for name, at in folders.items()}}
    for name, paths in {**places, "MODEL": [job.model]}.items():
        if far := [path for path in paths if _URL.match(path)]:
            raise UserError(f"{name} {far[0]}: protect-model reads and writes on this machine alone; name a local path")
    if same_or_nested(*folders.values()):
        raise UserError(f"--work {job.work_folder} and --out {job.out} overlap: checkpoints would get into the model")
    for name, folder in folders.items():
        for source in job.concepts:
            if same_or_nested(folder, str(split_source(source.path)[0])):
                raise UserError(f"{name} {folder} and --concept {source.path} overlap: choose another folder")
        if same_or_nested(folder, job.model):
            raise UserError(f"{name} {folder} and the model {job.model} overlap: choose another folder")
    try:
        available = torch.device(job.device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError as error:
        raise UserError(f"--device {job.device}: use cpu or cuda") from error
    if not available:
        raise UserError(f"--device {job.device}: there is none on this machine")


def _is_finished(out: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds this very model; UserError where it holds anything else."""
    made = _facts(out, PROVENANCE)
    if made is None:
        return False
    if differences := differing_fields(identity, made.get("identity")):
        raise UserError(f"{out} holds another protected model ({'; '.join(differences)}): choose another --out")
    return True


def _check_work(job: ModelJob, facts: dict[str, Any]) -> None:
    work = job.work_folder
    begun = _facts(work, RUN)
    if begun is not None and (differences := differing_fields(facts, begun)):
        raise UserError(
            f"{work} holds checkpoints of another run ({'; '.join(differences)}): run that one again as it was, "
            "remove the folder, or choose another --work"
        )


def _facts(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON of a folder of ours; None: nothing is there. UserError: something else is."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is neither empty nor a folder of this command: choose another") from error
    if not isinstance(found, dict):
        raise UserError(f"{folder / name} holds no JSON object: choose another folder")
    return found

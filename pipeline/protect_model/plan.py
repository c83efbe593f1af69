"""What the protection of a model will do, and whether it was begun or finished before. Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.ids import differing_fields, sha256_hex
from pipeline.job import code_version, model_folder
from pipeline.protect_model.concepts import read_concept, read_kept, split_source
from pipeline.protect_model.fetch import Fetched, fetch_model, is_far
from pipeline.protect_model.job import ConceptSource, ModelJob
from pipeline.protect_model.positives import Positives, read_positives
from pipeline.protect_model.work import bound_to, check_bound, is_announced, keys_of
from pipeline.storage import get_json, local_path, public_url, same_or_nested
from pipeline.storage_local import LocalStore
from protectors.concepts import Concept, image_digests
from protectors.model_base import ModelProtector, ModelProtectorConfig
from protectors.model_files import ModelError, check_folder, model_base_size, model_digest
from protectors.model_registry import model_protector_class
from protectors.reference import PINNED
from protectors.registry import UnknownProtector
from protectors.retention import Kept

PROVENANCE = "provenance.json"
_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A job with everything found and read that it needs."""

    job: ModelJob
    # Of the given model, on this machine; ``fetched`` keeps one there that was downloaded.
    folder: Path
    fetched: Fetched | None
    side: int
    method: type[ModelProtector[Any]]
    preset: str
    config: ModelProtectorConfig
    concepts: tuple[Concept, ...]
    # One per concept; None: the model draws them.
    positives: tuple[Positives, ...] | None
    # Photos of other things; None: the method draws what it needs.
    kept: Kept | None
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
        """The given model as published texts may name it: no path of this machine, and no bucket."""
        model = self.job.model
        return Path(model).name if is_far(model) or Path(model).expanduser().is_dir() else model

    def run_facts(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        return {"identity": self.identity, "environment": self.environment}


def plan_model(job: ModelJob, *, trained_here: bool = True) -> ModelPlan:
    """Finds model and method, reads the concepts, and looks into the folders.

    Args:
        job: what to do.
        trained_here: whether this machine needs the job's device.

    Raises:
        UserError: an unknown method, preset or field, an image that cannot be read, or a folder that is another's.
        ModelError: no such model, or one of another kind.
    """
    _check_places(job)
    _check_device(job.device, trained_here)
    method, preset, config = _method(job)
    folder, fetched = _model(job)
    side = model_base_size(str(folder))
    concepts = tuple(read_concept(source, side=side, most=job.images, s3=job.s3) for source in job.concepts)
    base = model_digest(str(folder))
    positives = None
    if job.positives is not None:
        positives = read_positives(job.source_store(job.positives), base, concepts)
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
    kept = None
    if job.keep is not None:
        if not getattr(config, "retention_weight", 0):
            raise UserError(
                f"method {method.name!r} has no use for --keep; anchored has, as has --set retention_weight=8"
            )
        kept = read_kept(job.keep, side=side, most=job.keep_images, s3=job.s3)
        facts = json.dumps([image_digests(kept.images), kept.prompts]).encode()
        identity["kept"] = {"photos": len(kept.images), "digest": sha256_hex(facts)}
    environment = {
        "device": torch.device(job.device).type,
        "versions": {"fixative": code_version(), **{name: version(name) for name in _LIBRARIES}},
    }
    # Through JSON, as it comes back from a file: tuples are lists there.
    identity = json.loads(json.dumps(identity))
    check_bound(job, bound_to(job), {"identity": identity, "environment": environment})
    return ModelPlan(
        job=job,
        folder=folder,
        fetched=fetched,
        side=side,
        method=method,
        preset=preset,
        config=config,
        concepts=concepts,
        positives=positives,
        kept=kept,
        identity=identity,
        environment=environment,
        finished=is_finished(job, identity),
    )


def is_finished(job: ModelJob, identity: Mapping[str, Any]) -> bool:
    """Whether OUT holds this very model, whole; UserError where it holds anything else but a part of it."""
    keys = keys_of(job.out_store())
    if PROVENANCE not in keys:
        if not _is_empty(job) and not is_announced(job):
            raise UserError(f"--out {job.out_name} is neither empty nor a folder of this command: choose another")
        return False
    made = get_json(job.out_store(), PROVENANCE)
    if differences := differing_fields(identity, made.get("identity")):
        what = f"another protected model ({'; '.join(differences)})"
        raise UserError(f"{job.out_name} holds {what}: choose another --out")
    if missing := sorted(set(made.get("files", ())) - keys):
        raise UserError(f"{job.out_name} holds this model, but {missing[0]} is gone: remove it and run again")
    return True


def _is_empty(job: ModelJob) -> bool:
    store = job.out_store()
    if isinstance(store, LocalStore):  # empty folders and hidden files would be in the way too
        return not store.root.exists() or not any(store.root.iterdir())
    return not keys_of(store)


def _model(job: ModelJob) -> tuple[Path, Fetched | None]:
    """Its folder on this machine, and what keeps it there."""
    if not is_far(job.model):
        folder = Path(model_folder(job.model))
        check_folder(folder)
        return folder, None
    fetched = fetch_model(job.source_store(job.model))
    try:
        check_folder(fetched.folder)
    except ModelError as error:
        raise UserError(str(error).replace(str(fetched.folder), job.model)) from error
    return fetched.folder, fetched


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


def _check_places(job: ModelJob) -> None:
    job.out_store(), job.work_store()  # refuse addresses with passwords in them, before any is shown
    ours = {"--out": job.out, "--work": job.work_url}
    if same_or_nested(*ours.values()):
        raise UserError(f"--work {job.work_name} and --out {job.out_name} overlap: checkpoints are no part of a model")
    if is_far(job.out) and "/" not in job.out.partition("://")[2].rstrip("/"):
        raise UserError(f"--out {job.out_name} is a whole bucket: name a prefix in it")
    for name, place in ours.items():
        taken = [f"--concept {source.path}" for source in job.concepts if same_or_nested(place, _place(source))]
        taken += [f"the model {job.model}"] * same_or_nested(place, job.model)
        taken += [f"--keep {job.keep}"] * bool(job.keep and same_or_nested(place, job.keep))
        taken += [f"--positives {job.positives}"] * bool(job.positives and same_or_nested(place, job.positives))
        if taken:
            raise UserError(f"{name} {public_url(place)} and {public_url(taken[0])} overlap: choose another folder")
        if not is_far(place) and Path(local_path(place)).is_file():
            raise UserError(f"{name} {place} is a file: name a folder")


def _place(source: ConceptSource) -> str:
    return split_source(source.path)[0]


def _check_device(device: str, needed: bool) -> None:
    try:
        available = torch.device(device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError as error:
        raise UserError(f"--device {device}: use cpu or cuda") from error
    if needed and not available:
        raise UserError(f"--device {device}: there is none on this machine")

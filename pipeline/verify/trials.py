"""The customization trials of a shard: prepared from stored bytes, stored one by one, read back as tables."""

from __future__ import annotations

import uuid
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from pipeline.decode import DecodeLimits, decode, model_view
from pipeline.errors import IntegrityError, NotFound
from pipeline.ids import canonical_json, sha256_hex
from pipeline.job import NO_MODEL, Job, model_folder
from pipeline.plan import Shard
from pipeline.storage import Store, get_json, in_parallel, put_json_new
from pipeline.verify.attack_models import ModelKind, with_embedded
from pipeline.verify.cells import build_tables
from pipeline.verify.embed import Embedder
from pipeline.verify.groups import Candidate, Group, choose_groups, why_fewer
from pipeline.verify.scores import Cell, Score
from pipeline.verify.specimens import Specimens
from pipeline.verify.tables import Question, Table
from pipeline.verify.trial import (
    METRIC,
    Attack,
    Pixels,
    Trial,
    TrialResult,
    cells_of,
    needs_protected,
    scores_from_json,
    square,
)
from protectors.model_files import model_base_size

QUESTION = Question(metric=METRIC, primary=True)
EMBEDDED_TOGETHER = 8  # images in memory while look-alikes are sought


def attack_of(job: Job) -> Attack:
    """The customization attack of a job's check: on the job's own model where it has one, else on the embedded one."""
    check = job.config.job.check
    models = attack_models(job)
    return Attack(
        customizer=check.customizer,
        preset=check.customizer_preset,
        overrides=check.customizer_overrides,
        models=models,
        side=_side(models[ModelKind.LATENT]),
        seed=job.config.job.seed,
    )


@lru_cache
def _side(model: str) -> int:
    """Looked up once per process: every shard asks, and an embedded model's weights are hashed each time."""
    return model_base_size(model_folder(model))


def attack_models(job: Job) -> dict[ModelKind, str]:
    """The attacker's checkpoints: the embedded ones, the job's own model, and those that the check names."""
    own = {} if job.model_digest == NO_MODEL else {job.model_kind: job.model}
    return with_embedded({**own, **job.config.job.check.models})


def trials_of(shard: Shard) -> str:
    """The prefix under which the results of a shard on its rung lie."""
    return f"trials/{shard.shard_id}/{shard.rung:02d}/"


def prepare_trials(job: Job, shard: Shard) -> Iterator[Trial]:
    """Yields the trials of a job's check on a shard that are not stored yet."""
    if not job.config.job.check.groups:
        return
    stored = {item.key for item in job.destination().list(trials_of(shard))}
    yield from shard_trials(specimens_of(job, shard), selection_of(job, shard), trials_of(shard), stored)


def specimens_of(job: Job, shard: Shard) -> Specimens:
    """The images of a shard that is not committed yet, or whose parts are still there."""
    check = job.config.job.check
    return Specimens(
        destination=job.destination(),
        source=job.source(),
        shard=shard,
        config_fp=job.config_fp,
        manifest=None,
        subject_column=check.subject_column,
        class_column=check.class_column,
    )


def selection_of(job: Job, shard: Shard) -> Selection:
    """What a job's check tries on a shard."""
    check = job.config.job.check
    return Selection(
        groups=check.groups,
        groups_key=f"trials/{shard.shard_id}/groups.json",
        salt=check.salt,
        side=attack_of(job).side,
        purifiers=check.customize_after,
        limits=job.limits,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which trials are made of a shard."""

    groups: int
    # Where the choice of groups is stored: the same for all rungs of a shard.
    groups_key: str
    salt: str
    # Of the images in pixels.
    side: int
    purifiers: tuple[str, ...]
    limits: DecodeLimits


def shard_trials(specimens: Specimens, selection: Selection, prefix: str, stored: Container[str]) -> Iterator[Trial]:
    """Yields the trials of a shard whose keys are not stored yet, group by group.

    Raises:
        IntegrityError: A stored image is not what its row says.
        SourceChanged: An original is no longer there.
    """
    for group, keys in planned_trials(specimens, selection, prefix):
        if open_keys := {place: key for place, key in keys.items() if key not in stored}:
            yield from _group_trials(specimens, selection, group, open_keys)


def planned_trials(
    specimens: Specimens, selection: Selection, prefix: str
) -> list[tuple[Group, dict[tuple[Cell, str], str]]]:
    """The groups of a shard, and the key of every trial on them.

    The choice is stored with the first that makes it: look-alikes hang on floats, which another machine may round
    differently. A key names the stored images that the trial is about: where one was made anew, so is the trial.
    """
    destination, candidates = specimens.destination, specimens.candidates()
    try:
        document = get_json(destination, selection.groups_key)
    except NotFound:
        embed = partial(_embed, specimens, selection)
        chosen = choose_groups(candidates, selection.groups, selection.salt, embed)
        fresh = {"writer_id": uuid.uuid4().hex, "groups": [_group_document(group) for group in chosen]}
        if len(chosen) < selection.groups:
            fresh["too_few"] = why_fewer(candidates)
        _, document = put_json_new(destination, selection.groups_key, fresh)
    known = {item.source_sha256: item for item in candidates}
    groups = [found for entry in document["groups"] if (found := _group_of(entry, known)) is not None]
    return [(group, _keys(group, selection, prefix)) for group in groups]


def _group_document(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "class_word": group.class_word,
        "train": [item.source_sha256 for item in group.train],
        "references": [item.source_sha256 for item in group.references],
    }


def _group_of(document: dict[str, Any], known: Mapping[str, Candidate]) -> Group | None:
    """The stored group; None where an image of it is no longer among the protected ones."""
    if not {*document["train"], *document["references"]} <= known.keys():
        return None
    train, references = (tuple(known[name] for name in document[side]) for side in ("train", "references"))
    return Group(name=document["name"], class_word=document["class_word"], train=train, references=references)


def _keys(group: Group, selection: Selection, prefix: str) -> dict[tuple[Cell, str], str]:
    about = canonical_json([group.name, *(item.protected_sha256 for item in group.members)])
    name = sha256_hex(about)[:12]  # customers' names of subjects may hold anything
    return {
        (cell, purifier): f"{prefix}{name}-{cell}-{purifier}.json" for cell, purifier in cells_of(selection.purifiers)
    }


def _group_trials(
    specimens: Specimens, selection: Selection, group: Group, keys: Mapping[tuple[Cell, str], str]
) -> Iterator[Trial]:
    clean = squares(specimens.originals(group.members), selection)
    protected = squares(specimens.protected(group.train), selection)
    for (cell, purifier), key in keys.items():
        side = protected if needs_protected(cell) else clean
        yield Trial(
            key=key,
            shard_id=specimens.shard.shard_id,
            group=group.name,
            class_word=group.class_word,
            cell=cell,
            purifier=purifier,
            train=[side[item.source_sha256] for item in group.train],
            references=[clean[item.source_sha256] for item in group.references],
        )


def squares(files: Mapping[str, bytes], selection: Selection) -> dict[str, Pixels]:
    # One at a time: originals may be large.
    return {
        name: square(model_view(decode(data, limits=selection.limits)), selection.side) for name, data in files.items()
    }


def _embed(specimens: Specimens, selection: Selection, wanted: Sequence[Candidate]) -> Tensor:
    """Unit vectors of protected images; originals would tell the same, and cost a second read of the source."""
    embedder, vectors = Embedder(), {}
    by_unit = sorted(wanted, key=lambda item: item.unit_id)
    for start in range(0, len(by_unit), EMBEDDED_TOGETHER):
        part = by_unit[start : start + EMBEDDED_TOGETHER]
        found = squares(specimens.protected(part), selection)
        images = torch.stack([torch.from_numpy(found[item.source_sha256].copy()) for item in part])
        for item, vector in zip(part, embedder.embed(images.permute(0, 3, 1, 2).float() / 255), strict=True):
            vectors[item.source_sha256] = vector
    return torch.stack([vectors[item.source_sha256] for item in wanted])


def store_trial(destination: Store, result: TrialResult) -> None:
    """Writes a result, create-only: one that another run stored first stays."""
    put_json_new(destination, result.key, {"writer_id": uuid.uuid4().hex, **result.to_json()})


def stored_scores(destination: Store, keys: Sequence[str]) -> list[Score]:
    """The scores of stored results."""
    documents = in_parallel(partial(get_json, destination), keys)
    return [score for document in documents for score in scores_from_json(document)]


def stored_shortfalls(destination: Store, keys: Mapping[str, str]) -> dict[str, str]:
    """Why shards have fewer groups than were asked for; those that have all of them are left out.

    Args:
        destination: where the choices of groups are stored.
        keys: of these choices, by shard.
    """
    documents = in_parallel(partial(get_json, destination), list(keys.values()))
    return {
        shard: document["too_few"] for shard, document in zip(keys, documents, strict=True) if "too_few" in document
    }


def stored_tables(job: Job, shards: Iterable[Shard]) -> list[Table]:
    """The four-cell tables over all trials of shards; empty where the job asks for none, or no group was found.

    Raises:
        IntegrityError: A trial is missing.
    """
    if not job.config.job.check.groups:
        return []
    scores: list[Score] = []
    for shard in shards:
        planned = planned_trials(specimens_of(job, shard), selection_of(job, shard), trials_of(shard))
        try:
            scores += stored_scores(job.destination(), [key for _, keys in planned for key in keys.values()])
        except NotFound as error:
            raise IntegrityError(f"{shard.shard_id}: a trial is missing: {error}; run again") from error
    return build_tables(scores, [QUESTION]) if scores else []

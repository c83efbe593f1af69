"""The customization trials of a shard: prepared from stored bytes, stored one by one, read back as tables."""

from __future__ import annotations

import uuid
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline.decode import DecodeLimits, decode, model_view
from pipeline.ids import sha256_hex
from pipeline.job import NO_MODEL, Job, model_folder
from pipeline.plan import Shard
from pipeline.storage import Store, get_json, in_parallel, put_json_new
from pipeline.verify.attack_models import ModelKind, with_embedded
from pipeline.verify.cells import build_tables
from pipeline.verify.embed import Embedder
from pipeline.verify.groups import Candidate, Group, choose_groups
from pipeline.verify.scores import NO_PURIFIER, Cell, Score
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


def attack_of(job: Job) -> Attack:
    """The customization attack of a job's check: on the job's own model where it has one, else on the embedded one."""
    check = job.config.job.check
    models = attack_models(job)
    return Attack(
        customizer=check.customizer,
        preset=check.customizer_preset,
        overrides=check.customizer_overrides,
        models=models,
        side=model_base_size(model_folder(models[ModelKind.LATENT])),
        seed=job.config.job.seed,
    )


def attack_models(job: Job) -> dict[ModelKind, str]:
    """The attacker's checkpoints: the embedded ones, the job's own model, and those that the check names."""
    own: dict[str, str] = {} if job.model_digest == NO_MODEL else {ModelKind.LATENT: job.config.job.method.model}
    return with_embedded({**own, **job.config.job.check.models})


def trials_of(shard: Shard) -> str:
    """The prefix under which the results of a shard on its rung lie."""
    return f"trials/{shard.shard_id}/{shard.rung:02d}/"


def prepare_trials(job: Job, shard: Shard) -> Iterator[Trial]:
    """Yields the trials of a job's check on a shard that are not stored yet."""
    check = job.config.job.check
    if not check.groups:
        return
    specimens = Specimens(
        destination=job.destination(),
        source=job.source(),
        shard=shard,
        config_fp=job.config_fp,
        manifest=None,
        subject_column=check.subject_column,
        class_column=check.class_column,
    )
    selection = Selection(
        groups=check.groups,
        salt=check.salt,
        side=attack_of(job).side,
        purifiers=check.customize_after,
        limits=job.limits,
    )
    stored = {item.key for item in job.destination().list(trials_of(shard))}
    yield from shard_trials(specimens, selection, trials_of(shard), stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which trials are made of a shard."""

    groups: int
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
    embed = partial(_embed, specimens, selection)
    for group in choose_groups(specimens.candidates(), selection.groups, selection.salt, embed):
        keys = {(cell, name): f"{prefix}{_file_name(group)}-{cell}-{name}.json" for cell, name in _cells(selection)}
        if open_keys := {place: key for place, key in keys.items() if key not in stored}:
            yield from _group_trials(specimens, selection, group, open_keys)


def _cells(selection: Selection) -> list[tuple[Cell, str]]:
    return cells_of([name for name in selection.purifiers if name != NO_PURIFIER])


def _file_name(group: Group) -> str:
    return sha256_hex(group.name)[:12]  # customers' names of subjects may hold anything


def _group_trials(
    specimens: Specimens, selection: Selection, group: Group, keys: Mapping[tuple[Cell, str], str]
) -> Iterator[Trial]:
    clean = squares(specimens.originals(group.members), selection)
    protected = squares(specimens.protected(group.train), selection)
    for (cell, purifier), key in keys.items():
        side = protected if needs_protected(cell) else clean
        yield Trial(
            key=key,
            group=group.name,
            class_word=group.class_word,
            cell=cell,
            purifier=purifier,
            train=[side[item.source_sha256] for item in group.train],
            references=[clean[item.source_sha256] for item in group.references],
        )


def squares(files: Mapping[str, bytes], selection: Selection) -> dict[str, Pixels]:
    views = {name: model_view(decode(data, limits=selection.limits)) for name, data in files.items()}
    return {name: square(view, selection.side) for name, view in views.items()}


def _embed(specimens: Specimens, selection: Selection, wanted: Sequence[Candidate]) -> Tensor:
    """Unit vectors of protected images; originals would tell the same, and cost a second read of the source."""
    found = squares(specimens.protected(wanted), selection)
    images = torch.stack([torch.from_numpy(found[item.source_sha256].copy()) for item in wanted])
    return Embedder().embed(images.permute(0, 3, 1, 2).float() / 255)


def store_trial(job: Job, result: TrialResult) -> None:
    """Writes a result, create-only: one that another run stored first stays."""
    put_json_new(job.destination(), result.key, {"writer_id": uuid.uuid4().hex, **result.to_json()})


def stored_scores(destination: Store, prefix: str) -> list[Score]:
    """The scores of all results under a prefix."""
    keys = sorted(item.key for item in destination.list(prefix))
    return [
        score for document in in_parallel(partial(get_json, destination), keys) for score in scores_from_json(document)
    ]


def stored_tables(job: Job, shards: Iterable[Shard]) -> list[Table]:
    """The four-cell tables over all stored trials of shards; empty where there are none."""
    destination = job.destination()
    scores = [score for shard in shards for score in stored_scores(destination, trials_of(shard))]
    return build_tables(scores, [QUESTION]) if scores else []

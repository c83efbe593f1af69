"""One protected model for each concept, instead of one for all."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pipeline.errors import UserError
from pipeline.protect_model.concepts import split_source
from pipeline.protect_model.fetch import is_far
from pipeline.protect_model.job import ConceptSource, ModelJob
from pipeline.shard_index import kind_of
from pipeline.storage import join_url, local_path


def separated(job: ModelJob) -> dict[str, ModelJob]:
    """A job per concept by its name: into OUT/name, with checkpoints in WORK/name, or else in OUT/name.training.

    Raises:
        UserError: two have one name, or one has none that a folder can have.
    """
    jobs: dict[str, ModelJob] = {}
    for source in job.concepts:
        name = concept_name(source)
        if name in jobs:
            raise UserError(f"--separate: two concepts are named {name!r}, and {job.out_name}/{name} can hold one")
        work = None if job.work is None else join_url(job.work, name)
        jobs[name] = job.model_copy(update={"concepts": (source,), "out": join_url(job.out, name), "work": work})
    return jobs


def concept_name(source: ConceptSource) -> str:
    """The subject, or else the name of the folder or file. Raises UserError where no folder can be named so."""
    place, subject = split_source(source.path)
    path = PurePosixPath(place) if is_far(place) else Path(local_path(place))
    name = subject or (path.stem if kind_of(place) == "parquet" else path.name)
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(f"--separate: {name!r} of --concept {source.path} can name no folder: run it by itself")
    return name

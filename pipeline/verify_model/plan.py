"""What the verification of protected models consists of: which attacks on which photos, and a name for every trial that
follows from all that decides it, so that a stored one is never taken for another and never made twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.job import code_version, model_folder
from pipeline.laboratory.denoiser import CAPTIONS
from pipeline.verify.campaign import DECIDING
from pipeline.verify.customizers import customizer
from pipeline.verify.digest import folder_digest
from pipeline.verify.trial import GENERATED
from pipeline.verify_model.models import Model, Protected, read_protected
from pipeline.verify_model.planner import Planner
from pipeline.verify_model.subjects import SETS, read_subjects
from pipeline.verify_model.tasks import IDENTIFIER, Case, Kind, Row, Task, Utility
from protectors.model_files import ModelError, model_base_size, model_digest
from protectors.reference import NANO_EMBED, PINNED, ReferenceModelError, reference_path
from protectors.reference.data import Photos, load_photos


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides the numbers. The first of sets, identifiers and attacks is the centre: every row of the
    table has it but for one of them."""

    # [LABEL=]FOLDER each.
    protected: tuple[str, ...]
    # The model that they were made from: embedded, a folder or a hub id.
    base: str
    # Parquet with asset_id, image, subject, subject_class.
    photos: Path
    sets: tuple[str, ...] = tuple(SETS)
    # Rare words that the subject is bound to; none leaves that to the attacks.
    identifiers: tuple[str, ...] = ()
    # Customizers as name or name:preset.
    attacks: tuple[str, ...] = ("dreambooth",)
    # Fields of the customizers in place of their preset's.
    overrides: Mapping[str, Any] = field(default_factory=dict)
    # Other subjects per concept and kind.
    others: int = 2
    # How often each attack is made, with a seed of its own each time: from ``seed`` on.
    trainings: int = 1
    # Images drawn from each customized model.
    generated: int = GENERATED
    # Parquet with asset_id, image, caption, and how many of its photos are used.
    held_out: Path | None = None
    held_out_photos: int = 64
    # What the models draw that has nothing to do with the concepts, and how many images of each; 0 draws none.
    prompts: tuple[str, ...] = CAPTIONS
    drawn: int = 16
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationPlan:
    """A resolved verification."""

    settings: Settings
    base: Model
    side: int
    protected: tuple[Protected, ...]
    rows: tuple[Row, ...]
    cases: tuple[Case, ...]
    utility: tuple[Utility, ...]
    # What else results depend on: the kind of device, and the versions of libraries.
    environment: Mapping[str, Any]
    # Digest of the model that judges likeness.
    embedder: str
    # Digest of the held-out photos.
    held_out: str | None

    def tasks(self) -> list[Task]:
        """Every trial once: first those of the base, then model by model, so that a process keeps few in memory."""
        every: list[Task] = [task for case in self.cases for task in case.tasks]
        every += [task for utility in self.utility for task in utility.tasks]
        order = {model: place for place, model in enumerate(dict.fromkeys(task.model.digest for task in every))}
        found = {task.key: task for task in sorted(every, key=lambda task: order[task.model.digest])}
        return list(found.values())

    @property
    def labels(self) -> list[str]:
        """Of the methods, in the order in which they were given."""
        return list(dict.fromkeys(model.label for model in self.protected))


def plan_verification(settings: Settings) -> VerificationPlan:
    """Checks every name and reads models and photos, before anything is computed.

    Raises:
        UserError: an unknown name, a model that does not belong to its base, or photos that cannot be used.
        ModelError: a model lacks parts.
    """
    rows = _rows(settings)
    try:
        folder = model_folder(settings.base)
        side, base = model_base_size(folder), Model(folder=folder, digest=model_digest(folder))
    except (ModelError, ReferenceModelError) as error:
        raise UserError(f"--base: {error}") from error
    subjects = read_subjects(settings.photos, side)
    protected = read_protected(settings.protected, base, settings.base, subjects)
    held_out = _held_out(settings)
    environment = {
        "device": settings.device.partition(":")[0],
        "versions": {name: version(name) for name in DECIDING},
        "code": code_version(),
    }
    embedder = folder_digest(reference_path(NANO_EMBED))
    planner = Planner(
        base=base,
        subjects=subjects,
        generated=settings.generated,
        seed=settings.seed,
        trainings=settings.trainings,
        others=settings.others,
        side=side,
        about={**environment, "embedder": embedder},
    )
    return VerificationPlan(
        settings=settings,
        base=base,
        side=side,
        protected=protected,
        rows=rows,
        cases=tuple(case for model in protected for row in rows for case in planner.cases(model, row)),
        utility=tuple(
            Utility(
                protected=model,
                loss=None if held_out is None else planner.losses(model, held_out),
                drawn=planner.drawings(model, settings.prompts, settings.drawn, rows[0]) if settings.drawn else None,
            )
            for model in protected
        ),
        environment=environment,
        embedder=embedder,
        held_out=None if held_out is None else held_out.digest(),
    )


def _rows(settings: Settings) -> tuple[Row, ...]:
    """The centre, then everything that differs from it in one thing."""
    _check_named("--sets", settings.sets, SETS)
    if not settings.sets or not settings.attacks:
        raise UserError("nothing to attack with: name --sets and --attacks")
    (centre, *attacks), (first, *sets), words = settings.attacks, settings.sets, settings.identifiers or (None,)
    rows = [_row(settings, centre, first, words[0])]
    rows += [_row(settings, centre, images, words[0]) for images in sets]
    rows += [_row(settings, centre, first, word) for word in words[1:]]
    # An attack that learns a word of its own has no identifier, and goes without.
    rows += [_row(settings, attack, first, words[0], needed=False) for attack in attacks]
    if settings.others:
        rows += [replace(rows[0], kind=kind, images="own") for kind in Kind if kind is not Kind.CONCEPT]
    titles = [row.title for row in rows]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise UserError(f"{twice[0]!r} is asked for twice: leave one of them out")
    return tuple(rows)


def _row(settings: Settings, attack: str, images: str, word: str | None, *, needed: bool = True) -> Row:
    name, _, preset = attack.partition(":")
    preset = preset or "quick"
    chosen = customizer(name, preset, settings.overrides)
    overrides = dict(settings.overrides)
    if word is not None and IDENTIFIER in {item.name for item in fields(chosen)}:
        overrides[IDENTIFIER] = word
    elif word is not None and needed:
        raise UserError(
            f"{name} learns a word of its own and takes no identifier: leave --identifiers out, or put dreambooth or "
            "lora first in --attacks"
        )
    return Row(
        kind=Kind.CONCEPT, attack=f"{name}:{preset}", images=images, name=name, preset=preset, overrides=overrides
    )


def _check_named(option: str, given: Sequence[str], known: Mapping[str, str]) -> None:
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"{option} {unknown[0]}: there are {', '.join(known)}")


def _held_out(settings: Settings) -> Photos | None:
    """For an embedded model the fifth of the asset ids that it is never trained on; for any other all photos."""
    if settings.held_out is None:
        return None
    side = True if settings.base in PINNED else None
    try:
        return load_photos(settings.held_out, held_out=side, limit=settings.held_out_photos)
    except (OSError, ValueError) as error:
        raise UserError(f"--held-out: {error}") from error

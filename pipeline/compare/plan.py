"""What a comparison consists of: methods, subjects, attacks, and a name for every result that follows from all that
decides it, so that a stored result is never taken for another and never made twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.compare.methods import Method, MethodSpec, resolve_methods
from pipeline.compare.subjects import Subject, photo_digest, read_subjects
from pipeline.errors import UserError
from pipeline.ids import asset_seed, fingerprint
from pipeline.job import code_version, model_folder
from pipeline.verify.attack_models import AttackModels, ModelKind, ModelMissing, with_embedded
from pipeline.verify.campaign import DECIDING
from pipeline.verify.customizers import CUSTOMIZERS, customizer
from pipeline.verify.digest import folder_digest
from pipeline.verify.editors import EDITORS
from pipeline.verify.purifiers import PURIFIERS, check_purifiers
from pipeline.verify.scores import NO_PURIFIER, Cell
from pipeline.verify.trial import GENERATED, Attack, cells_of, needs_protected
from protectors.model_files import ModelError, model_base_size
from protectors.reference import NANO_EMBED, ReferenceModelError, reference_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides the numbers of a comparison."""

    methods: tuple[MethodSpec, ...]
    # Parquet with asset_id, image, subject, subject_class.
    photos: Path
    # The first so many in alphabetical order, or these.
    subjects: int | tuple[str, ...] = 6
    # Photos per subject that are protected and trained on; the others are what results are compared with.
    train: int = 4
    # Beside none.
    purifiers: tuple[str, ...] = ()
    # Customizers as name or name:preset, and editors by name.
    attacks: tuple[str, ...] = ("dreambooth",)
    # Fields of the customizers in place of their preset's.
    overrides: Mapping[str, Any] = field(default_factory=dict)
    # Images drawn from each customized model.
    generated: int = GENERATED
    # What editors make of an image.
    edit_prompt: str = "a painting"
    # Budget in 8-bit levels of methods that name none, and of the noise that edits are held against.
    eps_levels: float = 8.0
    # What methods optimize against, by kind (latent, pixel, inpaint); else the embedded ones.
    surrogates: Mapping[str, str] = field(default_factory=dict)
    # The attacker's, by kind; else the embedded ones.
    models: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackSpec:
    """An attack as it was asked for: a customizer with its preset, or an editor."""

    label: str
    name: str
    # None: an editor.
    preset: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """One method on the training photos of one subject."""

    key: str
    method: Method
    subject: Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCustomization:
    """One cell of one subject."""

    key: str
    attack: AttackSpec
    subject: Subject
    cell: Cell
    purifier: str
    # None: a cell without protected photos, which all methods share.
    protection: Protection | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEdit:
    """All cells of one photo."""

    key: str
    attack: AttackSpec
    protection: Protection
    # Its place among the subject's training photos.
    photo: int


PlannedTrial = PlannedCustomization | PlannedEdit


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A resolved comparison. Plain data: every process of the run gets it."""

    settings: Settings
    methods: tuple[Method, ...]
    attacks: tuple[AttackSpec, ...]
    subjects: tuple[Subject, ...]
    # The attacker's checkpoints, the digests of their files, and the side of the latent model's images in pixels.
    models: Mapping[ModelKind, str]
    digests: Mapping[ModelKind, str]
    side: int
    # What else results depend on: the kind of device, and the versions of libraries.
    environment: Mapping[str, Any]
    # Digest of the model that judges likeness, and of every subject's photos by its name.
    embedder: str
    photos: Mapping[str, str]

    def attack(self, spec: AttackSpec) -> Attack:
        """A customizer's settings as `TrialBench` takes them."""
        return Attack(
            customizer=spec.name,
            preset=spec.preset or "",
            overrides=self.settings.overrides,
            models=self.models,
            side=self.side,
            generated=self.settings.generated,
            seed=self.settings.seed,
        )

    def parameters(self, spec: AttackSpec) -> dict[str, Any]:
        """An attack's name and every field."""
        return _parameters(spec, self.settings)

    @property
    def control_levels(self) -> int:
        """Of the noise that edits of protected photos are held against: the same for all methods."""
        return int(self.settings.eps_levels)

    def protections(self) -> list[Protection]:
        """What the methods that can run have to do; one subject after the other."""
        return [
            Protection(key=self._protection_key(method, subject), method=method, subject=subject)
            for subject in self.subjects
            for method in self.methods
            if method.failed is None
        ]

    def seeds(self, subject: Subject) -> list[int]:
        """One per training photo, from its pixels: all methods get the same."""
        return [asset_seed(photo_digest(photo), str(self.settings.seed)) for photo in subject.train]

    def trials(self, protections: Sequence[Protection]) -> list[PlannedTrial]:
        """The trials on these protections and on clean photos; those of one subject follow each other."""
        found: dict[str, PlannedTrial] = {}
        for subject in self.subjects:
            own = [item for item in protections if item.subject.name == subject.name]
            for attack in self.attacks:
                planned = self._edits(attack, own) if attack.preset is None else self._cells(attack, subject, own)
                found |= {trial.key: trial for trial in planned}
        return list(found.values())

    def _cells(self, attack: AttackSpec, subject: Subject, own: Sequence[Protection]) -> Iterator[PlannedCustomization]:
        about = {"attack": self.parameters(attack), "generated": self.settings.generated}
        for cell, purifier in cells_of(self.settings.purifiers):
            used = self._used(() if purifier == NO_PURIFIER else (purifier,))
            for item in own if needs_protected(cell) else [None]:
                yield PlannedCustomization(
                    key=self._trial_key({**about, **used, "cell": cell}, subject, item),
                    attack=attack,
                    subject=subject,
                    cell=cell,
                    purifier=purifier,
                    protection=item,
                )

    def _edits(self, attack: AttackSpec, own: Sequence[Protection]) -> Iterator[PlannedEdit]:
        editor, used = EDITORS[attack.name], self._used(self.settings.purifiers)
        used["models"][str(editor.needs)] = self.digests[editor.needs]
        control = {"prompt": self.settings.edit_prompt, "control": self.control_levels}
        about = {"attack": self.parameters(attack), **control, **used}
        for item in own:
            for photo in range(len(item.subject.train)):
                key = self._trial_key({**about, "photo": photo}, item.subject, item)
                yield PlannedEdit(key=key, attack=attack, protection=item, photo=photo)

    def _protection_key(self, method: Method, subject: Subject) -> str:
        fields = {"method": method.identity(), "subject": self.photos[subject.name]}
        return fingerprint({**fields, "seed": self.settings.seed, "code": code_version(), **self.environment})[:24]

    def _trial_key(self, about: Mapping[str, Any], subject: Subject, item: Protection | None) -> str:
        fields = {
            **about,
            "subject": self.photos[subject.name],
            "protection": None if item is None else item.key,
            "embedder": self.embedder,
            "side": self.side,
            "seed": self.settings.seed,
            "code": code_version(),
            **self.environment,
        }
        return fingerprint(fields)[:24]

    def _used(self, purifiers: Sequence[str]) -> dict[str, Any]:
        """The purifiers' parameters, and the digests of their checkpoints and of the latent model."""
        kinds = {kind for kind in self.models for name in purifiers if self._needs(name, kind)} | {ModelKind.LATENT}
        return {
            "purifiers": {name: PURIFIERS[name].parameters() for name in purifiers},
            "models": {str(kind): self.digests[kind] for kind in kinds},
        }

    def _needs(self, purifier: str, kind: ModelKind) -> bool:
        others = AttackModels({name: folder for name, folder in self.models.items() if name is not kind})
        return PURIFIERS[purifier].missing(others) is kind


def plan_comparison(settings: Settings) -> Comparison:
    """Checks every name and reads the photos, before anything is computed.

    Raises:
        UserError: an unknown name, an attack or method twice, a missing checkpoint of the attacker, or photos that
            cannot be used.
    """
    if not settings.methods:
        raise UserError("nothing to compare: name methods with --methods or --methods-file")
    models = with_embedded(settings.models)
    check_purifiers(settings.purifiers, models)
    attacks = tuple(_attack_spec(text, settings, models) for text in dict.fromkeys(settings.attacks))
    if not attacks:
        raise UserError("nothing to attack with: name customizers or editors with --attacks")
    _check_different(attacks, settings)
    try:
        folders = {kind: model_folder(name) for kind, name in models.items()}
        side = model_base_size(folders[ModelKind.LATENT])
    except (ModelError, ReferenceModelError) as error:
        raise UserError(str(error)) from error
    digest = cache(lambda folder: folder_digest(Path(folder)))  # surrogate and attacker often share one
    subjects = read_subjects(settings.photos, side, settings.subjects, train=settings.train)
    return Comparison(
        settings=settings,
        methods=resolve_methods(
            settings.methods, eps_levels=settings.eps_levels, surrogates=settings.surrogates, digest=digest
        ),
        attacks=attacks,
        subjects=subjects,
        models=models,
        digests={kind: digest(folder) for kind, folder in folders.items()},
        side=side,
        environment={
            "device": settings.device.partition(":")[0],
            "versions": {name: version(name) for name in DECIDING},
        },
        embedder=folder_digest(reference_path(NANO_EMBED)),
        photos={subject.name: subject.digest() for subject in subjects},
    )


def _parameters(spec: AttackSpec, settings: Settings) -> dict[str, Any]:
    if spec.preset is None:
        return EDITORS[spec.name].parameters()
    return customizer(spec.name, spec.preset, settings.overrides).parameters()


def _check_different(attacks: Sequence[AttackSpec], settings: Settings) -> None:
    """Results are named by parameters: two attacks of the same would share theirs, and one table would be empty."""
    same: dict[str, str] = {}
    for attack in attacks:
        other = same.setdefault(fingerprint(_parameters(attack, settings)), attack.label)
        if other != attack.label:
            raise UserError(f"attacks {other!r} and {attack.label!r} are the same: leave one of them out")


def _attack_spec(text: str, settings: Settings, models: Mapping[ModelKind, str]) -> AttackSpec:
    name, _, preset = text.partition(":")
    if name in CUSTOMIZERS:
        preset = preset or "quick"
        customizer(name, preset, settings.overrides)
        return AttackSpec(label=text, name=name, preset=preset)
    if text not in EDITORS:
        close = get_close_matches(text, [*CUSTOMIZERS, *EDITORS], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"no attack named {text!r}{hint} `fixative attack list` shows customizers and editors")
    if EDITORS[text].needs not in models:
        raise ModelMissing(EDITORS[text].needs)
    return AttackSpec(label=text, name=text, preset=None)

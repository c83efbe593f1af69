"""Turns rows and protected models into trials, each under the name that follows from all that decides it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.compare.subjects import photo_digest
from pipeline.ids import fingerprint
from pipeline.verify.attack_models import ModelKind
from pipeline.verify.trial import Attack, Pixels
from pipeline.verify_model.models import Concept, Model, Protected
from pipeline.verify_model.subjects import Subject, changed
from pipeline.verify_model.tasks import Case, Customization, Denoising, Drawing, Kind, Row
from protectors.reference.data import Photos

OTHERS_TRAIN = 4
"""Photos of another subject to train on, at most; at least one is kept to compare with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lesson:
    """Whose photos an attacker has, and which."""

    subject: Subject
    class_word: str
    train: tuple[int, ...]
    references: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """What all trials of a verification share."""

    base: Model
    subjects: Mapping[str, Subject]
    # Images drawn from each customized model.
    generated: int
    seed: int
    # How often each attack is made: with this seed, and those after it.
    trainings: int
    # Other subjects per concept and kind.
    others: int
    side: int
    # Device, versions and the model that judges likeness: what every name depends on.
    about: Mapping[str, Any]

    def cases(self, protected: Protected, row: Row) -> Iterator[Case]:
        """The row on every concept of a model."""
        for concept in protected.concepts:
            for lesson in self._lessons(protected, concept, row):
                for seed in range(self.seed, self.seed + self.trainings):
                    yield Case(
                        row=row,
                        protected=protected,
                        concept=concept,
                        subject=lesson.subject,
                        train=lesson.train,
                        references=lesson.references,
                        seed=seed,
                        base=self._customization(row, self.base, lesson, seed),
                        attacked=self._customization(row, protected.model, lesson, seed),
                        floor=self._floor(row, self.base, lesson, seed),
                        own_floor=self._floor(row, protected.model, lesson, seed),
                    )

    def losses(self, protected: Protected, photos: Photos) -> tuple[Denoising, Denoising]:
        """Of the base and of the protected model, on equal photos and draws."""
        about = {"photos": photos.digest()}
        base, other = (
            Denoising(
                key=self._key(about, model, self.seed), model=model, photos=photos, side=self.side, seed=self.seed
            )
            for model in (self.base, protected.model)
        )
        return base, other

    def drawings(
        self, protected: Protected, prompts: Sequence[str], count: int, row: Row
    ) -> tuple[Drawing, Drawing, Drawing]:
        """Of the base, of the base from other noise, and of the protected model from the first noise."""
        sampling = row.customizer.sampling
        about = {"prompts": list(prompts), "count": count, "sampling": asdict(sampling)}
        first, second, other = (
            Drawing(
                key=self._key({**about, "noise": noise}, model, self.seed),
                model=model,
                prompts=tuple(prompts),
                count=count,
                noise=noise,
                seed=self.seed,
                sampling=sampling,
            )
            for model, noise in ((self.base, 0), (self.base, 1), (protected.model, 0))
        )
        return first, second, other

    def _lessons(self, protected: Protected, concept: Concept, row: Row) -> Iterator[_Lesson]:
        if row.kind is Kind.CONCEPT:
            sides = (concept.seen, concept.unseen)
            train, references = sides[::-1] if row.images == "unseen" else sides
            yield _Lesson(subject=concept.subject, class_word=concept.class_word, train=train, references=references)
            return
        for subject in self._others(protected, concept, row.kind):
            cut = min(OTHERS_TRAIN, len(subject.photos) - 1)
            places = tuple(range(len(subject.photos)))
            yield _Lesson(subject=subject, class_word=subject.class_word, train=places[:cut], references=places[cut:])

    def _others(self, protected: Protected, concept: Concept, kind: Kind) -> list[Subject]:
        """The first subjects in alphabetical order that the model was not protected on."""
        taken = {other.subject.name for other in protected.concepts}
        word, same = concept.subject.class_word, kind is Kind.SAME_CLASS
        found = [
            subject
            for name, subject in self.subjects.items()
            if name not in taken and len(subject.photos) > 1 and (subject.class_word == word) is same
        ]
        return found[: self.others]

    def _customization(self, row: Row, model: Model, lesson: _Lesson, seed: int) -> Customization:
        photos = changed([lesson.subject.photos[place] for place in lesson.train], row.images)
        return self._trial(row, model, lesson, seed, photos, {"attack": row.customizer.parameters()})

    def _floor(self, row: Row, model: Model, lesson: _Lesson, seed: int) -> Customization:
        """Trains on nothing: rows that draw alike and compare alike share it."""
        photos = [lesson.subject.photos[place] for place in lesson.train]
        return self._trial(row, model, lesson, seed, photos, {"floor": asdict(row.customizer.sampling)})

    def _trial(
        self, row: Row, model: Model, lesson: _Lesson, seed: int, photos: list[Pixels], how: Mapping[str, Any]
    ) -> Customization:
        references = [lesson.subject.photos[place] for place in lesson.references]
        about = {
            **how,
            "generated": self.generated,
            "subject": lesson.subject.name,
            "class": lesson.class_word,
            "train": [photo_digest(photo) for photo in photos],
            "references": [photo_digest(photo) for photo in references],
        }
        return Customization(
            key=self._key(about, model, seed),
            model=model,
            attack=Attack(
                customizer=row.name,
                preset=row.preset,
                overrides=row.overrides,
                models={ModelKind.LATENT: model.folder},
                side=self.side,
                generated=self.generated,
                seed=seed,
            ),
            subject=lesson.subject.name,
            class_word=lesson.class_word,
            train=photos,
            references=references,
            floor="floor" in how,
        )

    def _key(self, about: Mapping[str, Any], model: Model, seed: int) -> str:
        fields = {**self.about, **about, "model": model.digest, "side": self.side, "seed": seed}
        return fingerprint(fields)[:24]

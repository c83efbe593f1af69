"""The trials of a verification and what they are about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pipeline.verify.customizers import customizer
from pipeline.verify.customizers.base import Customizer, Sampling
from pipeline.verify.trial import Attack, Pixels
from pipeline.verify_model.models import Concept, Model, Protected
from pipeline.verify_model.subjects import Subject
from protectors.reference.data import Photos

IDENTIFIER = "identifier"
"""Field of the customizers that bind a subject to a rare word."""


class Kind(StrEnum):
    """Whom an attacker wants to teach the model."""

    CONCEPT = "protected subject"
    SAME_CLASS = "others of its class"
    OTHER_CLASS = "others of other classes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: one attack on one kind of photos."""

    kind: Kind
    # As it was asked for.
    attack: str
    # Of `SETS`, or "own" for other subjects.
    images: str
    # The customizer's name, preset and fields in place of the preset's.
    name: str
    preset: str
    overrides: Mapping[str, Any]

    @property
    def customizer(self) -> Customizer:
        """The attack itself."""
        return customizer(self.name, self.preset, self.overrides)

    @property
    def word(self) -> str:
        """What the subject is bound to: an identifier, or the new word that the attack learns."""
        chosen = self.customizer
        return str(getattr(chosen, IDENTIFIER, None) or getattr(chosen, "word", ""))

    @property
    def title(self) -> str:
        """Names it; unique in a plan."""
        what = self.images if self.kind is Kind.CONCEPT else self.kind
        return f"{self.attack}, {what}, {self.word}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Customization:
    """One model customized on photos, or before that. Holds pixels: it travels to the process that runs it."""

    key: str
    model: Model
    attack: Attack
    # Draws follow from its name: equal on all models.
    subject: str
    class_word: str
    train: list[Pixels]
    references: list[Pixels]
    # What the model draws of the class before it knows the subject.
    floor: bool

    @property
    def kind(self) -> str:
        """Tasks of one kind take about as long."""
        return "floors" if self.floor else f"trainings by {self.attack.customizer}:{self.attack.preset}"

    @property
    def label(self) -> str:
        """Says what it is."""
        return f"{'floor' if self.floor else self.attack.customizer} of {self.subject}, model {self.model.digest[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoising:
    """Loss of one model on photos that it was not trained on."""

    key: str
    model: Model
    photos: Photos
    side: int
    seed: int

    @property
    def kind(self) -> str:
        """Tasks of one kind take about as long."""
        return "held-out losses"

    @property
    def label(self) -> str:
        """Says what it is."""
        return f"held-out loss, model {self.model.digest[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Images of one model of prompts that have nothing to do with the concepts."""

    key: str
    model: Model
    prompts: tuple[str, ...]
    # Of each prompt.
    count: int
    # Models draw from equal noise under equal numbers and seeds.
    noise: int
    seed: int
    sampling: Sampling

    @property
    def kind(self) -> str:
        """Tasks of one kind take about as long."""
        return "drawings of unrelated prompts"

    @property
    def label(self) -> str:
        """Says what it is."""
        return f"unrelated prompts, model {self.model.digest[:8]}"


Task = Customization | Denoising | Drawing


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row on one protected model and one subject: four trials."""

    row: Row
    protected: Protected
    concept: Concept
    # Whom the attacker trains on: the concept's, or another.
    subject: Subject
    # Places among the subject's photos; what the attacker has is made from the first.
    train: tuple[int, ...]
    references: tuple[int, ...]
    # Of the attack.
    seed: int
    # A and C: the base and the protected model customized; F and its counterpart: before that.
    base: Customization
    attacked: Customization
    floor: Customization
    own_floor: Customization

    @property
    def tasks(self) -> tuple[Customization, ...]:
        """In the order in which they are run."""
        return (self.floor, self.base, self.own_floor, self.attacked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Utility:
    """What one protected model is compared with its base by, beside attacks. None: not asked for."""

    protected: Protected
    loss: tuple[Denoising, Denoising] | None
    # Base, base with other seeds, protected with the first seeds.
    drawn: tuple[Drawing, Drawing, Drawing] | None

    @property
    def tasks(self) -> tuple[Task, ...]:
        """In the order in which they are run."""
        return (*(self.loss or ()), *(self.drawn or ()))

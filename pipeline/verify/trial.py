"""One customization of the four-cell control: train on a group's images in one cell, draw, compare with the others."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.errors import FatalWorkerError
from pipeline.ids import sha256_hex
from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.customizers import customizer
from pipeline.verify.customizers.base import PHOTO, PriorImages, sample
from pipeline.verify.embed import Embedder
from pipeline.verify.further import AskedMetrics
from pipeline.verify.purifiers import PURIFIERS
from pipeline.verify.scores import NO_PURIFIER, Cell, Score
from pipeline.worker import exit_on_device_fault
from protectors.model_files import ModelError
from protectors.reference import ReferenceModelError

Pixels = npt.NDArray[np.uint8]
GENERATED = 8  # images per customization; their mean is one value of the table
METRIC = "subject similarity"
NOT_MEASURED = "not measured"
# By cell: what to call the images that the attacker trains on, where they are worth a look, and those that he draws.
LABELS: Mapping[Cell, tuple[str | None, str]] = {
    Cell.FLOOR: (None, "drawn before"),
    Cell.CLEAN: ("original", "drawn from originals"),
    Cell.PROTECTED: ("protected", "drawn from protected"),
    Cell.PURIFIED: (None, "drawn from originals after {}"),
    Cell.PURIFIED_PROTECTED: ("protected after {}", "drawn from protected after {}"),
}
_NO_MEMORY = ("allocate memory", "out of memory")
_PROTECTED = (Cell.PROTECTED, Cell.PURIFIED_PROTECTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """How models are customized, and how the result is judged."""

    customizer: str = "dreambooth"
    preset: str = "quick"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    # Checkpoints of the attacker, by kind: folder, hub id or the name of an embedded model.
    models: Mapping[ModelKind, str]
    # Side in pixels of the images that the latent model is customized on.
    side: int
    generated: int = GENERATED
    # Of all random draws; every group has its own that follow from it.
    seed: int = 0
    # Metrics beside the subject similarity.
    further: AskedMetrics = field(default_factory=AskedMetrics)


@dataclass(slots=True, kw_only=True)
class Trial:
    """One cell of one group. Holds pixels: it travels to the actor that runs it."""

    key: str
    shard_id: str
    group: str
    class_word: str
    cell: Cell
    purifier: str
    # Of the cell's side, clean or protected; squares at the model's size, uint8 (S, S, 3).
    train: list[Pixels]
    # Clean images of the group that the attacker does not have.
    references: list[Pixels]


@dataclass(slots=True, kw_only=True)
class TrialResult:
    """Scores of one trial, and the pictures behind them."""

    key: str
    # The group or image that it is about.
    title: str
    scores: list[Score]
    # Asset id of the one image that it is about; "" for a group.
    row: str = ""
    # PNG by label, of what the attacker had and of what he made. Never stored beside the archive: they show originals.
    pictures: dict[str, bytes] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What tables count it by: all of its scores are about one unit."""
        return self.scores[0].unit

    def to_json(self) -> dict[str, Any]:
        """What is stored."""
        return {"scores": [score.to_dict() for score in self.scores]}


def scores_from_json(document: Mapping[str, Any]) -> list[Score]:
    """The scores of a stored result."""
    return [Score(**entry | {"cell": Cell(entry["cell"])}) for entry in document["scores"]]


def cells_of(purifiers: Sequence[str]) -> list[tuple[Cell, str]]:
    """All cells that are customized, "floor" among them, which trains on nothing."""
    pairs = [(cell, name) for name in purifiers for cell in (Cell.PURIFIED, Cell.PURIFIED_PROTECTED)]
    return [(cell, NO_PURIFIER) for cell in (Cell.FLOOR, Cell.CLEAN, Cell.PROTECTED)] + pairs


def needs_protected(cell: Cell) -> bool:
    """Whether the attacker trains on protected images in this cell."""
    return cell in _PROTECTED


def square(pixels: Pixels, side: int) -> Pixels:
    """The centre of an image at the model's size, as trainers crop it: uint8 (side, side, 3), bicubic."""
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.BICUBIC))


class TrialBench:
    """Holds the attacker's models and runs trials. One per actor.

    Args:
        attack: which one.
        models: nothing changes them.
        priors: class images of the latent model, where several attacks on it share them.
    """

    def __init__(self, attack: Attack, models: AttackModels, priors: PriorImages | None = None) -> None:
        self.attack, self.models = attack, models
        self.customizer = customizer(attack.customizer, attack.preset, attack.overrides)
        self.embedder = Embedder(device=models.device)
        self.further = attack.further.load(device=models.device)
        self._priors = priors or PriorImages(self.models.get(ModelKind.LATENT))

    def run(self, trial: Trial) -> TrialResult:
        """Runs one trial; an attack that fails gives scores of state "error", never a number.

        All cells of a group share prompt, seeds and class images, so that they differ in the images alone.
        """
        seed = int.from_bytes(hashlib.sha256(f"{self.attack.seed}/{trial.group}".encode()).digest()[:4], "big")
        try:
            return self._floor(trial, seed) if trial.cell is Cell.FLOOR else self._customized(trial, seed)
        except Exception as error:  # noqa: BLE001 - whatever an attack raises is a failed measurement, not a failed run
            stop_if_transient(error)
            planned = [
                self._score(trial, trial.cell, f"{n}", metric=name)
                for name in (METRIC, *self.further.drawn_names(_stacked(trial.references)))
                for n in range(self.attack.generated)
            ]
            return failed_trial(trial.key, trial.group, error, planned)

    def _customized(self, trial: Trial, seed: int) -> TrialResult:
        train = purified(trial, self.models, seed)
        customized = self.customizer.customize(
            self._priors.base, _unit_range(train), trial.class_word, seed=seed, priors=self._priors
        )
        return self._result(trial, train, self._drawn(customized.pipeline, customized.subject, seed))

    def _floor(self, trial: Trial, seed: int) -> TrialResult:
        """What the attacker's model draws of the class before it knows the subject; and the ceiling beside it."""
        train = _stacked(trial.train)
        result = self._result(trial, train, self._drawn(self._priors.base, trial.class_word, seed))
        result.scores += self._scores(trial, Cell.CEILING, "photo {}", train)
        return result

    def _drawn(self, pipeline: Any, subject: str, seed: int) -> Tensor:
        sampling = self.customizer.sampling
        drawn = sample(pipeline, PHOTO.format(subject), self.attack.generated, seed=seed, sampling=sampling)
        if not bool(drawn.isfinite().all()):
            raise RuntimeError("the customized model draws numbers that are not finite")  # as bytes they would be black
        return drawn

    def _result(self, trial: Trial, train: Tensor, drawn: Tensor) -> TrialResult:
        drawn = (drawn * 255).round().to(torch.uint8)
        scores = self._scores(trial, trial.cell, "{}", drawn)
        had, made = LABELS[trial.cell]
        pictures = {made.format(trial.purifier): sheet(drawn[: len(train)])}
        if had is not None:
            pictures[had.format(trial.purifier)] = sheet(train)
        return TrialResult(key=trial.key, title=trial.group, scores=scores, pictures=pictures)

    def _scores(self, trial: Trial, cell: Cell, label: str, images: Tensor) -> list[Score]:
        """All numbers of images uint8 `(N, 3, H, W)`; the subject similarity is the mean cosine to the references."""
        photos = _stacked(trial.references)
        references = self.embedder.embed(_unit_range(photos))
        values: list[float] = (self.embedder.embed(_unit_range(images)) @ references.T).mean(dim=1).tolist()
        scores = [self._score(trial, cell, label.format(n), value) for n, value in enumerate(values)]
        for name, outcomes in self.further.of_drawn(images, photos).items():
            scores += [
                self._score(trial, cell, label.format(n), found.value, metric=name, error=found.error)
                for n, found in enumerate(outcomes)
            ]
        return scores

    def _score(
        self,
        trial: Trial,
        cell: Cell,
        image: str,
        value: float | None = None,
        *,
        metric: str = METRIC,
        error: str | None = None,
    ) -> Score:
        return Score(
            attack=self.attack.customizer,
            metric=metric,
            unit=trial.group,
            cell=cell,
            purifier=trial.purifier if cell is trial.cell else NO_PURIFIER,
            image=f"{trial.shard_id}/{image}",  # a subject may lie in several shards, and is one unit all the same
            prompt=PHOTO,
            value=value,
            error=(error or NOT_MEASURED) if value is None else None,
        )


def purified(trial: Trial, models: AttackModels, seed: int) -> Tensor:
    """The images that the attacker trains on, uint8 `(N, 3, S, S)`; equal draws on both sides of a cell."""
    images = _stacked(trial.train)
    return images if trial.purifier == NO_PURIFIER else purified_by(trial.purifier, images, models, seed)


def purified_by(purifier: str, images: Tensor, models: AttackModels, seed: int) -> Tensor:
    """Purified images, uint8 `(N, 3, H, W)`; the draws depend on seed, purifier and place alone."""
    seeds = [int(sha256_hex(f"{seed}/{purifier}/{number}")[:8], 16) for number in range(len(images))]
    return PURIFIERS[purifier].purify(images, seeds=seeds, models=models)


def stop_if_transient(error: Exception) -> None:
    """Raises FatalWorkerError for what a later run may not meet again; as a stored result it would stay for good."""
    exit_on_device_fault(error)
    transient = (torch.cuda.OutOfMemoryError, MemoryError, ModelError, ReferenceModelError, OSError)
    if isinstance(error, transient) or _lacks_memory(error):
        raise FatalWorkerError(
            f"an attack could not run: {type(error).__name__}: {error}. Mend it and run the same command to go on."
        ) from error


def _lacks_memory(error: Exception) -> bool:
    """Whether the message is that of an allocator: PyTorch's own for the CPU raises a plain RuntimeError."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def failed_trial(key: str, title: str, error: Exception, planned: Sequence[Score]) -> TrialResult:
    """The result of a trial that raised: its scores are errors with the reason."""
    reason = f"{type(error).__name__}: {error}"
    return TrialResult(key=key, title=title, scores=[replace(score, value=None, error=reason) for score in planned])


def tensor(pixels: Pixels) -> Tensor:
    """uint8 (H, W, 3) as `(3, H, W)`."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _stacked(images: Sequence[Pixels]) -> Tensor:
    return torch.stack([tensor(image) for image in images])


def _unit_range(images: Tensor) -> Tensor:
    return images.float() / 255


def sheet(images: Tensor) -> bytes:
    """The images side by side, as PNG."""
    row = torch.cat(list(images), dim=2).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(row).save(file, "PNG")
    return file.getvalue()

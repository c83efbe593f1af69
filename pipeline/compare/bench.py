"""Does the work of a comparison: protects photos and runs trials."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.compare.plan import Comparison, PlannedCustomization, PlannedEdit, PlannedTrial, Protection
from pipeline.compare.store import Protected, Results
from pipeline.compare.subjects import photo_digest, pixels_of
from pipeline.ids import asset_seed
from pipeline.verify.attack_models import AttackModels
from pipeline.verify.customizers.base import PHOTO
from pipeline.verify.edit_trial import EditTrial, run_edit_trial
from pipeline.verify.editors.base import Edit
from pipeline.verify.metrics.base import Against
from pipeline.verify.metrics.fidelity import Colour, PixelChange, Structure
from pipeline.verify.trial import Trial, TrialBench, TrialResult, tensor
from pipeline.worker import exit_on_device_fault
from protectors.base import ImageProtector
from protectors.loading import load_for
from protectors.registry import protector_class

SUBJECTS = "subjects"  # names the set of photos in scores, as a shard's id does elsewhere

Task = Protection | PlannedTrial


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A task that has ended."""

    # What it was about: method or attack, and subject.
    label: str
    # Label of the method that was to be run, and why it could not; None: its result is stored.
    method: str = ""
    error: str | None = None


class Bench:
    """Holds the models of one process; each is loaded when it is first needed, and once."""

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self.comparison, self.results = comparison, Results(folder)
        self.models = AttackModels(comparison.models, device=comparison.settings.device)
        self._benches: dict[str, TrialBench] = {}
        self._surrogates: dict[str, Any] = {}

    def run(self, task: Task) -> Done:
        """Does one task and stores its result. A method that fails is told; an attack that fails is a result.

        Raises:
            FatalWorkerError: the device or the disk is ill; what is stored stays.
        """
        if not isinstance(task, Protection):
            started = time.process_time()
            result = self._edit(task) if isinstance(task, PlannedEdit) else self._customize(task)
            self.results.put_trial(task.key, result, time.process_time() - started)
            return Done(label=f"{task.attack.label}, {result.title}")
        label = f"{task.method.label}, {task.subject.name}"
        try:
            protected = self._protect(task)
        except Exception as error:  # noqa: BLE001 - whatever a method raises is its row's reason; the others go on
            exit_on_device_fault(error)
            reason = f"{task.subject.name}: {type(error).__name__}: {error}"
            return Done(label=label, method=task.method.label, error=reason)
        self.results.put_protected(task.key, protected)
        return Done(label=label)

    def _protect(self, task: Protection) -> Protected:
        method, subject = task.method, task.subject
        chosen = protector_class(method.spec.name)
        model = self._surrogate(chosen, method.model) if chosen.needs_model() else None
        protector = chosen(chosen.config_type.from_dict(method.config), model)
        originals = torch.stack([tensor(photo) for photo in subject.train])
        prompts = [PHOTO.format(subject.class_word)] * len(originals)
        started = time.process_time()
        result = protector.protect(
            originals.float() / 255,
            prompts=prompts,
            groups=[subject.name] * len(originals),
            seeds=self.comparison.seeds(subject),
        )
        seconds = time.process_time() - started
        if failed := [fact.failed for fact in result.facts if fact.failed]:
            raise RuntimeError(failed[0])
        pixels = pixels_of(result.images)
        images = torch.stack([tensor(photo) for photo in pixels])
        fidelity: dict[str, list[float]] = {}
        for metric in (PixelChange(), Structure(), Colour()):
            fidelity |= metric.score(images, Against(originals=originals))
        return Protected(photos=pixels, fidelity=fidelity, seconds=seconds)

    def _surrogate(self, method: type[ImageProtector[Any, Any]], folder: str) -> Any:
        if folder not in self._surrogates:
            device = self.comparison.settings.device
            self._surrogates[folder] = load_for(method, folder, device=device, dtype=torch.float32)
        return self._surrogates[folder]

    def _customize(self, task: PlannedCustomization) -> TrialResult:
        label, subject, item = task.attack.label, task.subject, task.protection
        if label not in self._benches:
            self._benches[label] = TrialBench(self.comparison.attack(task.attack), self.models)
        trial = Trial(
            key=task.key,
            shard_id=SUBJECTS,
            group=subject.name,
            class_word=subject.class_word,
            cell=task.cell,
            purifier=task.purifier,
            train=subject.train if item is None else self.results.protected(item.key).photos,
            references=subject.references,
        )
        return self._benches[label].run(trial)

    def _edit(self, task: PlannedEdit) -> TrialResult:
        settings, subject = self.comparison.settings, task.protection.subject
        name, word, clean = f"{subject.name}/{task.photo}", subject.class_word, subject.train[task.photo]
        trial = EditTrial(
            key=task.key,
            shard_id=SUBJECTS,
            asset_id=name,
            unit=name,
            editor=task.attack.name,
            edit=Edit(target=f"{settings.edit_prompt} of a {word}", source=PHOTO.format(word)),
            clean=clean,
            protected=self.results.protected(task.protection.key).photos[task.photo],
            purifiers=settings.purifiers,
            seed=asset_seed(photo_digest(clean), str(settings.seed), task.attack.name),
            control_levels=self.comparison.control_levels,
        )
        result = run_edit_trial(trial, self.models)
        # Photos of one subject are not independent: the subject is what is resampled.
        result.scores = [replace(score, unit=subject.name) for score in result.scores]
        return result


def worker(comparison: Comparison, folder: Path) -> Callable[[Task], Done]:
    """What does tasks in one process; its results go into the folder."""
    return Bench(comparison, folder).run

"""Does the work of a verification: customizes models, and measures what else they can do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.ids import canonical_json
from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.customizers.base import PriorImages
from pipeline.verify.embed import Embedder
from pipeline.verify.scores import Cell
from pipeline.verify.trial import Trial, TrialBench, stop_if_transient
from pipeline.verify_model.models import Model
from pipeline.verify_model.store import Results
from pipeline.verify_model.tasks import Customization, Drawing, Task
from pipeline.verify_model.utility import draw, held_out_errors

PHOTOS = "photos"  # names the set of photos in scores, as a shard's id does elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A task that has ended."""

    key: str
    label: str
    # Why it has no numbers; None: they are stored.
    error: str | None = None


class Bench:
    """Holds one model of one process at a time: what comes next is mostly about the same one."""

    def __init__(self, folder: Path, device: str) -> None:
        self.results, self._device = Results(folder), device
        self._held = ""

    def run(self, task: Task) -> Done:
        """Does one task and stores its result.

        Raises:
            FatalWorkerError: the device or the disk is ill; what is stored stays.
        """
        if task.model.digest != self._held:
            self._hold(task.model)
        started = time.process_time()
        if isinstance(task, Customization):
            result = self._bench(task).run(_trial(task))
            self.results.put_trial(task.key, result, time.process_time() - started)
            return Done(key=task.key, label=task.label, error=self.results.error(task.key))
        try:
            if isinstance(task, Drawing):
                values = draw(task, self._models.get(ModelKind.LATENT), self._embedder)
            else:
                values = held_out_errors(task, self._models.get(ModelKind.LATENT))
        except Exception as error:  # noqa: BLE001 - whatever a model raises is its row's reason; the others go on
            stop_if_transient(error)
            return Done(key=task.key, label=task.label, error=f"{type(error).__name__}: {error}")
        self.results.put_values(task.key, values, time.process_time() - started)
        return Done(key=task.key, label=task.label)

    def _hold(self, model: Model) -> None:
        self._held = model.digest
        self._models = AttackModels({ModelKind.LATENT: model.folder}, device=self._device)
        self._priors = PriorImages(self._models.get(ModelKind.LATENT))
        self._embedder = Embedder(device=self._device)
        self._benches: dict[str, TrialBench] = {}

    def _bench(self, task: Customization) -> TrialBench:
        attack = task.attack
        name = canonical_json([attack.customizer, attack.preset, dict(attack.overrides), attack.generated, attack.seed])
        if name not in self._benches:
            self._benches[name] = TrialBench(attack, self._models, self._priors)
        return self._benches[name]


def _trial(task: Customization) -> Trial:
    """As the four cells know it: what matters here is which model it runs on."""
    return Trial(
        key=task.key,
        shard_id=PHOTOS,
        group=task.subject,
        class_word=task.class_word,
        cell=Cell.FLOOR if task.floor else Cell.CLEAN,
        purifier="none",
        train=task.train,
        references=task.references,
    )


def worker(folder: Path, device: str) -> Callable[[Task], Done]:
    """What does tasks in one process; its results go into the folder."""
    return Bench(folder, device).run

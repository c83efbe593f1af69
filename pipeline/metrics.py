"""What a run tells Prometheus: every metric is declared here, once. Recording does nothing where nobody exports.

Names and units follow Prometheus' conventions; Ray puts ``ray_`` before each. Counters count what this process did.
``images_protected``, ``images_quarantined`` and ``parts_committed`` count a unit once, when its part is accepted,
however often it was tried; ``unit_attempts`` and the seconds count every try. A process that dies takes with it what it
recorded since Ray's last report (10 s): manifests are the truth, metrics show how a run goes. Tags have few values and
never name an asset, a path or a destination.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import AssetError, ErrorInfo

Kind = Literal["counter", "gauge", "histogram"]
Stage = Literal["load", "protect", "store", "check", "attack", "gate", "commit"]
"""Stage of the pipeline; the value of the ``stage`` tag everywhere but on quarantined images."""

NO_METHOD = "none"
"""Value of the ``method`` tag of work that serves no single method."""

OTHER_ERROR = "other"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_LEVELS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
_DECIBELS = (20.0, 25.0, 30.0, 32.0, 34.0, 36.0, 38.0, 40.0, 45.0, 50.0, 60.0)
_GAIN = (1e-6, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as Prometheus knows it, but for the ``ray_`` in front."""

    name: str
    kind: Kind
    help: str
    tags: tuple[str, ...] = ()
    # Upper bounds of a histogram's buckets; all positive, as Ray demands.
    buckets: tuple[float, ...] = ()

    def record(self, value: float = 1.0, **tags: str) -> None:
        """Adds to a counter, observes in a histogram, or sets a gauge.

        Raises:
            ValueError: Other tags than the declared ones.
        """
        if set(tags) != set(self.tags):
            raise ValueError(f"{self.name} has the tags {self.tags}, not {tuple(tags)}")
        if _exporter is not None and (value > 0 or self.kind != "counter"):
            _exporter(self, value, tags)


Exporter = Callable[[Metric, float, Mapping[str, str]], None]
"""Takes every recorded value: the metric, the value, its tags."""

METRICS: list[Metric] = []
"""All of them."""

_exporter: Exporter | None = None


def export_to(exporter: Exporter | None) -> None:
    """Sends what this process records from now on to an exporter, or nowhere."""
    global _exporter
    _exporter = exporter


def _declare(kind: Kind, name: str, tags: str, help: str, buckets: tuple[float, ...] = ()) -> Metric:
    metric = Metric(f"fixative_{name}", kind, help, tuple(tags.split()), buckets)
    METRICS.append(metric)
    return metric


IMAGES_PROTECTED = _declare(
    "counter", "images_protected_total", "method", "Protected images in accepted parts, strengthened ones again."
)
IMAGES_QUARANTINED = _declare(
    "counter",
    "images_quarantined_total",
    "method stage error_type",
    "Quarantined images in accepted parts, by the quarantine table's stage and error_type.",
)
IMAGES_COMMITTED = _declare(
    "counter", "images_committed_total", "method status", "Images in committed shards: protected or quarantined."
)
PARTS_COMMITTED = _declare(
    "counter", "parts_committed_total", "method", "Part objects that the store accepted: one per unit and rung."
)
SHARDS_COMMITTED = _declare("counter", "shards_committed_total", "method", "Shards whose manifest this run wrote.")
UNIT_ATTEMPTS = _declare(
    "counter",
    "unit_attempts_total",
    "stage repeated",
    "Attempts at units, by stage; repeated: an earlier attempt of this run had died or lost its result.",
)
FAILURES = _declare(
    "counter", "failures_total", "stage kind", "Stages that gave up: on a shard, or fatal (the run stops)."
)
IMAGE_SECONDS = _declare(
    "histogram", "image_seconds", "stage method", "Wall time of a unit divided by its images, once per image.", _SECONDS
)
# Ray rebuilds a histogram's sum from its buckets' middles, so exact means need a counter.
STAGE_SECONDS = _declare("counter", "stage_seconds_total", "stage method", "Wall time spent in a stage.")
ACTOR_BUSY = _declare(
    "counter", "actor_busy_seconds_total", "stage method", "Seconds in which actors worked: protect, check or attack."
)
ACTOR_IDLE = _declare("counter", "actor_idle_seconds_total", "", "Seconds in which actors waited for work.")
OBJECTIVE_GAIN = _declare(
    "histogram",
    "objective_gain",
    "method",
    "How much the method's own objective rose, in its own unit; the first bucket: it did not.",
    _GAIN,
)
LINF = _declare(
    "histogram", "linf_levels", "method", "Largest change of a sample, in 8-bit levels of the stored bytes.", _LEVELS
)
PSNR = _declare("histogram", "psnr_decibels", "method", "PSNR of the stored bytes, in dB.", _DECIBELS)
GATE_DECISIONS = _declare(
    "counter", "gate_decisions_total", "method outcome", "Decisions on shards: pass, flag, fail or strengthen."
)
GATE_VALUE = _declare(
    "histogram",
    "gate_value_ratio",
    "method metric",
    "What the gate judged: survival or effect of a shard after its worst purifier; 1 is whole.",
    _SHARES,
)
READ_BYTES = _declare("counter", "read_bytes_total", "method", "Bytes of the original images that were read.")
WRITTEN_BYTES = _declare(
    "counter", "written_bytes_total", "method stage", "Bytes of accepted parts (store) and of shards' files (commit)."
)
OPEN_IMAGES = _declare("gauge", "open_images", "method", "Images of the running wave whose part is not stored yet.")
# They exist for as long as a command runs: what alerts about a run that stands still need.
LAST_PART = _declare(
    "gauge", "last_part_timestamp_seconds", "", "Unix time of a command's last part, or of its wave's start."
)
LAST_COMMIT = _declare(
    "gauge", "last_commit_timestamp_seconds", "", "Unix time of a command's last commit, or of its wave's start."
)


def unit_done(stage: Stage, method: str, *, images: int, since: float) -> None:
    """Records how long a stage took for a unit.

    Args:
        since: ``time.perf_counter()`` at its start.
    """
    seconds = time.perf_counter() - since
    STAGE_SECONDS.record(seconds, stage=stage, method=method)
    for _ in range(images):
        IMAGE_SECONDS.record(seconds / images, stage=stage, method=method)


def attempt_begun(stage: Stage, number: int) -> None:
    """Records an attempt at a unit; ``number`` counts from 0 within the run."""
    UNIT_ATTEMPTS.record(stage=stage, repeated="yes" if number else "no")


def quarantined(failure: ErrorInfo, method: str) -> None:
    """Records a quarantined image. Exceptions of other people's code count as one type."""
    known = {error.__name__ for error in AssetError.__subclasses__()} | {"OutOfMemoryError", "MemoryError"}
    error_type = failure.error_type if failure.error_type in known else OTHER_ERROR
    IMAGES_QUARANTINED.record(method=method, stage=failure.stage, error_type=error_type)


class BusyClock:
    """Divides the life of an actor into work and waiting, from its making on."""

    def __init__(self) -> None:
        self._waiting_since = time.perf_counter()

    @contextmanager
    def working(self, stage: Stage, method: str) -> Iterator[None]:
        """Counts the block as work, and the time since the last one as waiting."""
        begun = time.perf_counter()
        ACTOR_IDLE.record(begun - self._waiting_since)
        try:
            yield
        finally:
            self._waiting_since = time.perf_counter()
            ACTOR_BUSY.record(self._waiting_since - begun, stage=stage, method=method)

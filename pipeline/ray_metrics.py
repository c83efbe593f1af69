"""Exports metrics through Ray, whose agent on every node serves them to Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray.util.metrics import Counter, Gauge, Histogram

from pipeline import metrics
from pipeline.metrics import Metric

REPEAT_S = 5.0  # Ray forgets a gauge two reports (20 s) after it was set last


class RayExporter:
    """Records in Ray's metrics of this process; repeats gauges for as long as it lives."""

    def __init__(self) -> None:
        self._recorders: dict[str, Counter | Gauge | Histogram] = {}
        self._gauges: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._repeater: threading.Thread | None = None

    def __call__(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Records one value."""
        with self._lock:
            recorder = self._recorders.get(metric.name) or self._make(metric)
            if isinstance(recorder, Gauge):
                self._gauges[metric, tuple(tags.items())] = value
        self._record(recorder, value, tags)

    def close(self) -> None:
        """Lets go of the gauges: what they tell has ended."""
        self._ended.set()
        if self._repeater is not None:
            self._repeater.join()

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        about = {"description": metric.help, "tag_keys": metric.tags}
        if metric.kind == "histogram":
            recorder = Histogram(metric.name, boundaries=list(metric.buckets), **about)
        elif metric.kind == "counter":
            recorder = Counter(metric.name, **about)
        else:
            recorder = Gauge(metric.name, **about)
            if self._repeater is None:
                self._repeater = threading.Thread(target=self._repeat, name="repeat-gauges", daemon=True)
                self._repeater.start()
        self._recorders[metric.name] = recorder
        return recorder

    @staticmethod
    def _record(recorder: Counter | Gauge | Histogram, value: float, tags: Mapping[str, str]) -> None:
        if isinstance(recorder, Counter):
            recorder.inc(value, dict(tags))
        elif isinstance(recorder, Gauge):
            recorder.set(value, dict(tags))
        else:
            recorder.observe(max(value, 0.0), dict(tags))  # Ray drops values below 0

    def _repeat(self) -> None:
        while not self._ended.wait(REPEAT_S):
            with self._lock:
                gauges = list(self._gauges.items())
            for (metric, tags), value in gauges:
                self._record(self._recorders[metric.name], value, dict(tags))


_worker: RayExporter | None = None


def export_from_worker() -> None:
    """Makes this worker of Ray export; call it as often as you like."""
    global _worker
    if _worker is None:
        _worker = RayExporter()
        metrics.export_to(_worker)


@contextmanager
def exported_from_driver() -> Iterator[None]:
    """Exports what the driver records within the block."""
    exporter = RayExporter()
    metrics.export_to(exporter)
    try:
        yield
    finally:
        metrics.export_to(None)
        exporter.close()

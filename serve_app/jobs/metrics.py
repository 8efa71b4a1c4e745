"""Prometheus metrics: how many jobs there are, and how they ended."""

from collections import Counter as Count
from collections.abc import Iterable

from ray.util.metrics import Gauge

from cluster.counted import Counted
from cluster.metrics import export_regularly
from serve_app.jobs.job import UNFINISHED, Open, Status

OPEN = "relay_jobs"
ENDED = "relay_jobs_ended_total"
LABELS = ("model", "status")
GAUGES = {OPEN: "Jobs that have not ended; each ingress reports all of them."}
COUNTERS = {ENDED: "Jobs that ended: completed, failed or cancelled."}


class JobMetrics:
    """The counts, kept in memory; a thread exports them to Ray."""

    def __init__(self) -> None:
        self._ended = Counted({name: (about, LABELS) for name, about in COUNTERS.items()})
        self._open: Count[tuple[str, str]] = Count()
        self._gauge: Gauge | None = None
        export_regularly(self.export)

    def note_open(self, models: Iterable[str], jobs: Iterable[Open]) -> None:
        """jobs: all unfinished jobs of these models."""
        found = Count((job.model, job.status) for job in jobs)
        self._open = Count({(model, status): found[model, status] for model in models for status in UNFINISHED})

    def note_ended(self, model: str, status: Status) -> None:
        self._ended.note(ENDED, model, status)

    def export(self) -> None:
        self._ended.export()
        self._gauge = self._gauge or Gauge(OPEN, GAUGES[OPEN], LABELS)
        for (model, status), num in self._open.items():
            self._gauge.set(num, {"model": model, "status": status})

"""Running totals as Ray metrics, which Ray's own agents export to Prometheus.

Totals only ever grow; rates and shares are the reader's: a step's mean time is
`rate(relay_compute_seconds_total) / rate(relay_micro_batches_total)`, the bubble
`rate(relay_bubble_seconds_total) / (rate(relay_bubble_seconds_total) + rate(relay_compute_seconds_total))`.
"""

import threading
from collections.abc import Callable, Mapping

from ray.util.metrics import Counter, Histogram

EXPORT_PERIOD_S = 5.0
BATCH_SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]

COUNTERS = {
    "relay_requests_total": "Requests a stage has taken up.",
    "relay_cache_hits_total": "Prompts whose embeddings were remembered.",
    "relay_forwards_total": "Forwards that requests asked of the denoiser, or prompts encoded.",
    "relay_micro_batches_total": "Micro-batches a rank has computed.",
    "relay_compute_seconds_total": "Time a rank spent computing micro-batches.",
    "relay_bubble_seconds_total": "Time a rank was idle while micro-batches were in flight.",
    "relay_queue_wait_seconds_total": "Time that all forwards waited in the step queue.",
    "relay_sent_bytes_total": "Bytes a rank sent to the next one.",
}


class StageMetrics:
    """One process's totals, tagged with its stage, rank and model. Call `export` with what they are now."""

    def __init__(self, *, stage: str, rank: int, model: str) -> None:
        self._tags = {"stage": stage, "rank": str(rank), "model": model}
        self._counters: dict[str, Counter] = {}
        self._exported: dict[str, float] = {}
        self._histogram: Histogram | None = None
        self._batch_sizes: dict[int, int] = {}

    def export(self, totals: Mapping[str, float]) -> None:
        """totals: by name in COUNTERS, since the process started."""
        for name, total in totals.items():
            if name not in self._counters:
                self._counters[name] = Counter(name, COUNTERS[name], tuple(self._tags))
            added = total - self._exported.get(name, 0.0)
            if added > 0:
                self._counters[name].inc(added, self._tags)
                self._exported[name] = total

    def export_batch_sizes(self, batch_sizes: Mapping[int, int]) -> None:
        """batch_sizes: how many micro-batches of so many forwards there were, since the process started."""
        if self._histogram is None:
            description = "Forwards merged into one micro-batch."
            self._histogram = Histogram("relay_batch_size", description, BATCH_SIZES, tuple(self._tags))
        for size, total in batch_sizes.items():
            for _ in range(total - self._batch_sizes.get(size, 0)):
                self._histogram.observe(size, self._tags)
        self._batch_sizes = dict(batch_sizes)


def export_regularly(export: Callable[[], None]) -> None:
    """Calls it every few seconds, in a thread that ends with the process."""

    def loop() -> None:
        pause = threading.Event()
        while not pause.wait(EXPORT_PERIOD_S):
            export()

    threading.Thread(target=loop, name="metrics", daemon=True).start()

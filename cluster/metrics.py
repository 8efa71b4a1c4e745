"""Every metric of this project, and how a process exports its own to Prometheus through Ray's agents.

Prometheus sees them with the prefix `ray_`. Counters only grow; rates and ratios are computed by the reader: a
micro-batch takes `rate(relay_compute_seconds_total) / rate(relay_micro_batches_total)`, and the bubble is
`rate(relay_bubble_seconds_total) / (rate(relay_bubble_seconds_total) + rate(relay_compute_seconds_total))`. Use
only the buckets and counts of histograms: Ray (2.60) computes `_sum` from the middles of the buckets.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from ray.util.metrics import Counter, Gauge, Histogram

from cluster.periodic import call_periodically

EXPORT_PERIOD_S = 5.0
LABELS = ("stage", "rank", "model")

COUNTERS = {
    "relay_requests_total": "Requests a stage has taken up.",
    "relay_cache_hits_total": "Prompts whose embeddings were in the cache.",
    "relay_forwards_total": "Forwards of the denoiser that were computed, or prompts encoded.",
    "relay_reused_forwards_total": "Forwards of the denoiser that step caches extrapolated.",
    "relay_resumed_requests_total": "Requests that were resumed after another replica had died.",
    "relay_resumed_forwards_total": "Forwards of the denoiser that those requests did not compute again.",
    "relay_saved_bytes_total": "Bytes that were saved outside of replicas, to resume requests from.",
    "relay_micro_batches_total": "Micro-batches a rank has computed.",
    "relay_compute_seconds_total": "Time a rank spent computing micro-batches.",
    "relay_bubble_seconds_total": "Time a rank was idle while micro-batches were in flight.",
    "relay_queue_wait_seconds_total": "Time that all forwards, prompts or latents waited for their stage.",
    "relay_sent_bytes_total": "Bytes a rank sent to the next one.",
    "relay_answered_bytes_total": "Bytes in a stage's answers: embeddings, latents, files.",
    "relay_not_finite_total": "Answers of a stage that were NaN or infinite, and so became errors.",
    "relay_out_of_time_total": "Requests that the transformer ended because they could not meet their deadlines.",
    "relay_streamed_bytes_total": "Bytes of weights copied to the device for each use, under vram_limit_gib.",
}
GAUGES = {
    "relay_in_flight_requests": "Requests in a stage, including those that wait in it.",
    "relay_waiting_forwards": "Forwards that wait in the step queue.",
    "relay_waiting_requests": "Requests that hold a place in the transformer and have not begun.",
    "relay_weights_bytes": "Weights that a process holds, on its device.",
    "relay_peak_memory_bytes": "Peak of the memory reserved on the GPU; on the CPU the largest resident set.",
    "relay_cached_bytes": "Embeddings in the cache.",
    "relay_cold_start_seconds": "Time from the start of a replica's constructor until it could serve.",
}
HISTOGRAMS = {
    "relay_batch_size": (
        "Forwards merged into one micro-batch, or prompts into one forward of a text encoder.",
        [1, 2, 3, 4, 6, 8, 12, 16, 24, 32],
    ),
    "relay_stage_seconds": (
        "Time of a request in a stage, waiting included.",
        [0.01, 0.03, 0.1, 0.3, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600],
    ),
    "relay_step_seconds": (
        "Time of one step of one request, waiting included.",
        [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30],
    ),
}


class StageMetrics:
    """One process's metrics, tagged with its stage, rank and model.

    Values are recorded in memory; `export` passes them to Ray from a separate thread, so that no request waits for
    it.
    """

    def __init__(self, *, stage: str, rank: int, model: str) -> None:
        self._tags = dict(zip(LABELS, (stage, str(rank), model), strict=True))
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._exported: dict[str, float] = {}
        self._batch_sizes: dict[int, int] = {}
        self._observed: SimpleQueue[tuple[str, float]] = SimpleQueue()
        self.num_requests = 0
        self.num_in_flight = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Context around one request's time in the stage. Must be used from one event loop."""
        began = time.perf_counter()
        self.num_requests += 1
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1
            self.observe("relay_stage_seconds", time.perf_counter() - began)

    def observe(self, name: str, value: float) -> None:
        """Records one value of a metric in HISTOGRAMS. Callable from any thread."""
        self._observed.put((name, value))

    def export(self, values: Mapping[str, float]) -> None:
        """values: for metrics in COUNTERS, the total since the process started; for those in GAUGES, the current
        value."""
        for name, value in values.items():
            if name in GAUGES:
                self._set(name, value)
            else:
                self._add(name, value)
        while (observed := self._next_observed()) is not None:
            name, value = observed
            self._histogram(name).observe(value, self._tags)

    def export_requests(self) -> None:
        """Exports what `request` has counted."""
        self.export({"relay_requests_total": self.num_requests, "relay_in_flight_requests": self.num_in_flight})

    def export_batch_sizes(self, batch_sizes: Mapping[int, int]) -> None:
        """batch_sizes: number of micro-batches by their number of forwards, since the process started."""
        for size, total in batch_sizes.items():
            for _ in range(total - self._batch_sizes.get(size, 0)):
                self._histogram("relay_batch_size").observe(size, self._tags)
        self._batch_sizes = dict(batch_sizes)

    def _add(self, name: str, total: float) -> None:
        if name not in self._counters:
            self._counters[name] = Counter(name, COUNTERS[name], LABELS)
        added = total - self._exported.get(name, 0.0)
        if added > 0:
            self._counters[name].inc(added, self._tags)
            self._exported[name] = total

    def _set(self, name: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, GAUGES[name], LABELS)
        self._gauges[name].set(value, self._tags)

    def _histogram(self, name: str) -> Histogram:
        if name not in self._histograms:
            description, buckets = HISTOGRAMS[name]
            self._histograms[name] = Histogram(name, description, buckets, LABELS)
        return self._histograms[name]

    def _next_observed(self) -> tuple[str, float] | None:
        try:
            return self._observed.get_nowait()
        except Empty:
            return None


def export_regularly(export: Callable[[], None], period_s: float = EXPORT_PERIOD_S) -> None:
    """Calls `export` every `period_s`, in a thread that ends with the process. Exceptions are logged."""
    call_periodically(export, period_s, name="the export of metrics")

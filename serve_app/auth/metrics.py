"""What each key asks for, in Prometheus: by its name, never by itself."""

from collections import Counter as Count

from ray.util.metrics import Counter

from cluster.metrics import export_regularly

REQUESTS = "relay_key_requests_total"
STEPS = "relay_key_megapixel_steps_total"
METRICS = {
    REQUESTS: ("Answers to each key, by HTTP status; with no name: to who had none that opens.", ("key", "code")),
    STEPS: ("Megapixel-steps that each key was charged.", ("key",)),
}
"""(description, labels) by name."""


class KeyMetrics:
    """Noted in memory; a thread tells Ray."""

    def __init__(self) -> None:
        self._counted: Count[tuple[str, tuple[str, ...]]] = Count()
        self._exported: Count[tuple[str, tuple[str, ...]]] = Count()
        self._counters: dict[str, Counter] = {}
        export_regularly(self.export)

    def note(self, key: str, code: int, megapixel_steps: float) -> None:
        self._counted[REQUESTS, (key, str(code))] += 1
        if megapixel_steps:
            self._counted[STEPS, (key,)] += megapixel_steps  # type: ignore[assignment]

    def export(self) -> None:
        for (name, values), total in dict(self._counted).items():
            description, labels = METRICS[name]
            if name not in self._counters:
                self._counters[name] = Counter(name, description, labels)
            added = total - self._exported[name, values]
            if added > 0:
                self._counters[name].inc(added, dict(zip(labels, values, strict=True)))
                self._exported[name, values] = total

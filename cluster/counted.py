"""Counters with labels of their own. They count in memory until a thread exports them to Ray."""

from collections import Counter as Count
from collections.abc import Mapping

from ray.util.metrics import Counter


class Counted:
    """The counters of one process."""

    def __init__(self, metrics: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
        """metrics: description and label names by metric name."""
        self._metrics = metrics
        self._counted: Count[tuple[str, tuple[str, ...]]] = Count()
        self._exported: Count[tuple[str, tuple[str, ...]]] = Count()
        self._counters: dict[str, Counter] = {}

    def note(self, name: str, *values: str, by: float = 1) -> None:
        """values: the values of the metric's labels."""
        if by:
            self._counted[name, values] += by  # type: ignore[assignment]

    def export(self) -> None:
        for (name, values), total in dict(self._counted).items():
            description, labels = self._metrics[name]
            if name not in self._counters:
                self._counters[name] = Counter(name, description, labels)
            added = total - self._exported[name, values]
            if added > 0:
                self._counters[name].inc(added, dict(zip(labels, values, strict=True)))
                self._exported[name, values] = total

"""Prometheus metrics of what each key uses. Labels hold the key's name, never the key."""

from cluster.counted import Counted
from cluster.metrics import export_regularly

REQUESTS = "relay_key_requests_total"
STEPS = "relay_key_megapixel_steps_total"
RETURNED = "relay_key_returned_megapixel_steps_total"
METRICS = {
    REQUESTS: (
        "Answers to each key, by HTTP status; the name is empty if the request had no valid key.",
        ("key", "code"),
    ),
    STEPS: ("Megapixel-steps that each key was charged.", ("key",)),
    RETURNED: ("Megapixel-steps that each key was given back for jobs that produced nothing.", ("key",)),
}
"""Description and labels of each metric, by name."""


class KeyMetrics:
    """The counters, kept in memory; a thread exports them to Ray."""

    def __init__(self) -> None:
        self._counted = Counted(METRICS)
        export_regularly(self._counted.export)

    def note(self, key: str, code: int, megapixel_steps: float) -> None:
        self._counted.note(REQUESTS, key, str(code))
        self._counted.note(STEPS, key, by=megapixel_steps)

    def note_returned(self, key: str, megapixel_steps: float) -> None:
        self._counted.note(RETURNED, key, by=megapixel_steps)

"""Tests of when a job's runner counts as dead, by its beats and the watcher's own clock."""

from serve_app.jobs.job import Open
from serve_app.jobs.leases import LeaseMonitor


class Watch:
    """A runner that looks at the jobs of others every half second, on a simulated clock."""

    def __init__(self) -> None:
        self._now = 0.0
        self._leases = LeaseMonitor(30.0, lambda: self._now)

    def look(self, **beats: int) -> list[str]:
        """Looks once at jobs with these beats, and returns those whose lease has lapsed."""
        running = [Open(name, "m", "in_progress", "r", beat) for name, beat in beats.items()]
        return [job.id for job in self._leases.lapsed(running)]

    def until(self, end: float, **beats: int) -> list[str]:
        """Looks until `end`, and returns what the last look finds. Asserts that earlier looks find nothing."""
        while self._now + 0.5 < end:
            self._now += 0.5
            assert self.look(**beats) == []
        self._now = end
        return self.look(**beats)


def test_a_lease_lapses_once_nothing_was_said_for_as_long_as_it_lasts() -> None:
    watch = Watch()
    assert watch.look(a=1) == []
    assert watch.until(29.9, a=1) == []
    assert watch.until(30.0, a=1) == ["a"]


def test_every_beat_renews_it() -> None:
    watch = Watch()
    for beat in range(10):
        assert watch.look(a=beat) == []
        assert watch.until((beat + 1) * 29.0, a=beat) == []
    assert watch.look(a=9) == []
    assert watch.until(9 * 29.0 + 30.0, a=9) == ["a"]


def test_each_job_has_its_own() -> None:
    watch = Watch()
    watch.look(a=1)
    watch.until(20.0, a=1)
    watch.look(a=1, b=1)
    assert watch.until(30.0, a=1, b=1) == ["a"]


def test_who_watches_anew_waits_anew() -> None:
    watch = Watch()
    watch.look(a=1)
    watch.until(20.0, a=1)
    watch.look()
    assert watch.until(49.9, a=1) == []


def test_while_nothing_could_be_seen_no_lease_lapses() -> None:
    """While the database was unreachable, no runner could renew its leases either."""
    watch = Watch()
    watch.until(1.0, a=1)
    watch._now = 1000.0
    assert watch.look(a=1) == []
    assert watch.until(1005.0, a=2) == []

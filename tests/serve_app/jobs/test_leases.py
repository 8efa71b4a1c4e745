"""When a job's runner counts as dead: by its beats, and the watcher's own clock."""

from serve_app.jobs.job import Open
from serve_app.jobs.leases import Leases


class Clock:
    """Stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lapsed(leases: Leases, **beats: int) -> list[str]:
    return [
        job.id for job in leases.lapsed([Open(name, "in_progress", "r", beat) for name, beat in beats.items()])
    ]


def watch() -> tuple[Leases, Clock]:
    clock = Clock()
    return Leases(30.0, clock), clock


def test_a_lease_lapses_once_nothing_was_said_for_as_long_as_it_lasts() -> None:
    leases, clock = watch()
    assert lapsed(leases, a=1) == []
    clock.now = 29.9
    assert lapsed(leases, a=1) == []
    clock.now = 30.0
    assert lapsed(leases, a=1) == ["a"]


def test_every_beat_renews_it() -> None:
    leases, clock = watch()
    for beat in range(10):
        clock.now = beat * 29.0
        assert lapsed(leases, a=beat) == []
    clock.now += 30.0
    assert lapsed(leases, a=9) == ["a"]


def test_each_job_has_its_own() -> None:
    leases, clock = watch()
    lapsed(leases, a=1)
    clock.now = 20.0
    lapsed(leases, a=1, b=1)
    clock.now = 31.0
    assert lapsed(leases, a=1, b=1) == ["a"]


def test_who_watches_anew_waits_anew() -> None:
    leases, clock = watch()
    lapsed(leases, a=1)
    clock.now = 20.0
    lapsed(leases)
    clock.now = 40.0
    assert lapsed(leases, a=1) == []

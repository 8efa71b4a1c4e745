"""Tests of the rows of jobs in both databases: if several processes make a change, only the first succeeds."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from serve_app.errors import Unavailable
from serve_app.jobs.job import Asked, Ending, Failure, Job, Kind, Open, Output, Page, new_id
from serve_app.jobs.store import JobStore

ASKED = Asked(
    body_kind="video",
    fields={"prompt": "waves \N{WATER WAVE}", "seed": 2**53 + 1},
    inputs={"input_reference": ["input_reference-0"]},
    takes_several=(),
    width=64,
    height=48,
    num_frames=5,
    fps=8,
    num_outputs=1,
)
OUTPUT = Output("0-ab.mp4", "video/mp4", 2**40, {"seed": 1, "warnings": ["one"]})


@pytest.fixture
def store(database: str) -> Iterator[JobStore]:
    with JobStore(database) as store:
        yield store


def job(at: float = 0.0, *, kind: Kind = "video", owner: str | None = None, model: str = "wan") -> Job:
    return Job(new_id(kind, owner), kind, model, owner, at, ASKED)


def queue(store: JobStore, *jobs: Job) -> list[Job]:
    for each in jobs:
        assert store.add(each, 100)
        store.put_in_queue(each.id)
    return list(jobs)


def seen(store: JobStore, job_id: str) -> Open:
    return next(each for each in store.unfinished(["wan"]) if each.id == job_id)


def take(store: JobStore, job_id: str, runner: str = "a") -> Job:
    taken = store.take(seen(store, job_id), runner)
    assert taken is not None
    return taken


def test_a_job_is_read_as_it_was_written(store: JobStore) -> None:
    [written] = queue(store, job(1.25, owner="ann"))
    assert store.get(written.id, "video", "ann") == replace(written, status="queued")


def test_a_job_is_its_owners_alone(store: JobStore) -> None:
    anns, nobodys = queue(store, job(owner="ann"), job())
    for owner, theirs in (("ann", [anns.id]), (None, [nobodys.id]), ("bob", [])):
        assert [each.id for each in store.page("video", owner, Page()).jobs] == theirs
        assert [each for each in (anns, nobodys) if store.get(each.id, "video", owner)] == [
            each for each in (anns, nobodys) if each.id in theirs
        ]


def test_a_job_is_told_of_once_what_goes_in_is_stored(store: JobStore) -> None:
    receiving = job()
    assert store.add(receiving, 1)
    assert store.get(receiving.id, "video", None) is None
    assert not store.page("video", None, Page()).jobs
    assert not store.unfinished(["wan"])


def test_one_that_is_there_is_not_added_again(store: JobStore) -> None:
    first = job(owner="ann")
    assert store.add(first, 9)
    assert store.add(replace(first, created_at=5.0), 9)
    store.put_in_queue(first.id)
    assert store.get(first.id, "video", "ann") == replace(first, status="queued")


def test_no_more_wait_than_may(store: JobStore) -> None:
    first, second, third = job(), job(), job()
    assert [store.add(each, 2) for each in (first, second, third)] == [True, True, False]
    store.put_in_queue(first.id)
    assert not store.add(third, 2)
    take(store, first.id)
    assert store.add(third, 2)


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_have_every_job_once_in_their_order(store: JobStore, order: str) -> None:
    """Three of the jobs were created at the same time."""
    jobs = queue(store, job(2.0), job(1.0), job(2.0), job(2.0), job(3.0))
    expected = sorted(jobs, key=lambda each: (each.created_at, each.id), reverse=order == "desc")
    found, after, more = [], None, True
    while more:
        page = store.page("video", None, Page(2, after, order))  # type: ignore[arg-type]
        found += [each.id for each in page.jobs]
        after, more = found[-1], page.has_more
    assert found == [each.id for each in expected]


def test_a_page_after_what_is_not_there_is_empty(store: JobStore) -> None:
    queue(store, job(), job(owner="ann"))
    assert not store.page("video", None, Page(after="video_0")).jobs


def test_runners_see_jobs_of_their_models_the_oldest_first(store: JobStore) -> None:
    late, early, _ = queue(store, job(2.0), job(1.0), job(model="flux"))
    assert [each.id for each in store.unfinished(["wan", "ltx"])] == [early.id, late.id]


def test_of_all_that_see_a_job_one_takes_it(database: str) -> None:
    with JobStore(database) as first, JobStore(database) as second:
        [queued] = queue(first, job())
        open_job = seen(first, queued.id)
        with ThreadPoolExecutor(8) as threads:
            stores = [first, second] * 4
            taken = list(threads.map(lambda i: stores[i].take(open_job, str(i)), range(8)))
        [winner] = [each for each in taken if each is not None]
        assert (winner.status, winner.num_taken) == ("in_progress", 1)
        assert seen(second, queued.id).runner == winner.runner


def test_a_job_whose_runner_speaks_meanwhile_is_not_taken(store: JobStore) -> None:
    [queued] = queue(store, job())
    taken = take(store, queued.id)
    before = seen(store, queued.id)
    assert store.renew(queued.id, "a", taken.beat, 40)
    assert store.take(before, "b") is None
    assert store.take(seen(store, queued.id), "b") is not None


def test_whoever_has_lost_a_job_changes_nothing_of_it(store: JobStore) -> None:
    [queued] = queue(store, job())
    lost = take(store, queued.id, "a")
    kept = take(store, queued.id, "b")
    assert not store.renew(queued.id, "a", lost.beat, 99)
    assert not store.give_back(queued.id, "a", lost.beat)
    assert not store.end(queued.id, "a", lost.beat, Ending("completed", (OUTPUT,)), 1.0, 2.0)
    assert store.get(queued.id, "video", None) == kept


def test_a_runner_that_takes_its_own_job_twice_ends_it_once(store: JobStore) -> None:
    [queued] = queue(store, job())
    first, second = take(store, queued.id), take(store, queued.id)
    ends = [store.end(queued.id, "a", each.beat, Ending("completed"), 1.0, 2.0) for each in (first, second)]
    assert ends == [False, True]


def test_an_end_whose_answer_was_lost_may_be_told_again(store: JobStore) -> None:
    [queued] = queue(store, job())
    taken = take(store, queued.id)
    ending = Ending("completed", (OUTPUT,))
    assert [store.end(queued.id, "a", taken.beat, ending, 1.0, 2.0) for _ in range(2)] == [True, True]
    other = Ending("completed", (replace(OUTPUT, file="0-cd.mp4"),))
    assert not store.end(queued.id, "a", taken.beat, other, 1.0, 2.0)


def test_a_job_ends_with_what_came_of_it(store: JobStore) -> None:
    good, bad = queue(store, job(), job())
    endings = (Ending("completed", (OUTPUT,)), Ending("failed", failure=Failure("out_of_memory", "why", "size")))
    for each, ending in zip((good, bad), endings, strict=True):
        taken = take(store, each.id)
        assert store.renew(each.id, "a", taken.beat, 40)
        assert store.end(each.id, "a", taken.beat + 1, ending, 1.5, 2.5)
        told = store.get(each.id, "video", None)
        assert told is not None
        assert (told.status, told.outputs, told.failure) == (ending.status, ending.outputs, ending.failure)
        assert (told.completed_at, told.expires_at, told.runner) == (1.5, 2.5, None)
        assert told.progress == (100 if ending.status == "completed" else 40)
    assert not store.unfinished(["wan"])


def test_what_was_cancelled_is_nobodys_to_end(store: JobStore) -> None:
    [queued] = queue(store, job())
    taken = take(store, queued.id)
    assert store.cancel(queued.id, 1.0, 2.0) == "in_progress"
    assert not store.end(queued.id, "a", taken.beat, Ending("completed", (OUTPUT,)), 1.0, 2.0)
    assert store.cancel(queued.id, 3.0, 4.0) is None
    told = store.get(queued.id, "video", None)
    assert told is not None
    assert (told.status, told.completed_at, told.outputs) == ("cancelled", 1.0, ())


def test_what_is_given_back_was_not_taken(store: JobStore) -> None:
    [queued] = queue(store, job())
    taken = take(store, queued.id)
    assert store.give_back(queued.id, "a", taken.beat)
    told = store.get(queued.id, "video", None)
    assert told is not None
    assert (told.status, told.num_taken, told.runner) == ("queued", 0, None)


def test_what_has_expired_is_found_and_what_has_not_ended_never(store: JobStore) -> None:
    ended, waiting = queue(store, job(), job())
    store.cancel(ended.id, 1.0, 2.0)
    half = replace(job(), expires_at=3.0)
    store.add(half, 9)
    assert store.expired(1.9) == []
    assert store.expired(2.1) == [ended.id]
    assert set(store.expired(1e12)) == {ended.id, half.id}
    store.remove(ended.id)
    assert store.get(ended.id, "video", None) is None
    assert store.get(waiting.id, "video", None) is not None


def test_what_nobody_serves_is_given_up(store: JobStore) -> None:
    old, new, served = queue(store, job(1.0), job(5.0), job(1.0, model="flux"))
    take(store, old.id)
    [given_up] = store.give_up(4.0, ["flux"], Failure("not_served", "why"), 6.0, 7.0)
    assert (given_up.id, given_up.asked) == (old.id, ASKED)
    states = [told.status for each in (old, new, served) if (told := store.get(each.id, "video", None))]
    assert states == ["failed", "queued", "queued"]


def test_what_is_cancelled_was_queued_or_in_progress(store: JobStore) -> None:
    waits, runs = queue(store, job(), job())
    take(store, runs.id)
    assert [store.cancel(each.id, 1.0, 2.0) for each in (waits, runs)] == ["queued", "in_progress"]


def test_a_beat_whose_answer_was_lost_may_be_told_again(store: JobStore) -> None:
    [queued] = queue(store, job())
    beat = take(store, queued.id).beat
    assert [store.renew(queued.id, "a", beat, progress) for progress in (40, 41)] == [True, True]
    assert seen(store, queued.id).beat == beat + 1
    assert store.end(queued.id, "a", beat + 1, Ending("completed", (OUTPUT,)), 1.0, 2.0)


def test_a_database_that_may_only_be_read_is_unavailable(postgresql_url: str) -> None:
    """A standby, for example, is read-only again once its primary is back."""
    read_only = f"{postgresql_url}?options=-cdefault_transaction_read_only%3Don"
    with JobStore(postgresql_url):
        pass
    with pytest.raises(Unavailable):
        JobStore(read_only)


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "jobs.db").write_bytes(b"rubbish" * 1000)
    with pytest.raises(Unavailable):
        JobStore(f"sqlite:///{tmp_path}/jobs.db")


def test_a_store_outlives_whoever_opened_it(database: str) -> None:
    with JobStore(database) as store:
        [queued] = queue(store, job())
    with JobStore(database) as store:
        assert store.get(queued.id, "video", None) is not None


def test_two_that_open_it_first_both_do(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new/jobs.db"
    with ThreadPoolExecutor(4) as threads:
        stores = list(threads.map(JobStore, [url] * 4))
    [queued] = queue(stores[0], job())
    assert all(store.get(queued.id, "video", None) for store in stores)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    for store in stores:
        store.close()


@pytest.mark.parametrize("url", ["postgresql://relay@127.0.0.1:9/none", "sqlite:////proc/none/jobs.db"])
def test_a_database_that_does_not_answer_is_unavailable(url: str) -> None:
    with pytest.raises((Unavailable, OSError)):
        JobStore(url)

"""Tests of the step queue: requests forward from their own threads, as in the engine; the test acts as rank 0."""

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import pytest

from deployments.engine.seat import MicroBatch, Seat, SeatState
from deployments.engine.step_queue import Cancelled, StepQueue

FOREVER_S = 60.0
SOON_S = 10.0
"""Long enough for a thread on a machine that is busy with other tests."""
A_MOMENT_S = 0.003


class Over(Exception):
    """Raised in whatever still waits when the test is over."""


def in_thread(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Calls it in a daemon thread, so that a queue that never answers cannot hang the tests."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call(*args, **kwargs))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def forward(queue: StepQueue, seat: Seat, payload: Any, **of_forward: Any) -> Any:
    """Returns the forward's result; blocks until it is there."""
    return queue.submit(seat, payload, **of_forward).result()


class Rig:
    """A step queue, with methods for what requests and rank 0 do. None of them blocks longer than `SOON_S`."""

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "num_shards": 1,
            "max_batch_size": 16,
            "batch_wait_s": FOREVER_S,
            "max_batch_tokens": None,
        }
        self.queue = StepQueue(**defaults | options)

    def seats(self, num_seats: int) -> list[Seat]:
        return [self.queue.join() for _ in range(num_seats)]

    def send(self, seat: Seat, payload: Any, signature: Any = "x", tokens: int = 1) -> Future[Any]:
        """Forwards from a thread; returns when the queue has the forward."""
        sent = in_thread(forward, self.queue, seat, payload, signature=signature, tokens=tokens)
        self.until(lambda: seat.state in (SeatState.WAITING, SeatState.RUNNING) or sent.done())
        return sent

    def taking(self) -> Future[MicroBatch]:
        return in_thread(self.queue.take)

    def take(self) -> MicroBatch:
        return self.taking().result(timeout=SOON_S)

    def finish(self, batch: MicroBatch) -> None:
        self.queue.finish(batch.id, [f"{payload} done" for payload in batch.payloads])

    def run(self, *forwards: tuple[Seat, Any]) -> None:
        """Sends each (seat, signature), takes and finishes them: afterwards the seats are between two forwards."""
        for seat, signature in forwards:
            self.send(seat, "earlier", signature)
        while any(seat.state is not SeatState.STEPPING for seat, _ in forwards):
            self.finish(self.take())

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SOON_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0)


def is_blocked(call: Future[Any]) -> bool:
    return bool(wait([call], timeout=A_MOMENT_S).not_done)


@pytest.fixture
def build_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def build(**options: Any) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.queue.close(Over())


def test_what_a_request_keeps_is_free_with_its_seat(build_rig):
    rig = build_rig()
    one, other = rig.seats(2)
    rig.queue.retain(one, 100)
    rig.queue.retain(one, 50)
    rig.queue.retain(other, 1)
    assert rig.queue.retained_bytes() == 151
    rig.queue.leave(one)
    assert rig.queue.retained_bytes() == 1


# Merging


def test_waiting_forwards_of_one_signature_take_off_together_in_order(build_rig):
    rig = build_rig()
    for name, seat in zip("abc", rig.seats(3), strict=True):
        rig.send(seat, name)
    assert rig.take().payloads == ("a", "b", "c")


def test_each_forward_gets_the_result_of_its_own_payload(build_rig):
    rig = build_rig()
    sent = {name: rig.send(seat, name) for name, seat in zip("abc", rig.seats(3), strict=True)}
    rig.finish(rig.take())
    assert {name: forward.result(1) for name, forward in sent.items()} == {n: f"{n} done" for n in "abc"}


def test_different_signatures_never_share_a_batch(build_rig):
    rig = build_rig(num_shards=2)
    for seat, (name, signature) in zip(rig.seats(3), [("a", "x"), ("b", "y"), ("c", "x")], strict=True):
        rig.send(seat, name, signature)
    sizes = {rig.take().payloads, rig.take().payloads, rig.take().payloads}
    assert sizes == {("a",), ("b",), ("c",)}


def test_a_later_forward_merges_past_one_of_another_signature(build_rig):
    rig = build_rig()
    for seat, (name, signature) in zip(rig.seats(3), [("a", "x"), ("b", "y"), ("c", "x")], strict=True):
        rig.send(seat, name, signature)
    assert rig.take().payloads == ("a", "c")


def test_a_batch_has_at_most_max_batch_size_forwards(build_rig):
    rig = build_rig(max_batch_size=3)
    for seat in rig.seats(5):
        rig.send(seat, "p")
    assert len(rig.take().payloads) == 3


def test_a_batch_stays_within_the_token_budget(build_rig):
    rig = build_rig(max_batch_tokens=100)
    for seat in rig.seats(4):
        rig.send(seat, "p", tokens=40)
    assert len(rig.take().payloads) == 2


def test_a_forward_above_the_token_budget_flies_alone(build_rig):
    rig = build_rig(max_batch_tokens=100)
    for seat in rig.seats(2):
        rig.send(seat, "p", tokens=400)
    assert len(rig.take().payloads) == 1


def test_the_largest_forward_counts_for_the_token_budget(build_rig):
    rig = build_rig(max_batch_tokens=100)
    for seat, tokens in zip(rig.seats(3), (30, 50, 30), strict=True):
        rig.send(seat, "p", tokens=tokens)
    assert len(rig.take().payloads) == 2


# Depth and size


@pytest.mark.parametrize(("num_shards", "depth"), [(1, 1), (2, 3), (4, 5)])
def test_one_shard_has_one_batch_in_flight_and_more_have_one_to_spare(build_rig, num_shards, depth):
    rig = build_rig(num_shards=num_shards, max_batch_size=1)
    for seat in rig.seats(depth + 1):
        rig.send(seat, "p")
    batches = [rig.take() for _ in range(depth)]
    one_more = rig.taking()
    assert is_blocked(one_more)
    rig.finish(batches[0])
    assert one_more.result(timeout=SOON_S).payloads == ("p",)


def test_live_seats_are_spread_over_the_depth(build_rig):
    rig = build_rig(num_shards=2)
    for seat in rig.seats(7):
        rig.send(seat, "p")
    assert [len(rig.take().payloads) for _ in range(3)] == [3, 3, 1]


def test_seats_of_all_signatures_share_the_depth(build_rig):
    rig = build_rig(num_shards=2)
    for seat, signature in zip(rig.seats(6), "xyxyxy", strict=True):
        rig.send(seat, signature, signature)
    assert [rig.take().payloads for _ in range(3)] == [("x", "x"), ("y", "y"), ("x",)]


@pytest.mark.parametrize("end", [StepQueue.leave, StepQueue.cancel])
def test_seats_that_have_ended_do_not_count_for_the_size(build_rig, end):
    rig = build_rig(num_shards=2)
    seats = rig.seats(6)
    rig.run(*[(seat, "x") for seat in seats])
    for seat in seats[3:]:
        end(rig.queue, seat)
    for seat in seats[:3]:
        rig.send(seat, "p")
    assert len(rig.take().payloads) == 1


def test_seats_that_have_not_forwarded_yet_do_not_count_for_the_size(build_rig):
    rig = build_rig(num_shards=2)
    for seat in rig.seats(6)[:3]:
        rig.send(seat, "p")
    assert len(rig.take().payloads) == 1


# Waiting for requests that are about to forward


def test_a_batch_waits_for_a_request_between_two_forwards_and_goes_when_it_comes(build_rig):
    rig = build_rig()
    a, b = rig.seats(2)
    rig.run((a, "x"), (b, "x"))
    rig.send(a, "a")
    taking = rig.taking()
    assert is_blocked(taking)
    rig.send(b, "b")
    assert taking.result(timeout=SOON_S).payloads == ("a", "b")


def test_nobody_waits_for_a_request_that_has_not_forwarded_yet(build_rig):
    rig = build_rig()
    a, _new = rig.seats(2)
    rig.send(a, "a")
    assert rig.take().payloads == ("a",)


def test_nobody_waits_for_a_request_of_another_signature(build_rig):
    rig = build_rig()
    a, b = rig.seats(2)
    rig.run((b, "y"))
    rig.send(a, "a", "x")
    assert rig.take().payloads == ("a",)


def test_nobody_waits_for_a_forward_that_the_batch_could_not_hold(build_rig):
    rig = build_rig(max_batch_size=1)
    a, b = rig.seats(2)
    rig.run((a, "x"), (b, "x"))
    rig.send(a, "a")
    assert rig.take().payloads == ("a",)


@pytest.mark.parametrize("end", [StepQueue.leave, StepQueue.cancel])
def test_the_wait_ends_when_the_awaited_request_does(build_rig, end):
    rig = build_rig()
    a, b = rig.seats(2)
    rig.run((a, "x"), (b, "x"))
    rig.send(a, "a")
    taking = rig.taking()
    assert is_blocked(taking)
    end(rig.queue, b)
    assert taking.result(timeout=SOON_S).payloads == ("a",)


def test_the_wait_ends_after_batch_wait_s(build_rig):
    rig = build_rig(batch_wait_s=0.01)
    a, b = rig.seats(2)
    rig.send(a, "p"), rig.send(b, "p")
    batch = rig.take()
    ended_at = time.monotonic()
    rig.finish(batch)
    rig.send(a, "a")
    assert rig.take().payloads == ("a",)
    assert 0.01 <= time.monotonic() - ended_at < 0.5


def test_a_forward_that_has_sat_out_a_flight_still_waits_for_those_who_just_landed(build_rig):
    clock = Clock()
    rig = build_rig(batch_wait_s=1.0, clock=clock)
    a, b = rig.seats(2)
    first = rig.send(a, "a")
    batch = rig.take()
    rig.send(b, "b")
    clock.now = 100.0
    rig.finish(batch)
    first.result(timeout=SOON_S)
    taking = rig.taking()
    assert is_blocked(taking)
    rig.send(a, "a")
    assert taking.result(timeout=SOON_S).payloads == ("b", "a")


def test_a_request_that_is_late_is_not_awaited_again(build_rig):
    clock = Clock()
    rig = build_rig(batch_wait_s=1.0, clock=clock)
    late, a = rig.seats(2)
    rig.run((late, "x"))
    clock.now = 1.0
    rig.send(a, "a")
    assert rig.take().payloads == ("a",)


def test_a_late_request_does_not_cut_short_the_wait_for_another(build_rig):
    clock = Clock()
    rig = build_rig(batch_wait_s=1.0, clock=clock)
    late, coming, a = rig.seats(3)
    rig.run((late, "x"))
    clock.now = 1.0
    rig.run((coming, "x"))
    rig.send(a, "a")
    taking = rig.taking()
    assert is_blocked(taking)
    rig.send(coming, "b")
    assert taking.result(timeout=SOON_S).payloads == ("a", "b")


def test_take_wakes_for_the_nearest_of_several_deadlines(build_rig):
    clock = Clock()
    rig = build_rig(num_shards=2, batch_wait_s=FOREVER_S, clock=clock)
    a, b, c, d = rig.seats(4)
    for seat, signature in zip((a, b, c, d), "xxyy", strict=True):
        rig.send(seat, seat, signature)
    x, y = rig.take(), rig.take()
    rig.finish(x)
    clock.now = FOREVER_S - A_MOMENT_S
    rig.finish(y)
    rig.send(c, "c", "y"), rig.send(a, "a", "x")
    taking = rig.taking()
    assert is_blocked(taking)
    clock.now = FOREVER_S
    assert taking.result(timeout=SOON_S).payloads == ("a",)


# Order


def rig_with_a_waiting_group(build_rig: Callable[..., Rig], waited_s: float) -> tuple[Rig, Seat]:
    """A seat of signature x has waited for waited_s, another one of x has just ended, and y is ready.

    Returns the rig and the seat that has ended.
    """
    clock = Clock()
    rig = build_rig(num_shards=2, batch_wait_s=1.0, clock=clock)
    old, landing, *others = rig.seats(4)
    sent = rig.send(landing, "p", "x")
    batch = rig.take()
    rig.send(old, "old", "x")
    clock.now = waited_s
    rig.finish(batch)
    sent.result(timeout=SOON_S)
    for seat in others:
        rig.send(seat, "ready", "y")
    return rig, landing


def test_a_ready_signature_may_pass_one_that_waits(build_rig):
    rig, _ = rig_with_a_waiting_group(build_rig, waited_s=0.5)
    assert rig.take().payloads == ("ready", "ready")


def test_nobody_passes_a_forward_that_has_waited_batch_wait_s(build_rig):
    rig, landing = rig_with_a_waiting_group(build_rig, waited_s=1.0)
    taking = rig.taking()
    assert is_blocked(taking)
    rig.send(landing, "young", "x")
    assert taking.result(timeout=SOON_S).payloads == ("old", "young")


def serve(rig: Rig, seat: Seat) -> int:
    """Takes, finishes, and sends the next forwards until it is the seat's turn; returns the number of batches."""
    for num_batches in range(1, 20):
        batch = rig.take()
        rig.finish(batch)
        for other in batch.payloads:
            rig.send(other, other, other.latest.signature)
        if seat in batch.payloads:
            return num_batches
    raise AssertionError("starved")


def test_a_rare_signature_is_not_starved_under_constant_load(build_rig):
    rig = build_rig(max_batch_size=2)
    rare, *common = rig.seats(7)
    for seat in common:
        rig.send(seat, seat, "common")
    rig.send(rare, rare, "rare")
    assert serve(rig, rare) == 4  # after the six that came before it


def test_a_short_request_is_not_held_up_by_long_ones(build_rig):
    rig = build_rig(max_batch_size=4)
    *long, short = rig.seats(9)
    for seat in [*long, short]:
        rig.send(seat, seat)
    assert sum(serve(rig, short) for _ in range(4)) <= 4 * 3  # three batches serve all nine


# The two passes of true CFG, where their signatures differ


def test_a_request_that_alternates_is_awaited_where_it_comes_next(build_rig):
    rig = build_rig()
    a, b = rig.seats(2)
    for signature in ("cond", "uncond", "cond"):
        rig.run((a, signature))
    rig.send(b, "b", "uncond")
    taking = rig.taking()
    assert is_blocked(taking)
    rig.send(a, "a", "uncond")
    assert taking.result(timeout=SOON_S).payloads == ("b", "a")


def test_a_request_that_alternates_is_not_awaited_where_it_was_last(build_rig):
    rig = build_rig()
    a, b = rig.seats(2)
    for signature in ("cond", "uncond", "cond"):
        rig.run((a, signature))
    rig.send(b, "b", "cond")
    assert rig.take().payloads == ("b",)


def run_request(rig: Rig, seat: Seat, signatures: Iterable[Any]) -> None:
    for signature in signatures:
        rig.queue.submit(seat, "p", signature=signature, tokens=1).result()
    rig.queue.leave(seat)


def run_rank_0(rig: Rig) -> None:
    with suppress(Over):
        while True:
            rig.finish(rig.queue.take())


def test_alternating_requests_in_lockstep_merge(build_rig):
    rig = build_rig(batch_wait_s=0.05)
    passes = ["cond", "uncond"] * 10
    requests = [in_thread(run_request, rig, seat, passes) for seat in rig.seats(4)]
    rig.until(lambda: rig.queue.stats().num_waiting == 4)
    in_thread(run_rank_0, rig)
    assert not wait(requests, timeout=SOON_S).not_done
    assert len(passes) * 4 / rig.queue.stats().num_micro_batches >= 3


def test_a_second_forward_on_a_seat_is_refused_while_the_first_is_open(build_rig):
    rig = build_rig()
    (seat,) = rig.seats(1)
    rig.send(seat, "cond")
    with pytest.raises(RuntimeError, match="one open forward"):
        rig.send(seat, "uncond").result(timeout=SOON_S)


# Both passes of a request under way at once


def test_a_request_with_two_forwards_under_way_is_one_request(build_rig):
    rig = build_rig(num_shards=2)
    (seat,) = rig.seats(1)
    other = rig.queue.seat_of(seat, 1)
    assert rig.queue.seat_of(seat, 0) is seat
    assert rig.queue.seat_of(seat, 1) is other
    rig.send(seat, "cond", "x")
    rig.send(other, "uncond", "x")
    assert [rig.take().payloads, rig.take().payloads] == [("cond",), ("uncond",)]
    assert rig.queue.stats().num_seats == 1


@pytest.mark.parametrize("end", ["cancel", "leave"])
def test_the_end_of_a_request_ends_all_of_its_forwards(build_rig, end):
    rig = build_rig(num_shards=2)
    seat, stays = rig.seats(2)
    other = rig.queue.seat_of(seat, 1)
    sent = [rig.send(seat, "cond"), rig.send(other, "uncond")]
    rig.send(stays, "another's")
    getattr(rig.queue, end)(seat)
    for forward in sent:
        with pytest.raises(Cancelled):
            forward.result(timeout=SOON_S)
    assert rig.take().payloads == ("another's",)
    for late in (lambda: rig.queue.seat_of(seat, 2), lambda: rig.send(other, "late").result(timeout=SOON_S)):
        with pytest.raises(Cancelled):
            late()


def test_two_passes_of_a_lone_request_merge_over_one_shard(build_rig):
    """Over one shard, therefore, both passes are under way at once only if the config says so."""
    rig = build_rig()
    (seat,) = rig.seats(1)
    rig.send(seat, "cond", "x")
    rig.send(rig.queue.seat_of(seat, 1), "uncond", "x")
    assert rig.take().payloads == ("cond", "uncond")


# Cancelling


def test_cancelling_a_waiting_forward_takes_it_out_of_the_queue(build_rig):
    rig = build_rig()
    a, b = rig.seats(2)
    cancelled, _ = rig.send(a, "a"), rig.send(b, "b")
    rig.queue.cancel(a)
    with pytest.raises(Cancelled):
        cancelled.result(timeout=SOON_S)
    assert rig.take().payloads == ("b",)


def test_cancelling_a_flying_forward_wakes_it_before_the_flight_lands(build_rig):
    rig = build_rig()
    (a,) = rig.seats(1)
    cancelled = rig.send(a, "a")
    rig.take()
    rig.queue.cancel(a)
    with pytest.raises(Cancelled):
        cancelled.result(timeout=SOON_S)


def test_the_others_of_a_flight_get_their_own_results_when_one_is_cancelled(build_rig):
    rig = build_rig()
    seats = rig.seats(3)
    _, b, c = [rig.send(seat, name) for seat, name in zip(seats, "abc", strict=True)]
    batch = rig.take()
    rig.queue.cancel(seats[0])
    rig.finish(batch)
    assert (b.result(timeout=SOON_S), c.result(timeout=SOON_S)) == ("b done", "c done")


def test_cancelling_between_two_forwards_refuses_the_next_one(build_rig):
    rig = build_rig()
    (a,) = rig.seats(1)
    rig.run((a, "x"))
    rig.queue.cancel(a)
    with pytest.raises(Cancelled):
        rig.send(a, "a").result(timeout=SOON_S)


def test_a_seat_that_was_left_takes_no_forward(build_rig):
    rig = build_rig()
    (a,) = rig.seats(1)
    rig.queue.leave(a)
    with pytest.raises(Cancelled):
        rig.send(a, "a").result(timeout=SOON_S)


# Failing and closing


def test_an_error_fails_its_own_batch_only(build_rig):
    rig = build_rig(num_shards=2, max_batch_size=1)
    a, b = [rig.send(seat, name) for seat, name in zip(rig.seats(2), "ab", strict=True)]
    failing, passing = rig.take(), rig.take()
    rig.queue.fail(failing.id, MemoryError("out of memory"))
    rig.finish(passing)
    with pytest.raises(MemoryError):
        a.result(timeout=SOON_S)
    assert b.result(timeout=SOON_S) == "b done"


def test_a_seat_may_go_on_after_a_failed_forward(build_rig):
    rig = build_rig()
    (a,) = rig.seats(1)
    failed = rig.send(a, "a")
    rig.queue.fail(rig.take().id, MemoryError("out of memory"))
    wait([failed], timeout=SOON_S)
    again = rig.send(a, "again")
    rig.finish(rig.take())
    assert again.result(timeout=SOON_S) == "again done"


def test_too_few_results_are_refused_and_the_batch_may_still_fail(build_rig):
    rig = build_rig()
    sent = [rig.send(seat, "p") for seat in rig.seats(2)]
    batch = rig.take()
    with pytest.raises(ValueError, match="got 1 results for 2 payloads") as raised:
        rig.queue.finish(batch.id, ["only one"])
    rig.queue.fail(batch.id, raised.value)
    assert all(isinstance(forward.exception(timeout=SOON_S), ValueError) for forward in sent)


def test_closing_releases_waiting_and_flying_forwards(build_rig):
    rig = build_rig()
    a, b = rig.seats(2)
    running = rig.send(a, "a")
    rig.take()
    waiting = rig.send(b, "b")
    rig.queue.close(ConnectionError("rank 1 is gone"))
    for forward in (running, waiting):
        with pytest.raises(ConnectionError):
            forward.result(timeout=SOON_S)


def test_a_closed_queue_takes_no_forward(build_rig):
    rig = build_rig()
    rig.queue.close(ConnectionError("rank 1 is gone"))
    with pytest.raises(ConnectionError):
        rig.send(rig.queue.join(), "late").result(timeout=SOON_S)


def test_closing_releases_take(build_rig):
    rig = build_rig()
    taking = rig.taking()
    assert is_blocked(taking)
    rig.queue.close(ConnectionError("rank 1 is gone"))
    with pytest.raises(ConnectionError):
        taking.result(timeout=SOON_S)


def test_the_first_error_a_queue_is_closed_with_stays(build_rig):
    rig = build_rig()
    rig.queue.close(ConnectionError("the cause"))
    rig.queue.close(RuntimeError("a consequence"))
    with pytest.raises(ConnectionError):
        rig.take()


def test_a_batch_may_land_after_the_queue_was_closed(build_rig):
    rig = build_rig()
    sent = rig.send(rig.queue.join(), "a")
    batch = rig.take()
    rig.queue.close(ConnectionError("rank 1 is gone"))
    rig.finish(batch)
    assert isinstance(sent.exception(timeout=SOON_S), ConnectionError)


def test_a_failed_forward_does_not_keep_its_payload_alive(build_rig):
    class Payload:
        pass

    def run(seat: Seat) -> weakref.ref[Payload]:
        payload = Payload()
        reference = weakref.ref(payload)
        with suppress(MemoryError):
            rig.queue.submit(seat, payload, signature="x", tokens=1).result()
        return reference

    rig = build_rig()
    gc.disable()
    try:
        request = in_thread(run, rig.queue.join())
        rig.queue.fail(rig.take().id, MemoryError("out of memory"))
        assert request.result(timeout=SOON_S)() is None
    finally:
        gc.enable()


# Counters


def test_stats_count_seats_and_open_forwards(build_rig):
    rig = build_rig(max_batch_size=1)
    a, b, _new = rig.seats(3)
    rig.send(a, "a")
    rig.take()
    rig.send(b, "b")
    stats = rig.queue.stats()
    assert (stats.num_seats, stats.num_waiting, stats.num_running) == (3, 1, 1)


def test_stats_count_batches_by_size(build_rig):
    rig = build_rig(num_shards=2)
    for seat in rig.seats(7):
        rig.send(seat, "p")
    for _ in range(3):
        rig.take()
    assert rig.queue.stats().batch_sizes == {3: 2, 1: 1}
    assert rig.queue.stats().num_micro_batches == 3


def test_stats_add_up_the_waiting_of_all_forwards(build_rig):
    clock = Clock()
    rig = build_rig(clock=clock)
    a, b = rig.seats(2)
    rig.send(a, "a")
    clock.now = 2.0
    rig.send(b, "b")
    clock.now = 3.0
    rig.take()
    assert rig.queue.stats().queue_wait_s == 3.0 + 1.0


# All at once


def test_forty_requests_with_errors_and_cancellations_neither_hang_nor_mix(build_rig):
    rig = build_rig(num_shards=2, max_batch_size=6, batch_wait_s=0.001, max_batch_tokens=10)
    chance = random.Random(0)
    steps = [chance.randint(1, 15) for _ in range(40)]

    def request(name: int, seat: Seat) -> str:
        habits = random.Random(name).choices(["x", "y", "z"], k=2)
        for step in range(steps[name]):
            payload = f"{name}, step {step}"
            signature, tokens = habits[step % 2], 1 + name % 3
            try:
                result = rig.queue.submit(seat, payload, signature=signature, tokens=tokens).result()
            except (Cancelled, MemoryError) as error:
                rig.queue.leave(seat)
                return type(error).__name__
            assert result == f"{payload} done"
        rig.queue.leave(seat)
        return "finished"

    def shards() -> None:
        luck = random.Random(1)
        with suppress(Over):
            while True:
                running = [rig.queue.take()]
                if rig.queue.stats().num_waiting > 6:
                    running.append(rig.queue.take())
                for batch in sorted(running, key=lambda _: luck.random()):
                    if luck.random() < 0.03:
                        rig.queue.fail(batch.id, MemoryError("out of memory"))
                    else:
                        rig.finish(batch)

    seats = rig.seats(40)
    requests = [in_thread(request, name, seat) for name, seat in enumerate(seats)]
    in_thread(shards)
    for seat in chance.sample(seats, 10):
        time.sleep(0.001)
        rig.queue.cancel(seat)
    assert not wait(requests, timeout=SOON_S).not_done
    assert {"finished", "Cancelled", "MemoryError"} == {request.result() for request in requests}
    assert rig.queue.stats().num_seats == 0


def test_an_empty_micro_batch_follows_the_last_seat_once(build_rig: Callable[..., Rig]) -> None:
    rig = build_rig(tells_idle=True)
    one, other = rig.seats(2)
    rig.run((one, "x"), (other, "x"))
    taking = rig.taking()
    rig.queue.leave(one)
    assert not taking.done()
    rig.queue.leave(other)
    idle = taking.result(timeout=SOON_S)
    assert idle.payloads == ()
    rig.finish(idle)
    [third] = rig.seats(1)
    taking = rig.taking()
    sent = rig.send(third, "p")
    batch = taking.result(timeout=SOON_S)
    assert batch.payloads == ("p",), "idle is told once"
    rig.finish(batch)
    assert sent.result(timeout=SOON_S) == "p done"
    assert 0 not in rig.queue.stats().batch_sizes


@pytest.mark.parametrize("tells_idle", [True, False])
def test_nothing_is_told_where_nothing_flew_or_nobody_asked(
    build_rig: Callable[..., Rig], tells_idle: bool
) -> None:
    rig = build_rig(tells_idle=tells_idle)
    [seat] = rig.seats(1)
    if not tells_idle:
        rig.run((seat, "x"))
    taking = rig.taking()
    rig.queue.leave(seat)
    time.sleep(A_MOMENT_S)
    assert not taking.done()


# Load


@pytest.mark.parametrize(
    ("num_shards", "tokens", "num_seats", "load"),
    [
        (1, 1024, 4, 1.0),  # 4 x 1024 tokens run together
        (1, 1024, 6, 1.5),
        (1, 4096, 2, 2.0),  # one at a time
        (1, 100_000, 1, 1.0),  # alone, however large
        (1, 1, 16, 1.0),  # max_batch_size
        (3, 4096, 4, 1.0),  # 4 micro-batches over 3 shards
    ],
)
def test_load_is_what_the_seats_come_to_over_what_flies_at_once(
    build_rig: Callable[..., Rig], num_shards: int, tokens: int, num_seats: int, load: float
) -> None:
    rig = build_rig(num_shards=num_shards, max_batch_tokens=4096)
    for seat in rig.seats(num_seats):
        rig.send(seat, "payload", tokens=tokens)
    assert rig.queue.stats().load == pytest.approx(load)


def test_load_falls_when_a_seat_is_left(build_rig: Callable[..., Rig]) -> None:
    rig = build_rig(max_batch_size=2)
    one, _ = rig.seats(2)
    assert rig.queue.stats().load == 1.0
    rig.queue.leave(one)
    assert rig.queue.stats().load == 0.5


def test_no_more_forwards_fly_as_one_than_fit_the_memory() -> None:
    rig = Rig()
    for i, seat in enumerate(rig.seats(5)):
        in_thread(forward, rig.queue, seat, i, signature="x", tokens=1, max_merged=2)
    rig.until(lambda: rig.queue.stats().num_waiting == 5)
    sizes = []
    for _ in range(3):
        batch = rig.queue.take()
        sizes.append(len(batch.payloads))
        rig.queue.finish(batch.id, batch.payloads)
        for seat in list(rig.queue._seats):
            if seat.state is SeatState.STEPPING:
                rig.queue.leave(seat)
    assert sizes == [2, 2, 1]


def test_what_was_too_much_together_flies_again_each_alone_and_before_what_came_later(
    build_rig: Callable[..., Rig],
) -> None:
    rig = build_rig()
    first, second, third, fourth = rig.seats(4)
    sent = [rig.send(seat, payload) for seat, payload in ((first, "a"), (second, "b"), (third, "c"))]
    batch = rig.take()
    assert batch.payloads == ("a", "b", "c")
    rig.queue.leave(second)
    sent.append(rig.send(fourth, "d"))
    rig.queue.retry_alone(batch.id)
    for seat, payload in ((first, "a"), (third, "c"), (fourth, "d")):
        alone = rig.take()
        assert alone.payloads == (payload,)
        rig.finish(alone)
        rig.queue.leave(seat)
    with pytest.raises(Cancelled):
        sent.pop(1).result(timeout=SOON_S)
    assert [answer.result(timeout=SOON_S) for answer in sent] == ["a done", "c done", "d done"]

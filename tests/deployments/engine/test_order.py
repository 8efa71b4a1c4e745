"""The order of requests: loads are played over a step queue, with a clock that only the load moves."""

import random
from collections import Counter, defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from deployments.engine.admission_queue import num_threads
from deployments.engine.demand import Demand
from deployments.engine.fair_shares import FEW, FairShares
from deployments.engine.order import BURST_S, ORDERS, STRETCH
from deployments.engine.seat import Seat, SeatState
from deployments.engine.step_queue import StepQueue
from deployments.engine.timings import Timings
from deployments.errors import OutOfTime
from deployments.options.qos import DEFAULT_QOS, OrderName, Qos
from deployments.options.step_cache import StepCacheConfig
from deployments.request import GenerationRequest, Prompt

MERGED = 0.05
"""The cost of a merged forward, relative to the first, on a GPU that one forward does not fill."""


@dataclass(eq=False)
class Asked:
    """One request of a load."""

    arrives: float
    steps: int
    step_s: float = 1.0
    """Seconds of one step in one shard."""
    qos: Qos = DEFAULT_QOS
    signature: Any = "x"
    num_done: int = 0
    num_flown: int = 0
    ended: float = float("nan")
    error: Exception | None = None

    @property
    def alone_s(self) -> float:
        return self.steps * self.step_s

    @property
    def took_s(self) -> float:
        return self.ended - self.arrives


@dataclass
class Play:
    """Plays a load over a step queue until all of its requests have ended."""

    order: OrderName
    load: list[Asked]
    at_work: int = 8
    batch: int = 1
    shards: int = 1
    merged: float = MERGED
    """Cost of each further forward of a micro-batch, relative to the first."""
    now: float = 0.0
    ran: list[Asked] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    most_at_work: int = 0

    def __post_init__(self) -> None:
        self.queue = StepQueue(
            num_shards=self.shards,
            max_batch_size=self.batch,
            batch_wait_s=0.0,
            max_batch_tokens=None,
            order=ORDERS[self.order](),
            max_at_work=self.at_work,
            clock=lambda: self.now,
        )
        self._seats: dict[Asked, Seat] = {}
        self._entered: dict[Asked, Future[None]] = {}
        self._sent: dict[Asked, Future[Any]] = {}

    def run(self) -> "Play":
        coming = sorted(self.load, key=lambda each: each.arrives)
        in_flight: list[tuple[float, Any]] = []
        while coming or self._seats:
            if coming and (not in_flight or coming[0].arrives <= in_flight[0][0]):
                self.now = max(self.now, coming[0].arrives)
                self._join(coming.pop(0))
            elif in_flight:
                self.now, batch = in_flight.pop(0)
                self._finish(batch)
            self._begin()
            while started := self._start(in_flight):
                in_flight.append(started)
        return self

    def _join(self, asked: Asked) -> None:
        demand = Demand(asked.qos, (asked.signature, asked.step_s), asked.step_s, asked.steps, asked.steps)
        seat = self._seats[asked] = self.queue.join(demand)
        self._entered[asked] = self.queue.enter(seat)

    def _begin(self) -> None:
        for asked, entered in list(self._entered.items()):
            if entered.done():
                del self._entered[asked]
                self._end(asked, entered.exception()) if entered.exception() else self._send(asked)  # type: ignore[arg-type]
        self.most_at_work = max(self.most_at_work, len(self._sent))

    def _send(self, asked: Asked) -> None:
        try:
            self._sent[asked] = self.queue.submit(self._seats[asked], asked, signature=asked.signature, tokens=1)
        except OutOfTime as error:
            self._end(asked, error)

    def _start(self, in_flight: list[Any]) -> tuple[float, Any] | None:
        """Starts the next micro-batch as `take` does, but without waiting."""
        chosen, _ = self.queue._next_batch()
        self._end_refused()
        if not chosen:
            return None
        batch = self.queue._start(chosen)
        self.sizes.append(len(batch.payloads))
        self.ran += batch.payloads
        took_s = batch.payloads[0].step_s * (1 + self.merged * (len(batch.payloads) - 1))
        ends = self.now + self.shards * took_s
        return max(ends, in_flight[-1][0] + took_s) if in_flight else ends, batch

    def _finish(self, batch: Any) -> None:
        self.queue.finish(batch.id, batch.payloads)
        for asked in batch.payloads:
            if asked in self._seats and not self._sent[asked].exception():
                asked.num_done += 1
                self.queue.advance(self._seats[asked], asked.num_done)
                self._send(asked) if asked.num_done < asked.steps else self._end(asked)
        self._end_refused()

    def _end_refused(self) -> None:
        for asked, sent in list(self._sent.items()):
            if sent.done() and asked in self._seats and sent.exception():
                self._end(asked, sent.exception())  # type: ignore[arg-type]

    def _end(self, asked: Asked, error: Exception | None = None) -> None:
        asked.ended, asked.error = self.now, error
        self._sent.pop(asked, None)
        self.queue.leave(self._seats.pop(asked))


def p95(load: list[Asked]) -> float:
    return float(np.percentile([each.took_s for each in load], 95))


def of(share: str, **more: Any) -> Qos:
    return Qos(share=share, **more)


# Shares


def crowd_and_one(order: OrderName, *, signature: str, batch: int, merged: float) -> tuple[float, float]:
    """Returns (p95 of a user with few requests, time that one of them takes alone), beside 100 requests of another
    user."""
    crowd = [Asked(0.0, 10, qos=of("crowd")) for _ in range(100)]
    crowd_s = 100 * 10 * (1 + (batch - 1) * merged) / batch
    alone = [Asked(at * crowd_s, 10, qos=of("one"), signature=signature) for at in (0.06, 0.33)]
    Play(order, crowd + alone, batch=batch, merged=merged).run()
    assert all(not each.error for each in crowd)
    return p95(alone), alone[0].alone_s


@pytest.mark.parametrize("merged", [MERGED, 0.4, 1.0])
@pytest.mark.parametrize(("signature", "batch"), [("x", 8), ("y", 8), ("y", 1)])
def test_who_asks_for_little_hardly_notices_who_asks_for_fifty_times_as_much(
    signature: str, batch: int, merged: float
) -> None:
    """This also holds where a micro-batch of eight takes eight times as long as one forward."""
    took_s, alone_s = crowd_and_one("fair", signature=signature, batch=batch, merged=merged)
    assert took_s <= 2 * alone_s
    assert crowd_and_one("fifo", signature=signature, batch=batch, merged=merged)[0] > 3 * alone_s


def test_two_who_always_ask_are_never_far_apart() -> None:
    """One of them has six times as many requests, with steps twice as long."""
    load = [Asked(0.0, 10, qos=of("few"), signature="y", step_s=0.5) for _ in range(10)]
    load += [Asked(0.0, 10, qos=of("many")) for _ in range(60)]
    had: Counter[str] = Counter()
    for asked in Play("fair", load, at_work=16).run().ran:
        had[asked.qos.share] += asked.step_s
        if had["few"] < 50.0:  # at 50 all of its work is done
            assert abs(had["few"] - had["many"]) <= 4.0


def test_who_comes_back_has_saved_up_no_more_than_a_burst() -> None:
    shares = FairShares(burst_s=5.0)
    shares.add("busy")
    for _ in range(1000):
        shares.charge("busy", 1.0)
    shares.add("idle")
    assert shares.usage("busy") - shares.usage("idle") == 5.0
    shares.charge("idle", 7.0)
    shares.remove("idle")
    shares.add("idle")
    assert shares.usage("idle") - shares.usage("busy") == 2.0, "what it has had is not forgotten when it leaves"


def test_a_crowd_that_comes_has_no_burst_over_who_asked_before() -> None:
    """This holds whether the user is present at that moment or not: requests of one user follow one another."""
    for is_here in (True, False):
        shares = FairShares(burst_s=30.0)
        shares.add("one")
        shares.charge("one", 10.0)
        if not is_here:
            shares.remove("one")
        for _ in range(50):
            shares.add("crowd")
        shares.charge("crowd", 1.0)
        if not is_here:
            shares.add("one")
        assert shares.usage("one") < shares.usage("crowd")


def test_a_share_with_few_requests_has_a_burst_and_one_with_more_has_none() -> None:
    shares = FairShares(burst_s=10.0)
    shares.add("busy")
    shares.charge("busy", 100.0)
    for _ in range(FEW):
        shares.add("new")
    assert shares.usage("busy") - shares.usage("new") == 10.0
    shares.add("new")
    assert shares.usage("busy") == shares.usage("new")


def test_without_a_burst_a_new_share_starts_where_the_least_used_one_is() -> None:
    shares = FairShares()
    shares.add("busy")
    shares.charge("busy", 100.0)
    shares.add("new")
    assert shares.usage("busy") == shares.usage("new")


def test_a_share_is_present_until_its_last_request_has_ended() -> None:
    shares = FairShares()
    for share in ("two", "two", "one"):
        shares.add(share)
    shares.charge("one", 10.0)
    shares.remove("two")
    shares.add("new")
    assert shares.usage("new") == shares.usage("two") < shares.usage("one")


def test_new_names_bring_no_more_than_a_burst_each_and_are_forgotten() -> None:
    shares = FairShares(burst_s=5.0)
    shares.add("busy")
    for i in range(1000):
        shares.charge("busy", 10.0)
        shares.add(i)
        assert shares.usage("busy") - shares.usage(i) <= 10.0 + 5.0
        shares.charge(i, 1.0)
        shares.remove(i)
    assert len(shares._usage) < 10


def test_a_user_who_has_left_gives_no_head_start_to_whoever_comes_next() -> None:
    """A newcomer has the burst, and not all that the busy user has had since the other left."""
    busy = [Asked(0.0, 200, qos=of("busy")) for _ in range(4)]
    left, new = Asked(0.0, 2, qos=of("left"), signature="y"), Asked(500.0, 200, qos=of("new"), signature="z")
    ran = Play("fair", [*busy, left, new]).run().ran
    since = ran[ran.index(new) :]
    assert next(i for i, asked in enumerate(since) if asked is not new) <= BURST_S + 2


# Priority


def test_while_all_wait_high_gets_most_and_low_one_part_in_21() -> None:
    load = [
        Asked(0.0, 100, qos=Qos(priority), signature=priority)
        for priority in ("low", "normal", "high")
        for _ in range(8)
    ]
    ran = Play("fair", load, at_work=24).run().ran[60:480]
    parts = Counter(asked.signature for asked in ran)
    assert parts["high"] == pytest.approx(320, abs=5)
    assert parts["normal"] == pytest.approx(80, abs=5)
    assert parts["low"] == pytest.approx(20, abs=5)


# Deadlines and lengths


def test_of_equals_the_earliest_deadline_ends_first() -> None:
    load = [Asked(0.0, 5, qos=Qos(deadline_s=s)) for s in (40.0, 25.0, 300.0, 12.0, 33.0, 200.0)]
    Play("fair", load, at_work=2).run()
    assert all(not each.error for each in load)
    by_deadline = sorted(load, key=lambda each: each.qos.deadline_s or 0)
    assert sorted(load, key=lambda each: each.ended) == by_deadline


def mixed(seed: int) -> list[Asked]:
    """Returns short requests among long ones, which use 80 % of what the device can do."""
    chance = random.Random(seed)
    now, load = 0.0, []
    for _ in range(80):
        now += chance.expovariate(1 / 19.0)
        steps = 50 if chance.random() < 0.25 else 4
        load.append(Asked(now, steps, signature=steps))
    return load


@pytest.mark.parametrize("seed", range(3))
def test_short_ones_among_long_are_done_sooner_than_first_come_first_served(seed: int) -> None:
    fair, fifo = (Play(order, mixed(seed)).run().load for order in ("fair", "fifo"))
    short = [[each for each in load if each.steps == 4] for load in (fair, fifo)]
    long = [[each for each in load if each.steps == 50] for load in (fair, fifo)]
    assert 2 * p95(short[0]) <= p95(short[1])
    assert p95(long[0]) <= 1.25 * p95(long[1])


@pytest.mark.parametrize("seed", range(5))
def test_none_is_passed_by_one_that_came_more_than_the_stretch_later(seed: int) -> None:
    chance = random.Random(seed)
    load = [Asked(chance.uniform(0, 800), steps := chance.randint(1, 20), signature=steps % 3) for _ in range(80)]
    Play("fair", load, at_work=4).run()
    for one in load:
        for later in load:
            if later.arrives > one.arrives + STRETCH * one.alone_s:
                assert one.ended < later.ended


def test_a_request_that_is_past_its_deadline_flies_no_more() -> None:
    load = [Asked(0.0, 20), Asked(0.0, 20, qos=Qos(deadline_s=7.5))]
    play = Play("fair", load).run()
    assert isinstance(load[1].error, OutOfTime)
    assert load[1].ended <= 7.5 + 1
    assert not load[0].error
    assert play.queue.stats().num_out_of_time == 1


def test_what_cannot_be_done_in_time_any_more_is_ended_before_its_deadline() -> None:
    """The estimate comes from the request's own steps."""
    [asked] = Play("fair", [Asked(0.0, 100, qos=Qos(deadline_s=50.0))]).run().load
    assert isinstance(asked.error, OutOfTime)
    assert asked.num_done <= 2
    assert str(asked.error).startswith("the 99 steps that are left take at least 99 s")


def test_what_never_could_be_done_in_time_does_not_begin_once_its_kind_is_known() -> None:
    load = [Asked(0.0, 10), Asked(20.0, 10, qos=Qos(deadline_s=9.0))]
    load += [Asked(20.0, 10, qos=Qos(deadline_s=25.0))]
    play = Play("fair", load).run()
    assert [bool(each.error) for each in load] == [False, True, False]
    assert load[1] not in play.ran
    assert play.queue.stats().num_out_of_time == 1


def test_a_request_that_waits_to_start_is_refused_once_it_could_not_be_done_in_time() -> None:
    """It is not refused only when the request that it waits for ends."""
    load = [Asked(0.0, 50), Asked(2.0, 5, qos=Qos(deadline_s=9.5))]
    play = Play("fifo", load, at_work=1).run()
    assert isinstance(load[1].error, OutOfTime)
    assert load[1] not in play.ran
    assert load[1].took_s <= 9.5 - 5 + 1, "at the end of the first step after that"


def test_a_deadline_that_can_be_met_is_met_under_a_crowd() -> None:
    crowd = [Asked(0.0, 20) for _ in range(50)]
    hasty = Asked(30.0, 20, qos=Qos(deadline_s=30.0), signature="y")
    Play("fair", [*crowd, hasty]).run()
    assert not hasty.error
    assert hasty.took_s <= 30.0


# Requests that end together


def alike(order: OrderName, number: int, shards: int, batch: int = 1, **more: Any) -> Play:
    return Play(order, [Asked(i / 10, 20) for i in range(number)], 16, batch, shards, **more).run()


@pytest.mark.parametrize(("shards", "number"), [(2, 4), (2, 7), (4, 6), (4, 11), (8, 10)])
def test_a_pipeline_is_full_until_those_that_came_together_have_ended(shards: int, number: int) -> None:
    fair = alike("fair", number, shards)
    assert fair.now <= 1.05 * alike("fifo", number, shards).now
    assert fair.now <= 20 * number + 2 * shards


@pytest.mark.parametrize(("shards", "number"), [(2, 7), (4, 11)])
def test_and_the_first_of_them_end_sooner_than_in_turn(shards: int, number: int) -> None:
    fair, fifo = (alike(order, number, shards).load for order in ("fair", "fifo"))
    assert sum(each.took_s for each in fair) <= 0.9 * sum(each.took_s for each in fifo)


def test_it_is_full_though_they_could_merge_if_they_were_alike() -> None:
    load = [Asked(i / 10, 20, signature=i) for i in range(4)]
    assert Play("fair", load, at_work=16, batch=8, shards=2).run().now <= 20 * 4 + 2 * 2


def test_flights_are_full_too() -> None:
    assert len(alike("fair", 9, 1, batch=8).sizes) <= 26, "20 of eight and 20 of one would be 40"


def test_short_ones_are_not_held_up_by_long_ones_that_are_critical() -> None:
    """This holds while enough short requests wait, each of which could be at work."""
    short = [Asked(30.0, 4) for _ in range(20)]
    Play("fair", [Asked(0.0, 100) for _ in range(3)] + short, at_work=16, shards=2).run()
    assert p95(short) <= 1.2 * 4 * 20


# Waiting to begin


@pytest.mark.parametrize("order", ["fair", "fifo"])
def test_no_more_are_at_work_than_have_threads(order: OrderName) -> None:
    load = [Asked(float(i), 1 + 7 * (i % 3), qos=of(str(i % 4))) for i in range(100)]
    play = Play(order, load, at_work=4).run()
    assert play.most_at_work <= (num_threads(4) if order == "fair" else 4)
    assert all(not each.error for each in load)


def test_a_short_one_begins_beside_as_many_long_ones_as_may_be_at_work() -> None:
    load = [Asked(0.0, 100) for _ in range(4)] + [Asked(10.0, 2)]
    Play("fair", load, at_work=4).run()
    assert load[-1].took_s <= 2 * load[-1].alone_s


def test_who_leaves_the_line_is_let_in_no_more() -> None:
    play = Play("fair", [], at_work=1)
    first, second, third = (play.queue.join() for _ in range(3))
    entered = [play.queue.enter(seat) for seat in (first, second, third)]
    play.queue.leave(second)
    play.queue.leave(first)
    assert [each.done() for each in entered] == [True, False, True]
    assert play.queue.stats().num_waiting_requests == 0


def test_a_queue_that_closes_tells_those_who_wait_to_begin() -> None:
    play = Play("fair", [], at_work=1)
    _, waiting = (play.queue.enter(play.queue.join()) for _ in range(2))
    play.queue.close(ConnectionError("rank 1 is gone"))
    assert isinstance(waiting.exception(0), ConnectionError)
    with pytest.raises(ConnectionError):
        play.queue.enter(play.queue.join())


# Micro-batches of several requests


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("number", [1, 5, 16, 40])
def test_batches_of_equal_requests_are_no_smaller_than_first_come_first_served(shards: int, number: int) -> None:
    def play(order: OrderName) -> Play:
        load = [Asked(0.0, 20, qos=of(str(i % 3))) for i in range(number)]
        return Play(order, load, at_work=32, batch=8, shards=shards).run()

    fair, fifo = play("fair"), play("fifo")
    assert len(fair.sizes) <= 1.05 * len(fifo.sizes)
    assert fair.now <= 1.05 * fifo.now


@pytest.mark.parametrize("seed", range(8))
def test_none_starves_whatever_comes(seed: int) -> None:
    chance = random.Random(seed)

    def asked() -> Asked:
        qos = Qos(
            chance.choice(["low", "normal", "high"]),  # type: ignore[arg-type]
            chance.choice("abc"),
            chance.choice([None, None, 5.0, 100.0, 1000.0]),
        )
        step_s, steps = chance.choice([0.1, 1.0, 3.0]), chance.randint(1, 30)
        return Asked(chance.uniform(0, 500), steps, step_s, qos, chance.choice("xyz") + str(step_s))

    load = [asked() for _ in range(150)]
    shards, batch = chance.choice([(1, 1), (1, 4), (3, 2)])
    play = Play("fair", load, at_work=6, batch=batch, shards=shards).run()
    assert all(each.num_done == each.steps or isinstance(each.error, OutOfTime) for each in load)
    assert all(each.qos.deadline_s for each in load if each.error)
    assert play.queue.stats().num_seats == 0
    assert play.queue._order._classes._num_requests == Counter()  # type: ignore[attr-defined]


def test_who_goes_first_and_is_between_two_forwards_is_waited_for_a_moment() -> None:
    """Otherwise it would wait for a forward of another user after each of its own."""
    play = Play("fair", [], at_work=8, batch=8)
    queue = play.queue
    crowd = [queue.join(Demand(of("crowd"))) for _ in range(8)]
    one = queue.join(Demand(of("one")))
    sent = {seat: queue.submit(seat, seat, signature="crowd", tokens=1) for seat in crowd}

    def run() -> list[Seat]:
        batch = queue.take()
        play.now += 1.0
        queue.finish(batch.id, batch.payloads)
        return list(batch.payloads)

    for _ in range(8):  # until the queue has measured how long they take
        for seat in run():
            sent[seat] = queue.submit(seat, seat, signature="crowd", tokens=1)
    queue.submit(one, one, signature="one", tokens=1)
    assert run() == [one]
    assert one.state is SeatState.STEPPING
    assert queue._next_batch().forwards == [], "it is waited for"
    queue.submit(one, one, signature="one", tokens=1)
    assert run() == [one]
    play.now += 0.2
    assert {forward.seat for forward in queue._next_batch().forwards} <= set(crowd), "but not for long"


@pytest.mark.parametrize(
    ("stepping_s", "is_first", "is_held"),
    [(0.1, True, True), (0.4, True, True), (0.6, True, False), (1.0, True, False), (0.1, False, False)],
)
def test_of_one_users_requests_only_a_short_one_that_goes_first_is_waited_for(
    stepping_s: float, is_first: bool, is_held: bool
) -> None:
    """One request waits with a forward of a second, while the other is in its scheduler step."""
    play = Play("fair", [])
    queue, seats = play.queue, []
    for _ in range(2):
        seats.append(queue.join(Demand(of("one"))))
        play.now += 0.01  # of equal requests the first to come goes first
    stepping, waiting = seats if is_first else reversed(seats)

    def run(seat: Seat, signature: str, takes_s: float) -> None:
        queue.submit(seat, seat, signature=signature, tokens=1)
        batch = queue.take()
        play.now += takes_s
        queue.finish(batch.id, batch.payloads)
        play.now += 1.0  # nothing is held for a step that began so long ago

    for _ in range(8):  # until the queue has measured how long they take
        run(waiting, "long", 1.0)
        run(stepping, "stepping", stepping_s)
    play.now -= 1.0
    queue.submit(waiting, waiting, signature="long", tokens=1)
    assert (queue._next_batch().forwards == []) is is_held
    play.now += 0.2
    assert [forward.seat for forward in queue._next_batch().forwards] == [waiting], "but not for long"


def test_shares_meet_in_a_batch_that_has_no_room_for_all() -> None:
    load = [Asked(0.0, 4, qos=of(share)) for share in "aaaaaaaab"]
    first = defaultdict(int)
    play = Play("fair", load, at_work=16, batch=4).run()
    for asked in play.ran[:8]:
        first[asked.qos.share] += 1
    assert first["b"] == 2, "one in each micro-batch"


# A request's demand


def request(**fields: Any) -> GenerationRequest:
    defaults: dict[str, Any] = {"num_inference_steps": 10, "width": 1024, "height": 1024, "num_frames": 1}
    prompt = Prompt("a cat", None, is_guided=False)
    own = {"guidance_scale": 3.5, "true_cfg_scale": None, "seed": 0, "output_format": "png"}
    return GenerationRequest(prompt, **defaults | own | {"output_compression": 100, "fps": 8} | fields)


def test_steps_are_of_one_kind_whatever_the_seed_the_texts_and_their_number() -> None:
    one = Demand.of(request(), DEFAULT_QOS)
    same = [request(seed=7), request(num_inference_steps=50), replace(request(), prompt=Prompt("a", None, False))]
    assert {Demand.of(each, DEFAULT_QOS).kind for each in same} == {one.kind}
    other = [request(width=512), request(num_frames=5), request(step_cache=StepCacheConfig()), request(model="m")]
    assert len({Demand.of(each, DEFAULT_QOS).kind for each in other} | {one.kind}) == 5
    assert one.megapixels == pytest.approx(1.05, abs=0.01)


def test_what_draws_a_picture_anew_has_fewer_steps_to_do() -> None:
    asked = Demand.of(request(strength=0.25), DEFAULT_QOS)
    assert (asked.num_steps, asked.num_own_steps) == (10, 3)
    assert Demand.of(request(), DEFAULT_QOS).num_own_steps == 10


def test_a_first_step_that_compiles_is_not_what_a_step_takes() -> None:
    timings = Timings(s_per_size=1.0)
    assert timings.guess("x", size=2.0) == 2.0
    for took_s in (60.0, 0.1, 0.1):
        timings.note("x", took_s, size=2.0)
        assert timings.known("x") is None
    timings.note("x", 0.1, size=2.0)
    assert timings.known("x") == 0.1
    assert timings.guess("y", size=4.0) == pytest.approx(0.2), "by its size"

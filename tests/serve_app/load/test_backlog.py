"""Tests of how long requests are expected to take, given what earlier ones took, on a simulated clock."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack

import pytest

from deployments.answers import Denoised, ForwardCounts, Media
from deployments.options.qos import Qos
from deployments.request import GenerationRequest, Prompt
from serve_app.errors import DeadlineUnmeetable, Overloaded
from serve_app.flow.events import Picture
from serve_app.load.backlog import HEADROOM, NO_LOAD, Backlog, Load, Taken
from serve_app.load.picture_times import FORGET_S, MAX_SIZES, PictureTimes

STEPS = 10
REQUEST = GenerationRequest(
    prompt=Prompt("a cat", None, False),
    width=64,
    height=64,
    num_frames=1,
    num_inference_steps=STEPS,
    guidance_scale=None,
    true_cfg_scale=None,
    seed=0,
    output_format="png",
    output_compression=100,
    fps=1,
)


def of_size(width: int, num_steps: int = STEPS) -> GenerationRequest:
    return dataclasses.replace(REQUEST, width=width, num_inference_steps=num_steps)


def picture(request: GenerationRequest, denoise_s: float, wake_s: float = 0.0) -> Picture:
    denoised = Denoised(0.0, 0.0, 0.0, denoise_s * 1e3, ForwardCounts(STEPS, STEPS))
    return Picture(Media(b"", "image/png", 0.0), request, denoised, wake_s * 1e3)


class Machine:
    """A machine that shares its time equally among all images in progress."""

    def __init__(self, others: Load = NO_LOAD) -> None:
        self.now, self.others = 0.0, others
        self.backlog = Backlog(lambda: self.others, lambda: self.now)

    def draw(self, *requests: GenerationRequest, work_s: float = 1.0, wake_s: float = 0.0) -> float:
        """Draws requests together, each of which would take work_s alone. Returns how long they took."""
        began = self.now
        with self.backlog.taken(requests) as taken:
            share = len(requests) + self.others.num_pictures
            self.now += work_s * share + wake_s
            for i, request in enumerate(requests):
                taken.done(i, picture(request, work_s * share, wake_s))
        return self.now - began


@pytest.fixture
def machine() -> Machine:
    return Machine()


def rejection(backlog: Backlog, requests: Sequence[GenerationRequest], timeout_s: float) -> DeadlineUnmeetable:
    with pytest.raises(DeadlineUnmeetable) as refused:
        backlog.check(requests, timeout_s)
    return refused.value


def test_before_anything_is_measured_everything_is_taken(machine: Machine) -> None:
    with machine.backlog.taken([REQUEST] * 10):
        machine.backlog.check([REQUEST], 0.001, max_queue_s=0.001)
    assert machine.backlog.place_free_s() is None


@pytest.mark.parametrize("num_together", [1, 2, 7])
def test_the_work_of_a_picture_is_what_it_took_over_how_many_shared_the_time(
    machine: Machine, num_together: int
) -> None:
    machine.draw(*[REQUEST] * num_together, work_s=2.0)
    with machine.backlog.taken([REQUEST]):
        assert machine.backlog.load == Load(1, pytest.approx(2.0))


def test_pictures_of_other_ingresses_share_the_time_too() -> None:
    machine = Machine(Load(3, 6.0))
    machine.draw(REQUEST, work_s=2.0)
    with machine.backlog.taken([REQUEST]):
        assert machine.backlog.load.work_s == pytest.approx(2.0)
        assert machine.backlog.queue_s == pytest.approx(8.0)


def test_other_ingresses_likely_have_as_much_as_this_one_since_they_were_heard() -> None:
    """Serve spreads requests evenly, so other ingresses are assumed to have as much work as this one. How long an
    image took is computed from what they last reported."""
    machine = Machine(Load(0, 0.0, num_ingresses=2))
    machine.draw(REQUEST, work_s=2.0)
    with machine.backlog.taken([REQUEST] * 3):
        assert machine.backlog.load.work_s == pytest.approx(6.0)
        assert machine.backlog.queue_s == pytest.approx(18.0)
        rejection(machine.backlog, [REQUEST], 20.0)
        machine.backlog.check([REQUEST], 20.0 / HEADROOM)


def test_pictures_that_miss_their_deadlines_tell_how_slow_it_has_become(machine: Machine) -> None:
    machine.draw(REQUEST)
    for _ in range(20):
        with machine.backlog.taken([REQUEST] * 4):
            machine.now += 12.0
    with machine.backlog.taken([REQUEST]):
        assert 2.5 < machine.backlog.load.work_s <= 3.0


def test_where_all_miss_their_deadlines_from_the_first_on_it_is_measured_all_the_same(machine: Machine) -> None:
    with machine.backlog.taken([REQUEST] * 60):
        machine.now += 6.0
    with machine.backlog.taken([REQUEST] * 60):
        rejection(machine.backlog, [REQUEST], 6.0)


def test_a_lone_request_that_meets_a_loss_makes_nobody_be_refused(machine: Machine) -> None:
    machine.draw(REQUEST)
    with machine.backlog.taken([REQUEST]):
        machine.now += 600.0
    machine.backlog.check([REQUEST], 5.0)


def test_a_client_that_leaves_early_tells_nothing(machine: Machine) -> None:
    machine.draw(REQUEST)
    with machine.backlog.taken([REQUEST]):
        machine.now += 0.5
    with machine.backlog.taken([REQUEST]):
        assert machine.backlog.load.work_s == pytest.approx(1.0)


def test_what_a_model_that_slept_took_to_wake_is_no_work(machine: Machine) -> None:
    machine.draw(REQUEST, work_s=1.0, wake_s=50.0)
    with machine.backlog.taken([REQUEST]):
        assert machine.backlog.load.work_s == pytest.approx(1.0)


def test_a_request_is_taken_as_long_as_its_deadline_can_be_met(machine: Machine) -> None:
    """Each request shares the time with all requests before it."""
    machine.draw(REQUEST)
    with ExitStack() as stack:
        for num in range(1, 8):
            assert num <= 10 * HEADROOM
            machine.backlog.check([REQUEST], 10.0)
            stack.enter_context(machine.backlog.taken([REQUEST]))
        stack.enter_context(machine.backlog.taken([REQUEST]))
        refused = rejection(machine.backlog, [REQUEST], 10.0)
    assert refused.status == 429
    assert refused.code == "deadline_unmeetable"
    assert refused.headers() == {"Retry-After": "1"}
    machine.backlog.check([REQUEST], 10.0)


def test_retry_after_is_when_enough_is_done_for_the_deadline(machine: Machine) -> None:
    machine.draw(REQUEST)
    with machine.backlog.taken([REQUEST] * 30):
        refused = rejection(machine.backlog, [REQUEST], 10.0)
    assert refused.wait_s == pytest.approx(31 - 10 * HEADROOM)


def test_a_request_that_alone_takes_too_long_is_told_so(machine: Machine) -> None:
    machine.draw(REQUEST, work_s=10.0)
    assert "alone takes about 10 s" in str(rejection(machine.backlog, [REQUEST], 9.0))
    machine.backlog.check([REQUEST], 11.0)


def test_a_small_request_is_not_refused_for_a_long_one(machine: Machine) -> None:
    """The small request gets its share of the time from its first step on."""
    long = of_size(64, 10_000)
    machine.draw(REQUEST)
    with machine.backlog.taken([long]):
        machine.backlog.check([REQUEST], 3.0)
        rejection(machine.backlog, [REQUEST], 2.0)


def test_steps_are_told_apart_from_the_rest(machine: Machine) -> None:
    """The time for encoding and decoding does not grow with the number of steps."""
    one = of_size(64, 1)
    with machine.backlog.taken([one]) as taken:
        machine.now += 1.0
        taken.done(0, picture(one, denoise_s=0.01))
    machine.backlog.check([of_size(64, 100)], 2.1)


def test_a_size_that_was_never_measured_is_taken_and_counts_by_its_pixels(machine: Machine) -> None:
    machine.draw(REQUEST)
    machine.backlog.check([of_size(640)], 0.001)
    with machine.backlog.taken([of_size(640)]):
        assert machine.backlog.load.work_s == pytest.approx(10.0)


def test_what_was_measured_long_ago_refuses_nobody(machine: Machine) -> None:
    machine.draw(REQUEST, work_s=10.0)
    rejection(machine.backlog, [REQUEST], 5.0)
    machine.now += FORGET_S + 1
    machine.backlog.check([REQUEST], 5.0)


def test_more_work_than_may_be_ahead_is_an_overload(machine: Machine) -> None:
    machine.draw(REQUEST)
    with machine.backlog.taken([REQUEST] * 12):
        machine.backlog.check([REQUEST], 600.0, max_queue_s=12.5)
        with pytest.raises(Overloaded) as refused:
            machine.backlog.check([REQUEST], 600.0, max_queue_s=5.0)
    assert refused.value.code == "overloaded"
    assert refused.value.wait_s == pytest.approx(7.0)


def test_a_place_is_free_when_the_first_request_will_have_ended(machine: Machine) -> None:
    machine.draw(REQUEST, work_s=10.0)
    with machine.backlog.taken([REQUEST]), machine.backlog.taken([of_size(64, 100)]):
        assert machine.backlog.place_free_s() == pytest.approx(10.0)
        machine.now += 4.0
        assert machine.backlog.place_free_s() == pytest.approx(6.0)
        machine.now += 40.0
        assert machine.backlog.place_free_s() == 0.0


def test_a_request_that_is_given_up_leaves_nothing_behind(machine: Machine) -> None:
    def give_up() -> None:
        with machine.backlog.taken([REQUEST] * 3):
            machine.now += 1.0
            raise KeyError

    with pytest.raises(KeyError):
        give_up()
    assert machine.backlog.load == Load()


def test_a_picture_that_is_told_twice_counts_once(machine: Machine) -> None:
    def tell(taken: Taken) -> None:
        taken.done(0, picture(REQUEST, 1.0))

    with machine.backlog.taken([REQUEST, REQUEST]) as taken:
        machine.now += 1.0
        tell(taken)
        tell(taken)
        assert machine.backlog.load.num_pictures == 1


@pytest.mark.parametrize(("wait_s", "told"), [(None, "5"), (0.0, "1"), (0.2, "1"), (7.1, "8"), (1e9, "300")])
def test_retry_after_is_whole_seconds_within_bounds(wait_s: float | None, told: str) -> None:
    assert Overloaded("too many", wait_s).headers() == {"Retry-After": told}


def test_no_client_makes_what_is_known_grow() -> None:
    times = PictureTimes()
    for width in range(8, 8 * (2 * MAX_SIZES), 8):
        times.note(of_size(width), took_s=1.0, denoise_s=1.0, num_sharing=1.0, now=0.0)
    known = [times.known_s(of_size(width), 0.0) is not None for width in range(8, 8 * (2 * MAX_SIZES), 8)]
    assert sum(known) == MAX_SIZES


CROWD, ONE = Qos(share="crowd"), Qos(share="one")


def test_one_waits_for_no_more_of_a_crowd_than_for_itself(machine: Machine) -> None:
    machine.draw(REQUEST)
    with machine.backlog.taken([REQUEST] * 50, CROWD):
        machine.backlog.check([REQUEST], 2.0 / HEADROOM, qos=ONE)
        machine.backlog.check([REQUEST], 9.0, max_queue_s=1.0, qos=ONE)
        with pytest.raises(DeadlineUnmeetable):
            machine.backlog.check([REQUEST], 2.0 / HEADROOM, qos=CROWD)
        with pytest.raises(Overloaded):
            machine.backlog.check([REQUEST], 9.0, max_queue_s=49.0, qos=CROWD)


def test_the_crowd_may_be_at_other_ingresses() -> None:
    machine = Machine()
    machine.draw(REQUEST)
    machine.others = Load(50, 50.0, by_party={("normal", "crowd"): 50.0})
    machine.backlog.check([REQUEST], 2.0 / HEADROOM, qos=ONE)
    with pytest.raises(DeadlineUnmeetable):
        machine.backlog.check([REQUEST], 2.0 / HEADROOM, qos=CROWD)


def test_who_is_in_a_higher_class_waits_for_a_part_of_that(machine: Machine) -> None:
    machine.draw(REQUEST)
    with machine.backlog.taken([REQUEST] * 50, CROWD):
        machine.backlog.check([REQUEST], 1.25 / HEADROOM, qos=Qos("high", "one"))
        low = Qos("low", "one")
        machine.backlog.check([REQUEST], 5.0 / HEADROOM, qos=low)
        with pytest.raises(DeadlineUnmeetable):
            machine.backlog.check([REQUEST], 4.9 / HEADROOM, qos=low)


def test_ones_own_requests_and_as_much_of_others_are_ahead(machine: Machine) -> None:
    """3 s of its own, and of the crowd as much as these and the new request take: 4 s."""
    machine.draw(REQUEST)
    with machine.backlog.taken([REQUEST] * 50, CROWD), machine.backlog.taken([REQUEST] * 3, ONE):
        machine.backlog.check([REQUEST], 100.0, max_queue_s=7.01, qos=ONE)
        with pytest.raises(Overloaded) as refused:
            machine.backlog.check([REQUEST], 100.0, max_queue_s=6.0, qos=ONE)
    assert refused.value.wait_s == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("work_s", "elsewhere", "expected_s"),
    [(1.0, Load(1, 100.0), 2.0), (10.0, Load(10, 10.0), 20.0)],
    ids=["a short one beside a long one", "a long one beside short ones"],
)
def test_of_a_request_elsewhere_as_much_passes_as_this_one_takes(
    machine: Machine, work_s: float, elsewhere: Load, expected_s: float
) -> None:
    machine.draw(REQUEST, work_s=work_s)
    machine.others = elsewhere
    machine.backlog.check([REQUEST], 1.01 * expected_s / HEADROOM)
    rejection(machine.backlog, [REQUEST], 0.99 * expected_s / HEADROOM)


def test_loads_of_ingresses_add_up() -> None:
    crowd, one = ("normal", "crowd"), ("normal", "one")
    total = Load(1, 2.0, 1, {crowd: 2.0}) + Load(3, 4.0, 2, {crowd: 1.0, one: 3.0})
    assert (total.num_pictures, total.work_s, total.num_ingresses) == (4, 6.0, 3)
    assert total.by_party == {crowd: 3.0, one: 3.0}

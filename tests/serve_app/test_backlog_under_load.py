"""Tests, on a simulated clock, of two ingresses that share one machine and refuse requests by measured times."""

import random
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from serve_app.errors import DeadlineUnmeetable
from serve_app.load.backlog import NO_LOAD, Backlog, Taken
from tests.serve_app.load.test_backlog import REQUEST, picture

pytestmark = pytest.mark.slow

TICK_S = 0.02
WORK_S = 0.4
"""What one image takes alone."""
TOLD_EVERY_S = 1.0
"""Interval at which the ingresses tell each other their load."""
WARM_S, SPAN_S = 60.0, 240.0


@dataclass
class Drawing:
    taken: Taken
    stack: ExitStack
    began_s: float
    left_s: float = WORK_S


class Simulation:
    """Requests arrive at random; all that are accepted get the same share of the machine."""

    def __init__(self, per_s: float, deadline_s: float, slower_from_s: float = float("inf")) -> None:
        self.now, self._deadline_s, self._per_s = 0.0, deadline_s, per_s
        self._slower_from_s = slower_from_s
        self._heard = [NO_LOAD, NO_LOAD]
        self._ingresses = [Backlog(lambda i=i: self._heard[i], lambda: self.now) for i in range(2)]  # type: ignore[misc]
        self._drawings: list[Drawing] = []
        self._chance = random.Random(0)
        self.num_in_time = self.num_late = self.num_refused = 0

    def run(self, until_s: float) -> None:
        while self.now < until_s:
            before, self.now = self.now, self.now + TICK_S
            if before // TOLD_EVERY_S != self.now // TOLD_EVERY_S:
                self._heard = [each.load for each in reversed(self._ingresses)]
            self._draw()
            if self._chance.random() < self._per_s * TICK_S:
                self._come(self._chance.choice(self._ingresses))

    def _draw(self) -> None:
        speed = 0.5 if self.now >= self._slower_from_s else 1.0
        share = speed * TICK_S / max(1, len(self._drawings))
        for drawing in list(self._drawings):
            drawing.left_s -= share
            took_s = self.now - drawing.began_s
            if drawing.left_s <= 0:
                drawing.taken.done(0, picture(REQUEST, took_s))
            if drawing.left_s <= 0 or took_s > self._deadline_s:
                self._drawings.remove(drawing)
                drawing.stack.close()
                self.num_in_time += took_s <= self._deadline_s
                self.num_late += took_s > self._deadline_s

    def _come(self, ingress: Backlog) -> None:
        try:
            ingress.check([REQUEST], self._deadline_s)
        except DeadlineUnmeetable:
            self.num_refused += 1
            return
        stack = ExitStack()
        self._drawings.append(Drawing(stack.enter_context(ingress.taken([REQUEST])), stack, self.now))


@pytest.mark.parametrize("in_line", [4, 12, 40])
def test_at_five_times_the_capacity_nearly_all_of_it_ends_within_the_deadline(in_line: int) -> None:
    """in_line: number of images that a deadline leaves time for."""
    simulation = Simulation(per_s=5 / WORK_S, deadline_s=in_line * WORK_S)
    warm_s = 8 * in_line * WORK_S
    simulation.run(warm_s)
    before = simulation.num_in_time, simulation.num_late
    simulation.run(warm_s + SPAN_S)
    in_time, late = simulation.num_in_time - before[0], simulation.num_late - before[1]
    assert in_time >= 0.9 * SPAN_S / WORK_S
    assert late <= 0.01 * (in_time + late)


def test_a_machine_that_becomes_half_as_fast_is_noticed() -> None:
    simulation = Simulation(per_s=5 / WORK_S, deadline_s=12 * WORK_S, slower_from_s=WARM_S)
    simulation.run(2 * WARM_S)
    before = simulation.num_in_time
    simulation.run(2 * WARM_S + SPAN_S)
    assert simulation.num_in_time - before >= 0.9 * SPAN_S / (2 * WORK_S)


def test_below_the_capacity_nobody_is_refused() -> None:
    simulation = Simulation(per_s=0.5 / WORK_S, deadline_s=12 * WORK_S)
    simulation.run(WARM_S + SPAN_S)
    assert simulation.num_late == 0
    assert simulation.num_refused <= 0.01 * simulation.num_in_time

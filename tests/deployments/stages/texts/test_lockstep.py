"""Calls in lockstep: they run one at a time, and their questions are answered together."""

from collections.abc import Sequence
from typing import Any

from deployments.stages.texts.lockstep import Ask, run_in_step


def adding(first: int, num_questions: int, seen: list[int]) -> Any:
    """Returns a call that asks for num_questions successors of a number, one after another."""

    def call(ask: Ask) -> int:
        value = first
        for _ in range(num_questions):
            seen.append(value)
            value = ask(value)
        return value

    return call


def test_questions_of_all_calls_are_answered_together_until_each_has_ended() -> None:
    asked: list[list[int]] = []

    def answer(questions: Sequence[int]) -> list[int]:
        asked.append(list(questions))
        return [question + 1 for question in questions]

    seen: list[int] = []
    assert run_in_step([adding(0, 1, seen), adding(10, 3, seen), adding(20, 2, seen)], answer) == [1, 13, 22]
    assert asked == [[0, 10, 20], [11, 21], [12]]
    assert seen == [0, 10, 20, 11, 21, 12]  # each in its turn, never two at once


def test_a_call_that_fails_takes_nothing_from_the_others() -> None:
    def failing(ask: Ask) -> int:
        raise ValueError(f"not {ask(5)}")

    outcomes = run_in_step([failing, adding(0, 2, [])], lambda questions: [question + 1 for question in questions])
    assert isinstance(outcomes[0], ValueError)
    assert (str(outcomes[0]), outcomes[1]) == ("not 6", 2)


def test_an_answer_that_is_an_exception_is_raised_where_it_was_asked_for() -> None:
    def careful(ask: Ask) -> str:
        try:
            return str(ask(1))
        except KeyError:
            return "caught"

    assert run_in_step([careful, careful], lambda _: [KeyError(), "answered"]) == ["caught", "answered"]

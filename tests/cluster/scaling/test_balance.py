"""Tests of which stage gets the next replica."""

from itertools import count

from cluster.scaling.balance import balance, rate

TIMES = {"encode": 0.25, "denoise": 25.0, "decode": 0.25}


def grown(num_gpus: int, most: dict[str, int], sizes: dict[str, int] | None = None) -> dict[str, int]:
    sizes = sizes or dict.fromkeys(TIMES, 1)
    left = num_gpus - sum(sizes.values())

    def place(stage: str) -> bool:
        nonlocal left
        has_room = left >= sizes[stage]
        left -= sizes[stage] * has_room
        return has_room

    return balance(dict.fromkeys(TIMES, 1), TIMES, most, place)


def test_the_slowest_stage_gets_all_there_is_until_others_are_as_slow() -> None:
    assert grown(50, dict.fromkeys(TIMES, 99)) == {"encode": 1, "denoise": 48, "decode": 1}
    found = grown(306, dict.fromkeys(TIMES, 999))
    assert found == {"encode": 3, "denoise": 300, "decode": 3}
    assert max(rate(found[s], TIMES[s]) for s in TIMES) <= min(rate(found[s] + 1, TIMES[s]) for s in TIMES)


def test_what_a_stage_does_not_want_is_left_for_the_others() -> None:
    assert grown(50, {"encode": 5, "denoise": 4, "decode": 1}) == {"encode": 5, "denoise": 4, "decode": 1}


def test_a_stage_that_finds_no_place_keeps_nobody_else_from_theirs() -> None:
    found = grown(9, dict.fromkeys(TIMES, 3), {"encode": 1, "denoise": 4, "decode": 1})
    assert (found["denoise"], found["encode"] + found["decode"]) == (1, 5)


def test_it_ends_where_there_is_room_for_ever() -> None:
    numbers = count()
    found = balance({"a": 1}, {"a": 1.0}, {"a": 5}, lambda _: next(numbers) >= 0)
    assert found == {"a": 5}

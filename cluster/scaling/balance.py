"""Chooses which stage gets the next replica, so that no stage takes resources that a slower one needs. Used by the
planner and by the autoscaler."""

from collections.abc import Callable, Mapping
from typing import TypeVar

Name = TypeVar("Name")


def balance(
    counts: Mapping[Name, int],
    request_s: Mapping[Name, float],
    most: Mapping[Name, int],
    place: Callable[[Name], bool],
) -> dict[Name, int]:
    """Repeatedly adds a replica to the slowest stage, the one with the least replicas / time, while any stage
    finds room.

    Args:
        counts: replicas that each stage has.
        request_s: seconds that one request takes one replica, per stage.
        most: maximum number of replicas per stage.
        place: reserves the resources of one more replica, and returns whether there was room.
    """
    found = dict(counts)
    growing = [name for name in found if found[name] < most[name]]
    while growing:
        slowest = min(growing, key=lambda name: rate(found[name], request_s[name]))
        is_placed = place(slowest)
        found[slowest] += is_placed
        if not is_placed or found[slowest] >= most[slowest]:
            growing.remove(slowest)
    return found


def rate(num_replicas: int, request_s: float) -> float:
    """Returns how many requests that many replicas can do in a second."""
    return num_replicas / request_s

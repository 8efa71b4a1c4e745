"""The order of calls in a stage with one thread."""

from deployments.options.qos import Qos
from deployments.replica.fair_queue import FairQueue


def taken(queue: FairQueue[str]) -> list[str]:
    return list(iter(queue.take, None))


def test_equal_calls_go_in_the_order_they_came() -> None:
    queue = FairQueue[str]()
    for item in "abcde":
        queue.put(item, Qos(), 1.0)
    assert taken(queue) == list("abcde")
    assert queue.take() is None


def test_one_call_goes_before_the_rest_of_a_crowd() -> None:
    queue = FairQueue[str]()
    for i in range(500):
        queue.put(f"crowd {i}", Qos(share="crowd"), 1.0)
    first = [queue.take() for _ in range(10)]
    assert first == [f"crowd {i}" for i in range(10)]
    queue.put("alone", Qos(share="alone"), 1.0)
    assert "alone" in (queue.take(), queue.take())


def test_shares_have_equal_parts_of_the_work_not_of_the_calls() -> None:
    queue = FairQueue[str]()
    for _ in range(8):
        queue.put("video", Qos(share="video"), 8.0)
    for _ in range(32):
        queue.put("image", Qos(share="image"), 1.0)
    first = [queue.take() for _ in range(18)]
    assert first.count("image") in {15, 16}  # two videos take as long as 16 images
    assert first.count("video") in {2, 3}


def test_priorities_have_their_weights_and_none_starves() -> None:
    queue = FairQueue[str]()
    for _ in range(210):
        for priority in ("low", "normal", "high"):
            queue.put(priority, Qos(priority=priority), 1.0)  # type: ignore[arg-type]
    first = [queue.take() for _ in range(210)]
    assert [first.count(priority) for priority in ("high", "normal", "low")] == [160, 40, 10]


def test_of_one_share_the_earliest_deadline_goes_first() -> None:
    queue = FairQueue[str]()
    queue.put("whenever", Qos(), 1.0)
    queue.put("later", Qos(deadline_s=60.0), 1.0)
    queue.put("soon", Qos(deadline_s=30.0, waited_s=20.0), 1.0)
    queue.put("not so soon", Qos(deadline_s=30.0), 1.0)
    assert taken(queue) == ["soon", "not so soon", "later", "whenever"]

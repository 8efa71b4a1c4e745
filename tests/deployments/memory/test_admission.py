"""Admission by memory: what calls need, what fits, and what is refused."""

import pickle
from collections.abc import Callable

import pytest
import torch

from deployments.errors import ExceedsMemory, OutOfDeviceMemory
from deployments.memory.admission import MemoryAdmission, MemoryEstimate, Retained
from deployments.memory.limit import Limit
from deployments.memory.stats import MemoryEstimateStats

CPU = torch.device("cpu")


def never() -> tuple[int, int]:
    raise AssertionError("nothing is to be estimated")


def estimate(weights_bytes: int, working_bytes: int) -> Callable[[], tuple[int, int]]:
    return lambda: (weights_bytes, working_bytes)


def test_without_a_limit_nothing_is_estimated_and_nothing_refused() -> None:
    admission = MemoryAdmission(None, CPU)
    assert admission.max_admissible("x", "a forward", never) is None
    with admission.measured("x"):
        pass
    assert admission.stats() == ()


@pytest.mark.parametrize(("limit_bytes", "num_admitted"), [(110, 1), (129, 2), (130, 3), (10_000, 8)])
def test_as_many_calls_fit_as_their_tensors_leave_room_for(limit_bytes: int, num_admitted: int) -> None:
    admission = MemoryAdmission(Limit(limit_bytes, False, ""), CPU)
    assert admission.max_admissible("x", "a forward", estimate(100, 10), up_to=8) == num_admitted


def test_a_call_that_does_not_fit_alone_is_refused_with_figures_and_again_the_next_time() -> None:
    admission = MemoryAdmission(Limit(3 * 2**30, True, "num_gpus: 0.25"), CPU)
    for _ in range(2):
        with pytest.raises(ExceedsMemory) as refused:
            admission.max_admissible("x", "decoding 64x64", estimate(2**30, 3 * 2**30))
    assert refused.value.message == (
        "decoding 64x64 needs 4 GiB (1 GiB of it weights), but the stage has 3 GiB (num_gpus: 0.25): ask for less"
    )
    assert pickle.loads(pickle.dumps(refused.value)).message == refused.value.message


@pytest.mark.parametrize(("retained_bytes", "num_admitted"), [(0, 3), (9, 2), (29, 1), (1000, 1)])
def test_what_requests_keep_leaves_less_room_to_merge_and_one_always_goes(
    retained_bytes: int, num_admitted: int
) -> None:
    admission = MemoryAdmission(Limit(130, False, ""), CPU)
    retained = Retained(own=0, all=retained_bytes)
    assert (
        admission.max_admissible("x", "a forward", estimate(100, 10), up_to=8, retained=retained) == num_admitted
    )


def test_a_step_cache_that_does_not_fit_beside_its_own_forward_is_refused() -> None:
    admission = MemoryAdmission(Limit(3 * 2**30, True, "num_gpus: 0.25"), CPU)
    with pytest.raises(
        ExceedsMemory, match=r"\(1 GiB of it weights\), and 1 GiB for its step cache, but the stage has 3 GiB"
    ):
        admission.max_admissible(
            "x", "a forward", estimate(2**30, 3 * 2**29), retained=Retained(own=2**30, all=2**30)
        )


def test_a_kind_is_estimated_once() -> None:
    admission = MemoryAdmission(Limit(200, False, ""), CPU)
    admission.max_admissible("x", "a forward", estimate(100, 10))
    assert admission.max_admissible("x", "a forward", never) == 1
    assert admission.stats() == (MemoryEstimateStats("a forward", 1, 110, is_measured=False),)


def test_what_was_measured_counts_and_more_is_told_from_the_nearest_below() -> None:
    estimate = MemoryEstimate("a forward", 100, 10, measured={1: 150, 4: 170})
    assert [estimate.num_bytes(number) for number in (1, 2, 4, 6)] == [150, 160, 170, 190]
    assert estimate.stats() == (
        MemoryEstimateStats("a forward", 1, 150, True),
        MemoryEstimateStats("a forward", 4, 170, True),
    )


def test_what_torch_needs_besides_counts_until_it_is_part_of_a_measurement() -> None:
    estimate = MemoryEstimate("a forward", 100, 10, reserve_bytes=5)
    assert estimate.num_bytes(2) == 125
    estimate.measured[1] = 111
    assert estimate.num_bytes(2) == 121


def test_so_many_calls_as_ran_out_of_memory_are_not_merged_again() -> None:
    admission = MemoryAdmission(Limit(2**40, False, ""), CPU)
    assert admission.max_admissible("x", "a call", estimate(0, 1), up_to=8) == 8
    with pytest.raises(OutOfDeviceMemory), admission.measured("x", 4):
        raise OutOfDeviceMemory("as a stage's share names it")
    assert admission.max_admissible("x", "a call", never, up_to=8) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_peak_of_a_call_replaces_what_was_estimated() -> None:
    device = torch.device("cuda")
    admission = MemoryAdmission(Limit(2**40, False, ""), device)
    before = torch.cuda.memory_allocated()
    admission.max_admissible("x", "a call", estimate(0, 1))
    with admission.measured("x"):
        torch.empty(2**26, dtype=torch.uint8, device=device)
    assert [(estimate.num_bytes - before, estimate.is_measured) for estimate in admission.stats()] == [
        (2**26, True)
    ]
    with admission.measured("x"):
        pass
    assert admission.peaks()[0] >= before + 2**26, "of the process, not of the latest call"

"""What calls need, what fits, and what is refused."""

import pickle
from collections.abc import Callable

import pytest
import torch

from deployments.memory.limit import Limit
from deployments.memory.needs import Kept, Need, Needs
from deployments.refusal import NeverFits, OutOfShare
from deployments.stats import NeedStats

CPU = torch.device("cpu")


def never() -> tuple[int, int]:
    raise AssertionError("nothing is to be foreseen")


def foresee(weights_bytes: int, working_bytes: int) -> Callable[[], tuple[int, int]]:
    return lambda: (weights_bytes, working_bytes)


def test_without_a_limit_nothing_is_foreseen_and_nothing_refused() -> None:
    needs = Needs(None, CPU)
    assert needs.at_most("x", "a forward", never) is None
    with needs.measured("x"):
        pass
    assert needs.stats() == ()


@pytest.mark.parametrize(("limit_bytes", "at_most"), [(110, 1), (129, 2), (130, 3), (10_000, 8)])
def test_as_many_calls_fit_as_their_tensors_leave_room_for(limit_bytes: int, at_most: int) -> None:
    needs = Needs(Limit(limit_bytes, False, ""), CPU)
    assert needs.at_most("x", "a forward", foresee(100, 10), up_to=8) == at_most


def test_a_call_that_does_not_fit_alone_is_refused_with_figures_and_again_the_next_time() -> None:
    needs = Needs(Limit(3 * 2**30, True, "num_gpus: 0.25"), CPU)
    for _ in range(2):
        with pytest.raises(NeverFits) as refused:
            needs.at_most("x", "decoding 64x64", foresee(2**30, 3 * 2**30))
    assert refused.value.message == (
        "decoding 64x64 needs 4 GiB, 1 GiB of it weights, and the stage has 3 GiB (num_gpus: 0.25): ask for less"
    )
    assert pickle.loads(pickle.dumps(refused.value)).message == refused.value.message


@pytest.mark.parametrize(("kept_bytes", "at_most"), [(0, 3), (9, 2), (29, 1), (1000, 1)])
def test_what_requests_keep_leaves_less_room_to_merge_and_one_always_goes(kept_bytes: int, at_most: int) -> None:
    needs = Needs(Limit(130, False, ""), CPU)
    kept = Kept(own=0, all=kept_bytes)
    assert needs.at_most("x", "a forward", foresee(100, 10), up_to=8, kept=kept) == at_most


def test_a_step_cache_that_does_not_fit_beside_its_own_forward_is_refused() -> None:
    needs = Needs(Limit(3 * 2**30, True, "num_gpus: 0.25"), CPU)
    with pytest.raises(
        NeverFits, match="1 GiB of it weights, and 1 GiB for its step cache, and the stage has 3 GiB"
    ):
        needs.at_most("x", "a forward", foresee(2**30, 3 * 2**29), kept=Kept(own=2**30, all=2**30))


def test_a_kind_is_foreseen_once() -> None:
    needs = Needs(Limit(200, False, ""), CPU)
    needs.at_most("x", "a forward", foresee(100, 10))
    assert needs.at_most("x", "a forward", never) == 1
    assert needs.stats() == (NeedStats("a forward", 1, 110, is_measured=False),)


def test_what_was_measured_counts_and_more_is_told_from_the_nearest_below() -> None:
    need = Need("a forward", 100, 10, measured={1: 150, 4: 170})
    assert [need.num_bytes(number) for number in (1, 2, 4, 6)] == [150, 160, 170, 190]
    assert need.stats() == (NeedStats("a forward", 1, 150, True), NeedStats("a forward", 4, 170, True))


def test_what_torch_needs_besides_counts_until_it_is_part_of_a_measurement() -> None:
    need = Need("a forward", 100, 10, reserve_bytes=5)
    assert need.num_bytes(2) == 125
    need.measured[1] = 111
    assert need.num_bytes(2) == 121


def test_so_many_calls_as_ran_out_of_memory_are_not_merged_again() -> None:
    needs = Needs(Limit(2**40, False, ""), CPU)
    assert needs.at_most("x", "a call", foresee(0, 1), up_to=8) == 8
    with pytest.raises(OutOfShare), needs.measured("x", 4):
        raise OutOfShare("as a stage's share names it")
    assert needs.at_most("x", "a call", never, up_to=8) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_peak_of_a_call_replaces_what_was_foreseen() -> None:
    device = torch.device("cuda")
    needs = Needs(Limit(2**40, False, ""), device)
    before = torch.cuda.memory_allocated()
    needs.at_most("x", "a call", foresee(0, 1))
    with needs.measured("x"):
        torch.empty(2**26, dtype=torch.uint8, device=device)
    assert [(need.num_bytes - before, need.is_measured) for need in needs.stats()] == [(2**26, True)]
    with needs.measured("x"):
        pass
    assert needs.peaks()[0] >= before + 2**26, "of the process, not of the latest call"

"""A process's share of a GPU, and what happens to a process that takes more."""

import weakref

import pytest
import torch

from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.errors import OutOfDeviceMemory
from deployments.memory.limit import CONTEXT_BYTES, OTHERS_SHARING, OVERHEAD_BYTES, Limit, plan_limit
from deployments.memory.share import OUT_OF_MEMORY, Share, take_share

GIB = 2**30
CARD = 16 * GIB


def planned(config: StageConfig, total_bytes: int | None) -> Limit:
    limit = plan_limit(config, total_bytes)
    assert limit is not None
    return limit


def test_a_fraction_is_that_of_the_card_less_what_torch_does_not_see_and_is_capped() -> None:
    limit = planned(StageConfig(num_gpus=0.25), CARD)
    assert (limit.num_bytes, limit.is_capped) == (4 * GIB - CONTEXT_BYTES, True)


def test_who_has_a_whole_gpu_has_all_of_it_without_a_cap() -> None:
    limit = planned(StageConfig(num_gpus=1), CARD)
    assert (limit.num_bytes, limit.is_capped) == (CARD - CONTEXT_BYTES, False)


def test_who_has_a_gpu_by_turns_has_all_but_what_the_other_stages_keep_there() -> None:
    limit = planned(StageConfig.model_validate({"num_gpus": 0.25, "time_sharing": True}), CARD)
    others = OTHERS_SHARING * OVERHEAD_BYTES
    assert (limit.num_bytes, limit.is_capped) == (CARD - CONTEXT_BYTES - others, False)


@pytest.mark.parametrize("total_bytes", [None, CARD])
def test_what_the_config_says_counts_and_is_capped_on_a_gpu(total_bytes: int | None) -> None:
    limit = planned(StageConfig(num_gpus=0.25, memory_limit_gib=2), total_bytes)
    assert (limit.num_bytes, limit.is_capped) == (2 * GIB, total_bytes is not None)


@pytest.mark.parametrize(
    ("config", "total_bytes"),
    [
        (StageConfig(), None),
        (StageConfig(num_gpus=2), CARD),
        (TransformerConfig(num_gpus=1, device_map="auto"), CARD),
    ],
)
def test_nothing_limits_the_cpu_or_who_has_several_gpus(config: StageConfig, total_bytes: int | None) -> None:
    assert plan_limit(config, total_bytes) is None


def test_out_of_memory_is_told_with_the_share_and_what_to_do() -> None:
    share = Share(plan_limit(StageConfig(num_gpus=0.25), CARD))
    with (
        pytest.raises(OutOfDeviceMemory, match=r"3\.55 GiB \(num_gpus: 0\.25 of 16 GiB.*smaller size.*told so"),
        share.translating_oom(),
    ):
        raise torch.OutOfMemoryError("told so\nand more")


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_out_of_memory_is_known_by_the_names_that_libraries_give_it(text: str) -> None:
    with pytest.raises(OutOfDeviceMemory), Share().translating_oom():
        raise RuntimeError(f"CUDA error: {text} when calling `cublasCreate(handle)`")


def test_another_error_is_not_taken_for_out_of_memory() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"), Share().translating_oom():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_what_a_call_held_that_ran_out_of_memory_is_free_while_its_error_lives() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def call() -> None:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError

    with pytest.raises(OutOfDeviceMemory) as raised, Share().translating_oom():
        call()
    assert raised.value is not None
    assert held[0]() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_who_takes_more_than_its_share_fails_alone() -> None:
    device = torch.device("cuda")
    share = take_share(StageConfig(num_gpus=0.25, memory_limit_gib=1), device)
    try:
        with pytest.raises(OutOfDeviceMemory), share.translating_oom():
            torch.empty(2 * GIB, dtype=torch.uint8, device=device)
        assert torch.empty(GIB // 2, dtype=torch.uint8, device=device).nbytes == GIB // 2, "the process goes on"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_libraries_that_threads_share_are_loaded_before_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan's scheduler solves equations in each request's thread; torch fails if two threads load its solver."""
    solved: list[str] = []
    solve = torch.linalg.solve

    def noted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        solved.append(left.device.type)
        return solve(left, right)

    monkeypatch.setattr(torch.linalg, "solve", noted)
    take_share(StageConfig(num_gpus=1), torch.device("cuda"))
    assert solved == ["cuda"]

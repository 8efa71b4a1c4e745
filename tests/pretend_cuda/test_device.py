"""The simulated device finds the mistakes that it checks for, and reports nothing else."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.pretend_cuda.install import visible_cards
from tests.pretend_cuda.problems import Problems

pytestmark = pytest.mark.pretended_gpu

GIB = 2**30
NUM_ELEMENTS = 1000


@pytest.fixture
def side() -> torch.cuda.Stream:
    torch.cuda.synchronize()
    return torch.cuda.Stream()


def made_on(stream: torch.Stream) -> torch.Tensor:
    with torch.cuda.stream(stream):
        return torch.ones(NUM_ELEMENTS, device="cuda")


def test_tensors_are_of_the_device_and_results_are_the_cpus() -> None:
    layer, values = torch.nn.Linear(8, 8), torch.randn(4, 8)
    expected = layer(values)
    there = layer.to("cuda")(values.cuda())
    assert (there.device, next(layer.parameters()).is_cuda) == (torch.device("cuda", 0), True)
    assert torch.equal(there.cpu(), expected)


@pytest.mark.parametrize(
    "mix", [torch.add, torch.matmul, lambda one, other: torch.cat([one, other]), torch.nn.functional.linear]
)
@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_tensors_of_two_devices_do_not_mix(mix: Callable[..., torch.Tensor], other: str) -> None:
    with pytest.raises(RuntimeError, match="at least two devices"):
        mix(torch.ones(3, 3, device="cuda:0"), torch.ones(3, 3, device=other))


def test_a_number_may_come_from_the_host() -> None:
    assert (torch.ones(3, device="cuda") * torch.tensor(2.0)).sum().item() == 6


def test_the_host_does_not_reach_into_device_memory() -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        torch.ones(3, device="cuda").numpy()


def test_a_card_has_so_much_memory_and_each_its_own() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    beside = torch.cuda.memory_reserved(1)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        torch.empty(total + 1, dtype=torch.uint8, device="cuda")
    taken = torch.empty(GIB, dtype=torch.uint8, device="cuda:0")
    assert torch.cuda.mem_get_info(1) == (total - beside, total)
    assert torch.cuda.mem_get_info(0)[0] <= total - taken.nbytes


def test_a_process_has_its_cap() -> None:
    torch.cuda.set_per_process_memory_fraction(1 / 16)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_is_counted_while_it_lives_and_kept_until_the_cache_is_emptied() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tensor = torch.zeros(GIB // 64, dtype=torch.uint8, device="cuda")
    assert torch.accelerator.memory_allocated() - before == tensor.nbytes
    held = tensor.nbytes
    del tensor
    assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (before, before + held)
    assert torch.cuda.memory_reserved() >= before + held
    torch.accelerator.empty_cache()
    assert torch.cuda.memory_reserved() == before


def test_a_stream_that_was_not_told_to_wait_is_seen(side: torch.cuda.Stream, problems: Problems) -> None:
    tensor = made_on(side)
    tensor + 1
    [seen] = problems.take()
    assert "of what aten::fill_.Scalar wrote on stream" in seen
    assert seen.endswith("not told to wait")


def test_who_overwrites_what_another_stream_may_still_read_is_seen(
    side: torch.cuda.Stream, problems: Problems
) -> None:
    tensor = made_on(side)
    torch.cuda.current_stream().wait_stream(side)
    tensor + 1
    with torch.cuda.stream(side):
        tensor.zero_()
    [seen] = problems.take()
    assert "may still use" in seen


def test_who_writes_to_new_memory_waits_for_the_stream_that_it_is_of(
    side: torch.cuda.Stream, problems: Problems
) -> None:
    """Earlier work on that stream may still use the memory."""
    torch.ones(3, device="cuda") + 1
    tensor = torch.empty(3, device="cuda")
    with torch.cuda.stream(side):
        tensor.zero_()
    [seen] = problems.take()
    assert "of what empty wrote" in seen


@pytest.mark.xfail(strict=True, raises=pytest.fail.Exception, reason="a problem that nobody takes fails its test")
def test_a_problem_that_nobody_takes_fails_its_test(side: torch.cuda.Stream) -> None:
    made_on(side) + 1


def wait_by_stream(side: torch.cuda.Stream) -> None:
    torch.cuda.current_stream().wait_stream(side)


def wait_by_event(side: torch.cuda.Stream) -> None:
    event = torch.cuda.Event()
    event.record(side)
    torch.cuda.current_stream().wait_event(event)


def wait_by_a_third(side: torch.cuda.Stream) -> None:
    third = torch.Stream("cuda")
    third.wait_stream(side)
    torch.accelerator.current_stream().wait_stream(third)


def wait_on_the_host(side: torch.cuda.Stream) -> None:
    side.synchronize()


@pytest.mark.parametrize("wait", [wait_by_stream, wait_by_event, wait_by_a_third, wait_on_the_host])
def test_who_waits_is_in_order(wait: Callable[[torch.cuda.Stream], None], side: torch.cuda.Stream) -> None:
    tensor = made_on(side)
    wait(side)
    assert (tensor + 1).sum().item() == 2 * NUM_ELEMENTS


def test_an_event_is_of_when_it_was_recorded(side: torch.cuda.Stream, problems: Problems) -> None:
    event = side.record_event()
    tensor = made_on(side)
    torch.cuda.current_stream().wait_event(event)
    tensor + 1
    assert len(problems.take()) == 1


@pytest.mark.parametrize("is_recorded", [True, False])
def test_memory_that_another_stream_may_still_use_is_not_used_again(
    is_recorded: bool, side: torch.cuda.Stream, problems: Problems
) -> None:
    tensor = made_on(side)
    wait_by_stream(side)
    tensor + 1
    if is_recorded:
        tensor.record_stream(torch.cuda.current_stream())
    del tensor
    made_on(side)
    seen = problems.take()
    assert len(seen) == (0 if is_recorded else 1)
    assert all(one.endswith("no record_stream") for one in seen)


def test_a_host_buffer_is_garbage_until_the_copy_into_it_is_done() -> None:
    buffer = torch.zeros(4, dtype=torch.uint8, pin_memory=True)
    buffer.copy_(torch.ones(4, dtype=torch.uint8, device="cuda"), non_blocking=True)
    assert buffer.tolist() == [0xEE] * 4
    torch.cuda.synchronize()
    assert buffer.tolist() == [1] * 4


def test_host_memory_that_changes_under_a_copy_is_seen(problems: Problems) -> None:
    buffer = torch.zeros(4, pin_memory=True)
    copied = buffer.to("cuda", non_blocking=True)
    buffer.fill_(1)
    torch.cuda.synchronize()
    assert problems.take() == ["host memory was changed before the non_blocking copy out of it was done"]
    assert copied.sum().item() == 0


def test_what_is_not_pinned_is_copied_at_once() -> None:
    buffer = torch.zeros(4)
    buffer.copy_(torch.ones(4, device="cuda"), non_blocking=True)
    assert buffer.tolist() == [1] * 4


def test_a_lost_gpu_fails_every_call_for_good() -> None:
    script = """
import torch
from tests.pretend_cuda import install
tensor = torch.ones(3, device="cuda")
install.native.lose()
for call in (lambda: tensor + 1, lambda: torch.ones(1, device="cuda"), torch.cuda.synchronize, tensor.cpu,
             torch.cuda.current_stream().query):
    try:
        call()
    except torch.AcceleratorError as error:
        assert "illegal memory access" in str(error)
    else:
        raise AssertionError("it goes on")
"""
    run_python(script)


def test_a_gpu_is_lost_for_whom_a_file_names(tmp_path: Path) -> None:
    script = """
import os, pathlib, torch
lost = pathlib.Path(os.environ["PRETEND_CUDA_LOST"])
torch.ones(1, device="cuda")
lost.write_text("some" + "body else")
torch.ones(1, device="cuda")
lost.write_text("un" + "lucky")
try:
    torch.ones(1, device="cuda")
except torch.AcceleratorError:
    print("lost")
"""
    assert run_python(script, "the unlucky", PRETEND_CUDA_LOST=str(tmp_path / "lost")) == "lost\n"


@pytest.mark.parametrize(("visible", "cards"), [(None, ["0", "1"]), ("1", ["1"]), ("1,0", ["1", "0"]), ("", [])])
def test_a_process_has_the_cards_that_it_may_see(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, cards: list[str]
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_cards() == cards


def run_python(script: str, *args: str, **environment: str) -> str:
    command = [sys.executable, "-c", script, *args]
    ran = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True)
    return ran.stdout

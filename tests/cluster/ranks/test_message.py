"""Tests of packing and unpacking messages."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.ranks.message import HEADER_BYTES, Header, Message, pack, unpack, when_there_is_room

CPU = torch.device("cpu")
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda grid: grid,
    "transposed": lambda grid: grid.transpose(1, 3),
    "channels last": lambda grid: grid.contiguous(memory_format=torch.channels_last),
    "every second": lambda grid: grid[:, :, ::2],
    "expanded": lambda grid: grid[:1].expand(5, -1, -1, -1),
    "not at its storage's start": lambda grid: grid[1:],
    "zero size": lambda grid: grid[:0],
    "0-dim": lambda grid: grid[1, 2, 3, 4],
}


@dataclass(frozen=True, eq=False)
class Conditioning:
    prompt_embeds: Tensor
    extra: tuple[Any, ...]


class Inexpressible(Exception):
    """Can be pickled but not unpickled: Exception gets one of its two arguments."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


def grid_of(dtype: torch.dtype) -> Tensor:
    """Returns a [2, 3, 4, 6] tensor of random bits, which include NaNs."""
    high = 2 if dtype is torch.bool else 256
    noise = torch.randint(0, high, (144 * dtype.itemsize,), generator=torch.Generator().manual_seed(0))
    return noise.to(torch.uint8).view(dtype).view(2, 3, 4, 6)


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def there(body: Any) -> Any:
    message = unpack(pack(Message(7, body), CPU), CPU)
    assert message.error is None
    return message.body


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_arrives_whatever_the_dtype_and_layout(dtype: torch.dtype, layout: str) -> None:
    tensor = LAYOUTS[layout](grid_of(dtype))
    arrived = there(tensor)
    assert (arrived.dtype, arrived.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(bits_of(arrived), bits_of(tensor))


def test_a_dense_layout_is_kept_so_that_kernels_choose_alike() -> None:
    image = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert there(image).stride() == image.stride()


def test_tensors_arrive_in_the_nest_they_were_sent_in() -> None:
    a, b, c = torch.rand(3), torch.rand(2, 2), torch.tensor(4)
    body = {"list": [a, {"deep": (b,)}], "made": Conditioning(c, ("text", None, torch.bfloat16, 3)), 5: []}
    arrived = there(body)
    assert torch.equal(arrived["list"][0], a)
    assert torch.equal(arrived["list"][1]["deep"][0], b)
    assert torch.equal(arrived["made"].prompt_embeds, c)
    assert arrived["made"].extra == ("text", None, torch.bfloat16, 3)
    assert arrived[5] == []


def test_a_message_without_tensors_arrives() -> None:
    assert there(None) is None


def test_what_arrives_can_be_written_without_harm_to_its_neighbours() -> None:
    first, second = there([torch.zeros(3), torch.zeros(3)])
    first += 1
    assert second.eq(0).all()


def test_what_arrives_is_no_view_of_what_was_sent() -> None:
    tensor = torch.zeros(3)
    there(tensor).fill_(1)
    assert tensor.eq(0).all()


def test_what_arrives_outlives_the_buffers_it_came_in() -> None:
    packed = pack(Message(0, torch.arange(1000)), CPU)
    arrived = unpack(packed, CPU).body
    del packed
    assert torch.equal(arrived, torch.arange(1000))


def test_every_tensor_begins_at_a_multiple_of_64_bytes() -> None:
    arrived = there([torch.rand(size) for size in (1, 5, 16, 17)])
    assert all(tensor.data_ptr() % 64 == 0 for tensor in arrived)


def test_a_tensor_that_comes_up_twice_travels_once() -> None:
    ids = torch.arange(10_000)
    packed = pack(Message(0, {"image": ids, "again": [ids]}), CPU)
    assert packed.num_bytes < 2 * ids.nbytes
    body = unpack(packed, CPU).body
    assert body["image"] is body["again"][0]


def test_the_header_tells_how_much_to_receive() -> None:
    packed = pack(Message(3, {"x": torch.rand(100), "y": torch.rand(1)}), CPU)
    header = Header.of(packed.host[:HEADER_BYTES])
    assert (header.batch_id, header.num_host_bytes, header.num_device) == (3, packed.host.nbytes, 0)


def test_gradients_stay_behind() -> None:
    assert not there(torch.nn.Parameter(torch.rand(2)) * 2).requires_grad


class Fresh:
    """Creates its tensor when it is pickled, so that the next tensor may get the same memory and the same id."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (torch.tensor(self.value),)


def test_tensors_that_live_only_while_pickled_are_not_mixed_up() -> None:
    assert there([Fresh(value) for value in range(50)]) == list(range(50))


def test_lazily_conjugated_and_negated_tensors_arrive() -> None:
    number = torch.tensor([1 + 2j, 3 - 4j])
    arrived = there([number.conj(), number.conj().imag])
    assert arrived[0].tolist() == [1 - 2j, 3 + 4j]
    assert arrived[1].tolist() == [-2, 4]


def test_an_error_arrives_with_its_type_arguments_and_notes() -> None:
    error = KeyError("block", 3)
    error.add_note("On rank 1")
    arrived = unpack(pack(Message(1, None, error), CPU), CPU).error
    assert isinstance(arrived, KeyError)
    assert arrived.args == ("block", 3)
    assert arrived.__notes__ == ["On rank 1"]


def test_an_error_that_cannot_be_pickled_arrives_as_its_text() -> None:
    class Local(Exception):
        pass

    error = Local("no such block")
    error.add_note("On rank 1")
    arrived = unpack(pack(Message(1, None, error), CPU), CPU).error
    assert type(arrived) is RuntimeError
    assert str(arrived) == "Local: no such block"
    assert arrived.__notes__ == ["On rank 1"]


def test_an_error_that_cannot_be_unpickled_arrives_as_its_text() -> None:
    arrived = unpack(pack(Message(1, None, Inexpressible("denoise", "no such block")), CPU), CPU).error
    assert str(arrived) == "Inexpressible: no such block"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda: None, id="function"),
        pytest.param(torch.eye(3).to_sparse(), id="sparse"),
        pytest.param(torch.empty(3, device="meta"), id="meta"),
    ],
)
def test_a_body_that_cannot_be_sent_becomes_an_error_of_that_micro_batch(body: Any) -> None:
    message = unpack(pack(Message(9, [torch.rand(2), body]), CPU), CPU)
    assert (message.batch_id, message.body) == (9, None)
    assert "micro-batch 9 cannot be sent" in str(message.error)


class Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)


def test_a_body_that_cannot_be_read_becomes_an_error_of_that_micro_batch() -> None:
    message = unpack(pack(Message(9, Unreadable()), CPU), CPU)
    assert (message.batch_id, message.body) == (9, None)
    assert "micro-batch 9 cannot be read" in str(message.error)


def test_messages_are_told_apart_by_identity() -> None:
    assert Message(1, torch.zeros(2)) != Message(1, torch.zeros(2))


def test_what_finds_no_room_at_first_is_tried_again() -> None:
    tries = iter([True, True, False])

    def allocate() -> Tensor:
        if next(tries):
            raise torch.OutOfMemoryError
        return torch.ones(3)

    assert torch.equal(when_there_is_room(allocate, period_s=0.001), torch.ones(3))


def test_what_never_finds_room_is_given_up() -> None:
    def allocate() -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        when_there_is_room(allocate, period_s=0.001)


def test_room_is_waited_for_as_long_as_there_is_work_that_gives_memory_back() -> None:
    num_tries = 0

    def allocate() -> Tensor:
        nonlocal num_tries
        num_tries += 1
        if num_tries < 100:
            raise torch.OutOfMemoryError
        return torch.ones(3)

    assert torch.equal(when_there_is_room(allocate, lambda: num_tries < 99, period_s=0.0), torch.ones(3))


def test_a_message_without_room_to_be_packed_says_so_by_the_errors_own_class() -> None:
    class Huge(nn.Module):
        def __reduce__(self) -> Any:
            raise torch.OutOfMemoryError("no room for it")

    message = unpack(pack(Message(7, Huge()), CPU), CPU)
    assert isinstance(message.error, torch.OutOfMemoryError)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
def test_a_message_that_finds_no_room_on_the_gpu_arrives_as_an_error() -> None:
    packed = pack(Message(3, torch.zeros(2**28, dtype=torch.uint8, device="cuda")), CPU)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        message = unpack(packed, torch.device("cuda", 0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (message.batch_id, message.body) == (3, None)
    assert isinstance(message.error, torch.OutOfMemoryError)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
@pytest.mark.parametrize("staging", ["cpu", "cuda"])
def test_tensors_of_the_gpu_and_of_the_cpu_arrive_where_they_belong(staging: str) -> None:
    gpu, body = torch.device("cuda", 0), {"gpu": grid_of(torch.bfloat16).cuda(), "cpu": torch.rand(3)}
    packed = pack(Message(0, body), torch.device(staging))
    assert packed.parts[-1].device.type == staging
    torch.cuda.synchronize()
    arrived = unpack(packed, gpu).body
    torch.cuda.synchronize()
    assert (arrived["gpu"].device, arrived["cpu"].device) == (gpu, CPU)
    assert torch.equal(bits_of(arrived["gpu"]), bits_of(body["gpu"]))
    assert torch.equal(arrived["cpu"], body["cpu"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
def test_what_arrived_is_not_overwritten_while_the_gpu_still_reads_it() -> None:
    """Memory of the receiver's stream may be reused once the host drops it, although the GPU may not have read it
    yet."""
    gpu, receiving, ones = torch.device("cuda", 0), torch.cuda.Stream(), torch.ones(2**20)
    packed = pack(Message(0, ones.to(gpu)), CPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(receiving):
        message = unpack(packed, gpu)
    receiving.synchronize()
    torch.cuda._sleep(10**8)
    read = message.body.clone()
    del message
    with torch.cuda.stream(receiving):
        torch.zeros_like(ones, device=gpu)
    torch.cuda.synchronize()
    assert torch.equal(read.cpu(), ones)

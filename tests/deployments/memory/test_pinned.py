"""Packed copies equal the tensors that they were made of, each in its own place."""

import pytest
import torch

from deployments.memory import pinned
from deployments.memory.pinned import ALIGNMENT, PinnedCopies

TENSORS = [
    torch.randn(3, 5),
    torch.randn(7).to(torch.bfloat16),
    torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    torch.randn(3, 3).to(torch.float8_e4m3fn),
    torch.tensor(3),
    torch.randn(300),
    torch.randn(0),
]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "CHUNK_BYTES", 1024)


def test_copies_are_equal_in_value_type_and_strides() -> None:
    copies = PinnedCopies(is_pinned=False)
    packed = [copies.copy(tensor) for tensor in TENSORS]
    for tensor, copy in zip(TENSORS, packed, strict=True):
        assert (copy.dtype, copy.stride()) == (tensor.dtype, tensor.stride())
        assert torch.equal(copy.float(), tensor.float())
        assert copy.storage_offset() * copy.itemsize % ALIGNMENT == 0


def test_small_ones_share_a_chunk_and_large_ones_have_their_own() -> None:
    copies = PinnedCopies(is_pinned=False)
    chunks = [copies.copy(tensor).untyped_storage() for tensor in TENSORS]
    assert chunks[0].data_ptr() == chunks[1].data_ptr() == chunks[2].data_ptr()
    assert chunks[5].data_ptr() != chunks[0].data_ptr()
    assert [chunk.nbytes() for chunk in chunks[:3]] == [1024] * 3
    assert chunks[5].nbytes() == TENSORS[5].nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_copies_are_pinned() -> None:
    assert PinnedCopies().copy(TENSORS[0]).is_pinned()

"""Host copies of weights, pinned and packed.

torch rounds every pinned allocation up to a power of two (https://github.com/pytorch/pytorch/issues/150517):
3072 x 3072 weights in bf16, 18 MiB, would take 32 MiB. So large chunks are allocated, and weights are copied into
them one after another.
"""

import torch

CHUNK_BYTES = 2**28
"""Size of a chunk: a power of two. A larger weight gets an allocation of its own."""
ALIGNMENT = 256
"""Alignment of each weight's address, in bytes: the same as torch's on CUDA."""


class PinnedCopies:
    """Copies tensors from pageable to pinned host memory. A chunk is freed once none of its tensors is in use."""

    def __init__(self, *, is_pinned: bool = True) -> None:
        """is_pinned: False only in tests without CUDA."""
        self._is_pinned = is_pinned
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._num_used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a copy with the same strides, so channels_last is kept. The tensor must be dense."""
        start = -(-self._num_used // ALIGNMENT) * ALIGNMENT
        if start + tensor.nbytes > self._chunk.nbytes:
            size, start = max(CHUNK_BYTES, tensor.nbytes), 0
            self._chunk = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned)
        self._num_used = start + tensor.nbytes
        flat = self._chunk[start : self._num_used].view(tensor.dtype)
        return flat.as_strided(tensor.size(), tensor.stride(), flat.storage_offset()).copy_(tensor)

"""Ranks that share each forward: their process group, and how they stay in step.

Each rank has a ring of its own (`place.Rendezvous.ring_of`), so all ranks get the same micro-batches in the same
order. A collective waits for all ranks, so before and after each micro-batch they tell each other whether it has
failed. A micro-batch that fails on one rank fails on all; other micro-batches continue. A rank that does not
answer while another has failed is waiting in a collective that will never end: then the group is lost.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from cluster.machines import accelerator
from cluster.ranks.message import portable
from cluster.ranks.place import SILENT_AFTER_S
from cluster.ranks.transport import PeerLost

MEET_TIMEOUT_S = 600.0
"""How long a rank waits for the others to join: they read configs first, and may download files."""
_FOREVER = timedelta(days=365)

dist: Any = torch.distributed


class ParallelGroup:
    """This process's membership in the ranks that run the same blocks. There is only one: torch's default
    group."""

    def __init__(
        self,
        rank: int,
        size: int,
        store: TCPStore,
        *,
        name: str,
        device: torch.device,
        stuck_after_s: float = 0.0,
        silent_after_s: float = SILENT_AFTER_S,
    ) -> None:
        """Returns when all ranks have joined.

        Args:
            rank: in this group.
            store: where all ranks of the replica meet; `name` distinguishes this group from others.
            stuck_after_s: longer than a rank may be behind the others in a forward.
            silent_after_s: how long a rank that has failed waits for the others' answers.
        """
        if accelerator.is_accelerator(device) and not accelerator.has_nccl(device):
            raise ValueError(
                f"ranks on {device.type} devices cannot share forwards: that needs NCCL, or gloo on the CPU"
            )
        self.rank, self.size = rank, size
        self._device, self._silent_after = device, timedelta(seconds=silent_after_s)
        backend = "cpu:gloo,cuda:nccl" if accelerator.has_nccl(device) else "gloo"
        dist.init_process_group(
            backend,
            store=PrefixStore(name, store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=max(MEET_TIMEOUT_S, stuck_after_s)),
        )
        self._words = dist.new_group(backend="gloo", timeout=_FOREVER)
        """Group for status messages, which are never queued behind a collective of the forward."""
        self._exchange()  # NCCL connects at its first use

    def mesh(self, *names: str) -> DeviceMesh:
        """Returns a device mesh with one dimension per name; the last dimension has all ranks."""
        shape = [1] * (len(names) - 1) + [self.size]
        ranks = torch.arange(self.size).reshape(shape)
        return DeviceMesh(self._device.type, ranks, mesh_dim_names=names)

    def agree(self, batch_id: int, error: BaseException | None) -> BaseException | None:
        """Returns the error of this rank, else that of the first rank that has one, else None. Waits for all
        ranks. Raises PeerLost."""
        mine = torch.tensor([batch_id, error is not None])
        said = [torch.empty_like(mine) for _ in range(self.size)]
        limit = _FOREVER if error is None else self._silent_after
        try:
            dist.all_gather(said, mine, group=self._words, async_op=True).wait(limit)
        except RuntimeError as reason:
            what = "" if error is None else f"; this one failed: {error!r}"
            raise PeerLost(f"a rank that shares forwards with this one does not answer{what}: {reason}") from error
        ids, failed = zip(*(one.tolist() for one in said), strict=True)
        if len(set(ids)) > 1:
            raise PeerLost(f"ranks that share each forward are at different micro-batches: {list(ids)}")
        if not any(failed):
            return None
        errors: list[BaseException | None] = [None] * self.size
        try:
            dist.all_gather_object(errors, None if error is None else portable(error), group=self._words)
            self._exchange()
        except RuntimeError as reason:
            raise PeerLost(f"ranks that share each forward no longer reach each other: {reason}") from error
        return error or next(each for each in errors if each is not None)

    def _exchange(self) -> None:
        """Runs one small collective. Raises RuntimeError if it fails."""
        dist.all_reduce(torch.zeros(1, device=self._device))
        accelerator.synchronize_stream(self._device)

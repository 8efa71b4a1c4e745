"""Ranks that share each forward: their process group, and how they keep in step.

Each has a ring of its own (`place.Rendezvous.ring_of`), so all meet the same micro-batches in the same order. A
collective of one waits for all: so before and after each micro-batch they tell each other whether it has failed.
What one has failed at fails on all, alone. A rank that says nothing while another has failed waits in a collective
that will never end: then the group is lost.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from cluster import accelerator
from cluster.message import portable
from cluster.transport import PeerLost

MEET_TIMEOUT_S = 600.0
"""What one does before the others are there: it reads configs, and may fetch files."""
SILENT_AFTER_S = 30.0
"""Of a rank that must be done soon, if it is not stuck."""
_FOREVER = timedelta(days=365)

dist: Any = torch.distributed


class ParallelGroup:
    """This process among the ranks that run the same blocks. There is one: it is torch's default group."""

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
        """Returns when all have met.

        Args:
            rank: in this group.
            store: where all ranks of the replica meet; `name` tells this group from others.
            stuck_after_s: longer than a rank may be behind the others in a forward.
            silent_after_s: how long one that has failed waits for the others' word.
        """
        if accelerator.is_accelerator(device) and not accelerator.has_nccl(device):
            raise ValueError(
                f"ranks on {device.type} devices cannot share forwards: it takes NCCL, or the CPU's gloo"
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
        """What they tell each other: never queued behind a collective."""
        self._exchange()  # NCCL connects when first used

    def mesh(self, *names: str) -> DeviceMesh:
        """Of one dimension for each name; the last has all ranks."""
        shape = [1] * (len(names) - 1) + [self.size]
        ranks = torch.arange(self.size).reshape(shape)
        return DeviceMesh(self._device.type, ranks, mesh_dim_names=names)

    def agree(self, batch_id: int, error: BaseException | None) -> BaseException | None:
        """What becomes of a micro-batch: the first rank's error that has one. Waits for all. Raises PeerLost."""
        mine = torch.tensor([batch_id, error is not None])
        said = [torch.empty_like(mine) for _ in range(self.size)]
        limit = _FOREVER if error is None else self._silent_after
        try:
            dist.all_gather(said, mine, group=self._words, async_op=True).wait(limit)
        except RuntimeError as reason:
            what = "" if error is None else f"; this one failed: {error!r}"
            raise PeerLost(f"a rank that shares forwards with this one says nothing{what}: {reason}") from error
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
        """Raises RuntimeError if they cannot."""
        dist.all_reduce(torch.zeros(1, device=self._device))
        accelerator.synchronize_stream(self._device)

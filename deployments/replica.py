"""What the replicas of all three stages have in common: how they begin, and what ends them. Torch-free."""

import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from cluster.replica_port import follow_ray_to_loopback
from cluster.termination import DrainOnSigterm

if TYPE_CHECKING:
    from deployments.memory.keeper import Keeper

log = logging.getLogger("ray.serve")

Args = ParamSpec("Args")
Answer = TypeVar("Answer")


def exit_replica(cause: BaseException) -> None:
    """Ends this process at once.

    A replica that lost its group or its GPU but went on would fail every request fast, look idle, and so be given
    more (measured: 2 of 6 requests lost after 5 retries; none when it exits).
    """
    log.error("this process ends: %s", cause)
    os._exit(1)


class StageReplica(DrainOnSigterm):
    """Base of the stages' deployments. A GPU that is lost, is lost to its process for good: so it ends."""

    def __init__(self) -> None:
        """To be called first of all."""
        self.drain_on_sigterm()
        follow_ray_to_loopback()

    @property
    def keeper(self) -> "Keeper":
        """Of the stage's models, once they are loaded."""
        raise NotImplementedError

    def guarded(self, call: Callable[Args, Answer]) -> Callable[Args, Answer]:
        """The same, and if it fails for the GPU is lost, nothing comes back: the ingress asks another replica."""

        @functools.wraps(call)
        def run(*args: Args.args, **kwargs: Args.kwargs) -> Answer:
            try:
                return call(*args, **kwargs)
            except Exception as error:
                self._exit_if_device_lost(error)
                raise

        return run

    async def check_health(self) -> None:
        """Serve asks every few seconds: so a GPU that is lost between two requests costs none."""
        await super().check_health()
        self._exit_if_device_lost(RuntimeError("its GPU is lost"))

    def _exit_if_device_lost(self, cause: BaseException) -> None:
        if self.keeper.is_device_lost():
            exit_replica(cause)

"""What a process does about SIGTERM, in place of what Ray would do.

Ray (2.60) begins to end the process, waits for every call that runs in it, and starts no other one. So a follower
rank, one of whose calls never ends, stays for good and useless; and a replica stays for as long as its longest
request, while Serve, whose health checks it no longer answers, goes on giving it new ones; and Serve's controller
stays for up to a minute, and answers nobody.
"""

import faulthandler
import logging
import os
import signal
import threading
from collections.abc import Callable

import ray

log = logging.getLogger("ray.serve")


def on_sigterm(told: Callable[[], None]) -> None:
    """Call that, once, in a thread of its own, when this process gets a SIGTERM.

    Python sets handlers in the main thread alone, where Ray has set its own and where nothing of ours runs. The
    handler of faulthandler takes its place from any thread. What it writes is not read; that it does is the news.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # it writes in the thread that it interrupts, which must not wait for a reader
    faulthandler.register(signal.SIGTERM, file=writer, all_threads=False, chain=False)
    threading.Thread(target=_wait, args=(reader, told), name="sigterm", daemon=True).start()


def _wait(reader: int, told: Callable[[], None]) -> None:
    os.read(reader, 1)
    told()


def exit_on_sigterm() -> None:
    """For Serve's controller: it ends at once, as if it had been killed, and Ray starts it anew.

    It has nothing to end first, for what it knows is in the GCS; and calls that wait for news run in it always.
    """
    on_sigterm(lambda: os._exit(1))


class ToldToGo(RuntimeError):
    """A replica's answer to Serve's health checks once it has got a SIGTERM."""

    def __init__(self, message: str = "it has got a SIGTERM, and ends once its requests have") -> None:
        super().__init__(message)


class DrainOnSigterm:
    """Base of every deployment: SIGTERM has the effect of being stopped by Serve.

    Serve takes a replica that is not healthy out of the routing, starts its successor, and ends it when its
    requests have ended, after `graceful_shutdown_timeout_s` at the latest. Until Serve does so, three health
    checks later, it serves on: no request is refused.
    """

    _is_told = False

    def drain_on_sigterm(self) -> None:
        """To be called before anything that takes long. Without effect outside of Ray's processes."""
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            on_sigterm(self._drain)

    def _drain(self) -> None:
        log.warning("SIGTERM: this replica ends once its requests have")
        self._is_told = True

    async def check_health(self) -> None:
        """Serve asks; raises ToldToGo."""
        if self._is_told:
            raise ToldToGo

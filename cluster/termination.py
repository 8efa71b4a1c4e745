"""Handling of SIGTERM in place of Ray's own.

On SIGTERM, Ray (2.60) waits for all calls that run in the process and starts no new ones. So a worker rank with a
call that never ends stays, useless; a replica stays for as long as its longest request, while Serve, whose health
checks it no longer answers, goes on sending it new ones; and Serve's controller stays for up to a minute without
answering.
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
    """Calls `told` once, in a separate thread, when this process receives SIGTERM.

    Python sets signal handlers only in the main thread, where Ray has set its own and where no code of this
    project runs. The handler of faulthandler can replace it from any thread. Its output is not read: that
    something is written is the signal.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # it writes in the interrupted thread, which must not wait for a reader
    faulthandler.register(signal.SIGTERM, file=writer, all_threads=False, chain=False)
    threading.Thread(target=_wait, args=(reader, told), name="sigterm", daemon=True).start()


def _wait(reader: int, told: Callable[[], None]) -> None:
    os.read(reader, 1)
    told()


def exit_on_sigterm() -> None:
    """Makes Serve's controller exit at once on SIGTERM, as if it had been killed; Ray restarts it.

    The controller needs no cleanup, because its state is in the GCS, and it never becomes idle, because long-poll
    calls always run in it.
    """
    on_sigterm(lambda: os._exit(1))


class ToldToGo(RuntimeError):
    """A replica's answer to Serve's health checks after it has received SIGTERM."""

    def __init__(self, message: str = "it has received SIGTERM, and ends once its requests have ended") -> None:
        super().__init__(message)


class DrainOnSigterm:
    """Base of every deployment: SIGTERM has the same effect as being stopped by Serve.

    Serve takes an unhealthy replica out of the routing, starts its successor, and stops it when its requests have
    ended, after `graceful_shutdown_timeout_s` at the latest. Until Serve does so, three health checks later, the
    replica goes on serving: no request is refused.
    """

    _is_told = False

    def drain_on_sigterm(self) -> None:
        """Installs the handler; call it before anything that takes long. Does nothing outside of Ray's
        processes."""
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            on_sigterm(self._drain)

    def _drain(self) -> None:
        log.warning("SIGTERM: this replica ends once its requests have ended")
        self._is_told = True

    async def check_health(self) -> None:
        """Called by Serve. Raises ToldToGo after SIGTERM."""
        if self._is_told:
            raise ToldToGo

"""Periodic calls in a background thread."""

import logging
import threading
from collections.abc import Callable

log = logging.getLogger("ray.serve")


def call_periodically(call: Callable[[], None], period_s: float, *, name: str) -> None:
    """Calls `call` every `period_s`, in a thread that ends with the process. Exceptions are logged."""

    def loop() -> None:
        pause = threading.Event()
        while not pause.wait(period_s):
            try:
                call()
            except Exception:  # the next call may succeed
                log.exception("%s failed; the next try follows in %g s", name, period_s)

    threading.Thread(target=loop, name=name, daemon=True).start()

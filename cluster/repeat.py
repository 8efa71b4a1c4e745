"""A call that is made again and again, beside everything else that a process does."""

import logging
import threading
from collections.abc import Callable

log = logging.getLogger("ray.serve")


def repeat(call: Callable[[], None], period_s: float, *, name: str) -> None:
    """Calls it so often, in a thread that ends with the process. What it raises is logged."""

    def loop() -> None:
        pause = threading.Event()
        while not pause.wait(period_s):
            try:
                call()
            except Exception:  # what fails now may not fail the next time
                log.exception("%s failed; the next try follows in %g s", name, period_s)

    threading.Thread(target=loop, name=name, daemon=True).start()

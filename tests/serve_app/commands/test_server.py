"""Tests of how `relay serve` handles signals, and output that has lost its reader. Starts no server."""

import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from serve_app.commands.server import Terminal, on_signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def caught(number: int) -> bool:
    """Returns whether the handler of `on_signals` receives this signal."""
    heard = []

    def hear(of: int, _frame: FrameType | None) -> None:
        heard.append(of)

    on_signals(hear)
    os.kill(os.getpid(), number)
    return heard == [number]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_terminal_that_is_closed_ends_it_in_order_too(number: signal.Signals) -> None:
    assert caught(number)


def test_nohup_keeps_it() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert not caught(signal.SIGHUP)


@pytest.mark.parametrize("open_ends", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_whoever_stops_reading_does_not_end_it(open_ends: Callable[[], tuple[int, int]]) -> None:
    """Writing to the file is an error, and so is closing it while it has unwritten output."""
    reading, writing = open_ends()
    os.close(reading)
    nobody = os.fdopen(writing, "w", buffering=1)
    Terminal(file=nobody).print("relay: stopping")
    with pytest.raises(OSError, match=r"Broken pipe|Input/output error"):
        nobody.close()

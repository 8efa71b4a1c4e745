"""Turns at a device that several processes of one node share: whoever has the turn may keep its weights there.

Two locked files: one is held by whose turn it is, the other by who comes next; all others wait for the latter.
The kernel lets go of what a dead process has locked, so nobody waits for the dead, and nobody waits for another
while he has the turn, so no two wait for each other.
"""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PERIOD_S = 0.01
"""How often who has the turn, and no work, looks whether somebody waits for it."""


@dataclass(frozen=True)
class TurnStats:
    """One process's turns since it started."""

    is_here: bool
    """Whether it has the turn now: it keeps it while nobody else asks."""
    num_turns: int
    waited_s: float
    arriving_s: float
    """Spent bringing what it needs to the device; all turns together."""
    leaving_s: float


def _do_nothing() -> None:
    """Where only the turn itself is wanted."""


class Turn:
    """One process's side. It works in one thread at a time; another may ask for stats.

    It leaves when somebody else waits and it is resting, or, between two works, when it has had the turn for
    `turn_s`. Fairness: who leaves waits behind whoever waited before; those behind the next come in the order in
    which the kernel wakes them.
    """

    def __init__(
        self,
        path: Path,
        *,
        arrive: Callable[[], None] = _do_nothing,
        leave: Callable[[], None] = _do_nothing,
        turn_s: float = 0.0,
    ) -> None:
        """
        Args:
            path: of the device; the two files are called so, with an ending.
            arrive: brings what `work` needs; called when a turn begins.
            leave: takes it away; called in any thread, never during `work`.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._turn, self._next = _Lock(path.with_suffix(".turn")), _Lock(path.with_suffix(".next"))
        self._arrive, self._leave, self._turn_s = arrive, leave, turn_s
        self._changing = threading.Lock()  # guards what follows
        self._is_here, self._is_working = False, False
        self._since = 0.0
        self._resting_since: float | None = None
        self._num_turns, self._waited_s, self._arriving_s, self._leaving_s = 0, 0.0, 0.0, 0.0

    @contextmanager
    def work(self) -> Iterator[None]:
        """Has the turn; waits for it if need be."""
        with self._changing:
            self._resting_since = None
            if not self._is_here:
                self._begin()
            self._is_working = True
        try:
            yield
        finally:
            with self._changing:
                self._is_working = False
                self._leave_if_due()

    def rest(self) -> None:
        """For now there is no more work: whoever waits may have the turn."""
        with self._changing:
            self._resting_since = time.monotonic()

    def stats(self) -> TurnStats:
        return TurnStats(self._is_here, self._num_turns, self._waited_s, self._arriving_s, self._leaving_s)

    def _begin(self) -> None:
        began = time.monotonic()
        with self._next:
            self._turn.acquire()
        self._since = time.monotonic()
        self._waited_s += self._since - began
        try:
            self._arrive()
        except BaseException:
            self._end()
            raise
        self._arriving_s += time.monotonic() - self._since
        self._is_here = True
        self._num_turns += 1
        threading.Thread(target=self._watch, args=(self._num_turns,), name="turn", daemon=True).start()

    def _end(self) -> None:
        began = time.monotonic()
        self._leave()
        self._leaving_s += time.monotonic() - began
        self._is_here = False
        self._turn.release()

    def _watch(self, turn: int) -> None:
        """For as long as this turn lasts."""
        while True:
            time.sleep(PERIOD_S)
            with self._changing:
                if turn != self._num_turns or not self._is_here:
                    return
                self._leave_if_due()

    def _leave_if_due(self) -> None:
        if self._is_working or not self._is_here:
            return
        now = time.monotonic()
        # Work that follows at once, of a queue of requests, is not yet another turn.
        is_resting = self._resting_since is not None and now - self._resting_since >= PERIOD_S
        if (is_resting or now - self._since >= self._turn_s) and self._next.is_taken():
            self._end()


class _Lock:
    """A locked file: flock belongs to this opening of it, and ends with the process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def acquire(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def release(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def is_taken(self) -> bool:
        """By somebody else; only who has not locked it may ask."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        self.release()
        return False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        os.close(self._file)

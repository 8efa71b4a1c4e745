"""A lease of a device that several processes of one node share: its holder may keep its weights there.

There are two locked files: the lease's holder locks one, the next process in line locks the other, and all further
processes wait for the latter. The kernel releases the locks of a dead process, so no process waits for a dead one.
No process waits for another while it holds the lease, so there is no deadlock.
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
"""How often an idle holder checks whether another process waits for the lease."""


@dataclass(frozen=True)
class LeaseStats:
    """One process's leases since it started."""

    is_held: bool
    """Whether the process holds the lease now; it keeps the lease until another process asks for it."""
    num_leases: int
    waited_s: float
    loading_s: float
    """Seconds spent loading to the device, over all leases."""
    unloading_s: float


def _do_nothing() -> None:
    """Default of `load` and `unload`, for callers that only want the lease itself."""


class DeviceLease:
    """One process's side of the lease. It does work in one thread at a time; another thread may call `stats`.

    It releases the lease when another process waits and this one is idle, or, between two uses, after it has held
    it for `time_slice_s`. Fairness: a process that releases the lease queues behind the process that is next;
    those behind the next one proceed in the order in which the kernel wakes them.
    """

    def __init__(
        self,
        path: Path,
        *,
        load: Callable[[], None] = _do_nothing,
        unload: Callable[[], None] = _do_nothing,
        time_slice_s: float = 0.0,
    ) -> None:
        """
        Args:
            path: of the device; the two lock files have this path with different suffixes.
            load: loads to the device what is needed while the lease is `held`; called when a lease begins.
            unload: undoes `load`; called in any thread, never while the lease is `held`.
            time_slice_s: how long uninterrupted work may keep the lease while others wait.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._current, self._next = _Lock(path.with_suffix(".lease")), _Lock(path.with_suffix(".next"))
        self._load, self._unload, self._time_slice_s = load, unload, time_slice_s
        self._changing = threading.Lock()  # guards the attributes below
        self._is_held, self._is_working = False, False
        self._since = 0.0
        self._idle_since: float | None = None
        self._num_leases, self._waited_s, self._loading_s, self._unloading_s = 0, 0.0, 0.0, 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context for work on the device; waits for the lease if necessary."""
        with self._changing:
            self._idle_since = None
            if not self._is_held:
                self._acquire()
            self._is_working = True
        try:
            yield
        finally:
            with self._changing:
                self._is_working = False
                self._release_if_due()

    def idle(self) -> None:
        """Marks this process as idle, so that a waiting process may get the lease."""
        with self._changing:
            self._idle_since = time.monotonic()

    def stats(self) -> LeaseStats:
        return LeaseStats(self._is_held, self._num_leases, self._waited_s, self._loading_s, self._unloading_s)

    def _acquire(self) -> None:
        began = time.monotonic()
        with self._next:
            self._current.acquire()
        self._since = time.monotonic()
        self._waited_s += self._since - began
        try:
            self._load()
        except BaseException:
            self._release()
            raise
        self._loading_s += time.monotonic() - self._since
        self._is_held = True
        self._num_leases += 1
        threading.Thread(target=self._watch, args=(self._num_leases,), name="device lease", daemon=True).start()

    def _release(self) -> None:
        began = time.monotonic()
        self._unload()
        self._unloading_s += time.monotonic() - began
        self._is_held = False
        self._current.release()

    def _watch(self, lease: int) -> None:
        """Runs while this lease lasts, and releases it when due."""
        while True:
            time.sleep(PERIOD_S)
            with self._changing:
                if lease != self._num_leases or not self._is_held:
                    return
                self._release_if_due()

    def _release_if_due(self) -> None:
        if self._is_working or not self._is_held:
            return
        now = time.monotonic()
        # Queued requests that follow immediately use the same lease.
        is_idle = self._idle_since is not None and now - self._idle_since >= PERIOD_S
        if (is_idle or now - self._since >= self._time_slice_s) and self._next.is_taken():
            self._release()


class _Lock:
    """A locked file. The lock belongs to this file descriptor (flock), and ends with the process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def acquire(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def release(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def is_taken(self) -> bool:
        """Whether another descriptor holds the lock. Call this only without holding it."""
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

"""The ring: micro-batches go from rank to rank, each computes its share, and they come back to rank 0.

            rank 0                        rank 1                           last rank
  source ─▶ compute ─▶ send ─────▶ receive ─▶ compute ─▶ send ───▶ … ─▶ compute ─▶ send ─┐
    sink ◀─ receive ◀────────────────────────────────────────────────────────────────────┘

On each rank these are three threads: while it computes one micro-batch, it sends the one before and receives the
one after. How many are in flight is up to the source, so no queue in here needs a bound.
"""

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from cluster import accelerator
from cluster.message import Message
from cluster.transport import Transport

_GOODBYE = Message(batch_id=-1, body=None)


class StopRing(Exception):
    """Raised by a source: no more micro-batches. Those in flight still come back."""


class RingStuck(RuntimeError):
    """Micro-batches are in flight, and for too long none has come back."""


@dataclass(frozen=True)
class RingStats:
    """What one rank has done since it started."""

    num_computed: int
    busy_s: float
    """Spent computing."""
    occupied_s: float | None
    """How long anything was in flight. Only rank 0 can know; None on the others.

    What a rank computes is in flight meanwhile, so the rest of it is the rank's bubble: the time it stood idle
    while there was work in the ring, filling and draining included.
    """
    bytes_sent: int


Agree = Callable[[int, BaseException | None], BaseException | None]
"""(batch id, this rank's error or None) -> what it fails with, on whichever rank (`ParallelGroup.agree`)"""


def no_peers(_batch_id: int, error: BaseException | None) -> BaseException | None:
    """Where no other rank computes the same."""
    return error


class Ring:
    """One rank's side of the ring.

    A micro-batch fails alone: if `compute` raises, the error travels on in place of the body, to rank 0's sink.
    The ring fails as a whole if a neighbour or the device is lost or rank 0 is stuck: then `on_failure` is
    called, once.

    A ring of one rank has no transport: one thread pulls, computes and calls the sink, and nothing is copied.
    """

    def __init__(
        self,
        compute: Callable[[Any], Any],
        *,
        rank: int = 0,
        transport: Transport | None = None,
        source: Callable[[], Message] | None = None,
        sink: Callable[[Message], None] | None = None,
        on_failure: Callable[[BaseException], None],
        stuck_after_s: float | None = None,
        device: torch.device,
        agree: Agree = no_peers,
    ) -> None:
        """
        Args:
            compute: this rank's share, from body to body. Runs in one thread, on the default stream.
            source: rank 0's; blocks until a micro-batch should take off, or raises StopRing.
            sink: rank 0's; gets each micro-batch when it is back, in the order they took off.
            on_failure: runs in one of the ring's threads. Nothing will come back any more: end the process.
            stuck_after_s: rank 0's; longer than a micro-batch may take to come round, compiling included.
            device: what `compute` runs on.
            agree: with the ranks that compute the same, before and after each micro-batch; raises if they are no
                longer in step.
        """
        if not (rank == 0) == (source is not None) == (sink is not None):
            raise ValueError(f"rank {rank}: rank 0 needs a source and a sink, and the others have none")
        if rank > 0 and transport is None:
            raise ValueError(f"rank {rank} needs a transport; only a ring of one rank has none")
        self._compute, self._device, self._agree = compute, device, agree
        self._rank, self._transport = rank, transport
        self._source, self._sink = source, sink
        self._on_failure = on_failure
        self._stuck_after_s = stuck_after_s

        self._inbox: SimpleQueue[Message | None] = SimpleQueue()  # None ends the thread that reads it
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        self._traffic = _Traffic()
        self._threads: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()
        self._is_over, self._has_failed = False, False
        self._num_computed, self._busy_s = 0, 0.0
        self._num_held = 0
        """Messages that this rank computes, is to compute or sends: each gives memory back."""

    def start(self) -> None:
        steps: dict[str, Callable[[], bool]] = {"compute": self._compute_one}
        if self._transport is not None:
            steps["receive"] = partial(self._receive_one, self._transport)
            steps["send"] = partial(self._send_one, self._transport)
        if self._stuck_after_s is not None:
            steps["watch"] = partial(self._watch, self._stuck_after_s)
        for name, step in steps.items():
            thread_name = f"ring-{self._rank}-{name}"
            self._threads[name] = threading.Thread(target=self._run, args=(step,), name=thread_name, daemon=True)
        for thread in self._threads.values():
            thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """End the threads. From now on errors are silent, and what is in flight is dropped.

        Rank 0 says goodbye: it goes round once and ends every rank that it passes. The others, closed by
        themselves, wait for it `timeout_s` at most. Close the source first: the ring cannot end its waiting.
        """
        if self._end() and self._rank == 0:
            self._stop_threads(_GOODBYE)
        self._join("receive", "send", timeout_s=0.0 if self._has_failed else timeout_s)
        self._stop_threads()
        if self._transport is not None:
            self._transport.close()
        self._join(*self._threads, timeout_s=timeout_s)

    def stats(self) -> RingStats:
        return RingStats(
            num_computed=self._num_computed,
            busy_s=self._busy_s,
            occupied_s=self._traffic.occupied_s() if self._rank == 0 else None,
            bytes_sent=0 if self._transport is None else self._transport.bytes_sent,
        )

    # The threads' steps, repeated as long as they return True. What a step holds it lets go before the next waits.

    def _run(self, step: Callable[[], bool]) -> None:
        try:
            accelerator.use_device(self._device)
            while step():
                pass
        except StopRing:
            pass
        except BaseException as error:
            self._fail(error)

    def _receive_one(self, transport: Transport) -> bool:
        message = transport.receive(lambda: self._num_held > 0)
        if message.batch_id == _GOODBYE.batch_id:
            self._end()
            self._stop_threads(_GOODBYE)
            return False
        self._arrive(message)
        return True

    def _compute_one(self) -> bool:
        message = self._next()
        if message is None or self._is_over:
            return False
        message = self._agreed(message)
        if message.error is None:
            message = self._agreed(self._computed(message))
        if self._transport is None:
            self._arrive(message)
        else:
            self._outbox.put(message)
        return True

    def _send_one(self, transport: Transport) -> bool:
        message = self._outbox.get()
        if message is not None:
            transport.send(message)
            self._hold(-1)
        return message is not None

    def _watch(self, stuck_after_s: float) -> bool:
        num_in_flight = self._traffic.wait_until_stuck(stuck_after_s)
        if num_in_flight:
            raise RingStuck(
                f"{num_in_flight} micro-batches are in flight and for {stuck_after_s:g} s none has come back; "
                "a rank hangs, or stuck_after_s is too short for them"
            )
        return False

    # What happens to a message.

    def _next(self) -> Message | None:
        if self._source is None:
            return self._inbox.get()
        message = self._source()
        self._hold(1)
        self._traffic.take_off()
        return message

    def _computed(self, message: Message) -> Message:
        began = time.monotonic()
        try:
            result = Message(message.batch_id, self._compute(message.body))
            self._synchronize()
        except Exception as error:
            self._synchronize()  # raises once more if not the micro-batch is at fault, but the device is lost
            where = "".join(traceback.format_exception(error))
            error.add_note(f"On rank {self._rank}:\n{where}")
            # The note travels, tracebacks and causes do not; and their frames would keep tensors alive.
            error.__cause__ = error.__context__ = error.__traceback__ = None
            result = Message(message.batch_id, None, error)
        self._busy_s += time.monotonic() - began
        self._num_computed += 1
        return result

    def _agreed(self, message: Message) -> Message:
        error = self._agree(message.batch_id, message.error)
        return message if error is message.error else Message(message.batch_id, None, error)

    def _synchronize(self) -> None:
        """Wait for the GPU after each micro-batch.

        It may be sent at once, then, and by a stream that knows nothing of compute; errors belong to it alone;
        and rank 0 takes the next one no sooner than the GPU has time for it.
        """
        accelerator.synchronize_stream(self._device)

    def _arrive(self, message: Message) -> None:
        """Before compute, or back at rank 0."""
        if self._sink is None:
            self._hold(1)
            self._inbox.put(message)
        else:
            self._traffic.land()
            self._sink(message)

    def _hold(self, change: int) -> None:
        with self._lock:
            self._num_held += change

    # The end.

    def _fail(self, error: BaseException) -> None:
        if self._end():
            self._has_failed = True
            self._stop_threads()
            self._on_failure(error)

    def _end(self) -> bool:
        """Let later errors be silent. True for the first who calls this."""
        with self._lock:
            was_over, self._is_over = self._is_over, True
        return not was_over

    def _stop_threads(self, *last_words: Message) -> None:
        """All but those that wait for the source or for a neighbour."""
        for message in (*last_words, None):
            self._outbox.put(message)
        self._inbox.put(None)
        self._traffic.stop()

    def _join(self, *names: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for thread in (self._threads[name] for name in names if name in self._threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


class _Traffic:
    """What rank 0 has in flight, for how long already, and whether it moves."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_in_flight = 0
        self._occupied_s = 0.0
        self._occupied_since = 0.0  # if anything is in flight
        self._moved_at = 0.0
        self._has_stopped = False

    def take_off(self) -> None:
        with self._changed:
            if self._num_in_flight == 0:
                self._occupied_since = self._moved_at = time.monotonic()
                self._changed.notify_all()
            self._num_in_flight += 1

    def land(self) -> None:
        with self._changed:
            self._moved_at = time.monotonic()
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._occupied_s += self._moved_at - self._occupied_since

    def stop(self) -> None:
        with self._changed:
            self._has_stopped = True
            self._changed.notify_all()

    def occupied_s(self) -> float:
        with self._changed:
            current_s = time.monotonic() - self._occupied_since if self._num_in_flight else 0.0
            return self._occupied_s + current_s

    def wait_until_stuck(self, stuck_after_s: float) -> int:
        """Block until for so long nothing has moved although something is in flight: how much. 0 when stopped."""
        with self._changed:
            while not self._has_stopped:
                left_s = self._moved_at + stuck_after_s - time.monotonic() if self._num_in_flight else None
                if left_s is not None and left_s <= 0:
                    return self._num_in_flight
                self._changed.wait(left_s)
            return 0

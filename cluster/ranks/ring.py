"""The ring: micro-batches go from rank to rank, each rank computes its share, and they come back to rank 0.

            rank 0                        rank 1                           last rank
  source ─▶ compute ─▶ send ─────▶ receive ─▶ compute ─▶ send ───▶ … ─▶ compute ─▶ send ─┐
    sink ◀─ receive ◀────────────────────────────────────────────────────────────────────┘

Each rank does this in three threads: while it computes one micro-batch, it sends the previous one and receives the
next one. The source decides how many micro-batches are in flight, so the queues here need no bound.
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

from cluster.machines import accelerator
from cluster.ranks.message import Message
from cluster.ranks.traffic import Traffic
from cluster.ranks.transport import Transport

_GOODBYE = Message(batch_id=-1, body=None)


class StopRing(Exception):
    """Raised by a source: there are no more micro-batches. Those in flight still come back."""


class RingStuck(RuntimeError):
    """Micro-batches are in flight, and none has come back for too long."""


@dataclass(frozen=True)
class RingStats:
    """What one rank has done since it started."""

    num_computed: int
    busy_s: float
    """Time spent computing."""
    occupied_s: float | None
    """How long anything was in flight. Only rank 0 can know; None on the other ranks.

    A micro-batch that a rank computes is in flight meanwhile, so `occupied_s - busy_s` is the rank's bubble: the
    time it was idle while there was work in the ring, including filling and draining.
    """
    bytes_sent: int


Agree = Callable[[int, BaseException | None], BaseException | None]
"""(batch id, this rank's error or None) -> the error of whichever rank failed, or None (`ParallelGroup.agree`)."""


def no_peers(_batch_id: int, error: BaseException | None) -> BaseException | None:
    """Default of `agree`: no other rank computes the same blocks."""
    return error


class Ring:
    """One rank's side of the ring.

    A micro-batch fails alone: if `compute` raises, the error travels on in place of the body, to rank 0's sink.
    The ring fails as a whole if a neighbour or the device is lost or rank 0 is stuck: then `on_failure` is called
    once.

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
            source: of rank 0; blocks until a micro-batch should start, or raises StopRing.
            sink: of rank 0; gets each micro-batch when it is back, in the order they started.
            on_failure: runs in one of the ring's threads. Nothing will come back any more: end the process.
            stuck_after_s: of rank 0; longer than a micro-batch may take to come round, compiling included.
            device: what `compute` runs on.
            agree: called before and after each micro-batch, with the ranks that compute the same blocks; raises if
                they are no longer in step.
        """
        if not (rank == 0) == (source is not None) == (sink is not None):
            raise ValueError(f"rank {rank}: rank 0 needs a source and a sink, and the others must have none")
        if rank > 0 and transport is None:
            raise ValueError(f"rank {rank} needs a transport; only a ring of one rank has none")
        self._compute, self._device, self._agree = compute, device, agree
        self._rank, self._transport = rank, transport
        self._source, self._sink = source, sink
        self._on_failure = on_failure
        self._stuck_after_s = stuck_after_s

        self._inbox: SimpleQueue[Message | None] = SimpleQueue()  # None ends the thread that reads the queue
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        self._traffic = Traffic()
        self._threads: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()
        self._is_over, self._has_failed = False, False
        self._num_computed, self._busy_s = 0, 0.0
        self._num_held = 0
        """Number of messages that this rank computes, is about to compute or sends: each will free memory."""

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
        """Ends the threads. After this call errors are ignored, and whatever is in flight is dropped.

        Rank 0 sends a goodbye message, which goes round once and ends every rank that it passes. The other ranks,
        if closed themselves, wait for it for at most `timeout_s`. Close the source first: the ring cannot
        interrupt it.
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

    # The threads' steps, repeated while they return True. A step keeps no reference while the next one waits.

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
                f"{num_in_flight} micro-batches are in flight, and none has come back for {stuck_after_s:g} s; "
                "a rank hangs, or stuck_after_s is too short for them"
            )
        return False

    # What happens to a message.

    def _next(self) -> Message | None:
        if self._source is None:
            return self._inbox.get()
        message = self._source()
        self._hold(1)
        self._traffic.sent()
        return message

    def _computed(self, message: Message) -> Message:
        began = time.monotonic()
        try:
            result = Message(message.batch_id, self._compute(message.body))
            self._synchronize()
        except Exception as error:
            self._synchronize()  # raises again if the cause is a lost device and not the micro-batch
            where = "".join(traceback.format_exception(error))
            error.add_note(f"On rank {self._rank}:\n{where}")
            # Only the note is sent on; tracebacks and causes would keep tensors alive by their frames.
            error.__cause__ = error.__context__ = error.__traceback__ = None
            result = Message(message.batch_id, None, error)
        self._busy_s += time.monotonic() - began
        self._num_computed += 1
        return result

    def _agreed(self, message: Message) -> Message:
        error = self._agree(message.batch_id, message.error)
        return message if error is message.error else Message(message.batch_id, None, error)

    def _synchronize(self) -> None:
        """Waits for the GPU after each micro-batch.

        So the result may be sent at once, by a stream that is independent of compute; errors belong to this
        micro-batch alone; and rank 0 takes the next micro-batch no sooner than the GPU has time for it.
        """
        accelerator.synchronize_stream(self._device)

    def _arrive(self, message: Message) -> None:
        """Handles a message that has arrived: before compute on a worker, or back at rank 0."""
        if self._sink is None:
            self._hold(1)
            self._inbox.put(message)
        else:
            self._traffic.received()
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
        """Makes later errors be ignored. Returns True to the first caller only."""
        with self._lock:
            was_over, self._is_over = self._is_over, True
        return not was_over

    def _stop_threads(self, *last_words: Message) -> None:
        """Ends all threads but those that wait for the source or for a neighbour."""
        for message in (*last_words, None):
            self._outbox.put(message)
        self._inbox.put(None)
        self._traffic.stop()

    def _join(self, *names: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for thread in (self._threads[name] for name in names if name in self._threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

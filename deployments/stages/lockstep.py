"""Calls in step: one runs at a time, in a thread of its own, and all that wait are answered together.

So code that is not thread-safe, such as a tokenizer, runs for several requests that share what is dear.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
Ask = Callable[[Any], Any]
"""A question to its answer: waits for it, in a call's own thread. Raises an answer that is an exception."""
Answer = Callable[[Sequence[Any]], Sequence[Any]]
"""The questions of all calls that have not ended, to an answer for each. What it raises, they raise."""

_ENDED = object()


def run_in_step(calls: Sequence[Callable[[Ask], Result]], answer: Answer) -> list[Result | Exception]:
    """What each of them returned or raised. `answer` runs in the thread of the caller."""
    with ThreadPoolExecutor(len(calls), thread_name_prefix="in step") as threads:
        begun = [_Call(call, threads) for call in calls]
        asking = [call for call in begun if call.go_on(None)]
        while asking:
            try:
                answers = answer([call.question for call in asking])
            except BaseException as error:  # nobody would wake them
                answers = [error] * len(asking)
            asking = [call for call, given in zip(asking, answers, strict=True) if call.go_on(given)]
        return [call.outcome for call in begun]


class _Call(Generic[Result]):
    def __init__(self, call: Callable[[Ask], Result], threads: ThreadPoolExecutor) -> None:
        self._given, self._asked = SimpleQueue[Any](), SimpleQueue[Any]()
        self.question: Any = None
        self._running = threads.submit(self._run, call)

    def go_on(self, answer: Any) -> bool:
        """Let it run until it asks for something, or ends: whether it asks."""
        self._given.put(answer)
        self.question = self._asked.get()
        return self.question is not _ENDED

    @property
    def outcome(self) -> Result | Exception:
        """Once it has ended."""
        error = self._running.exception()
        if error is None:
            return self._running.result()
        if isinstance(error, Exception):
            return error
        raise error

    def _run(self, call: Callable[[Ask], Result]) -> Result:
        self._given.get()
        try:
            return call(self._ask)
        finally:
            self._asked.put(_ENDED)

    def _ask(self, question: Any) -> Any:
        self._asked.put(question)
        answer = self._given.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

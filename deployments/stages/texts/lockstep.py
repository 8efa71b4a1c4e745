"""Runs calls in lockstep: each in a thread of its own, one at a time; the questions of all are answered together.

So code that is not thread-safe, such as a tokenizer, can run for several requests that share expensive work.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
Ask = Callable[[Any], Any]
"""question -> answer. Blocks the call's own thread, and raises an answer that is an exception."""
Answer = Callable[[Sequence[Any]], Sequence[Any]]
"""(the questions of all calls that have not ended) -> an answer for each. Each call raises what this raises."""

_ENDED = object()


def run_in_step(calls: Sequence[Callable[[Ask], Result]], answer: Answer) -> list[Result | Exception]:
    """Returns what each call returned or raised. `answer` runs in the caller's thread."""
    with ThreadPoolExecutor(len(calls), thread_name_prefix="in step") as threads:
        begun = [_Call(call, threads) for call in calls]
        asking = [call for call in begun if call.go_on(None)]
        while asking:
            try:
                answers = answer([call.question for call in asking])
            except BaseException as error:  # the calls must not wait without end
                answers = [error] * len(asking)
            asking = [call for call, given in zip(asking, answers, strict=True) if call.go_on(given)]
        return [call.outcome for call in begun]


class _Call(Generic[Result]):
    def __init__(self, call: Callable[[Ask], Result], threads: ThreadPoolExecutor) -> None:
        self._given, self._asked = SimpleQueue[Any](), SimpleQueue[Any]()
        self.question: Any = None
        self._running = threads.submit(self._run, call)

    def go_on(self, answer: Any) -> bool:
        """Lets the call run until it asks a question or ends; returns whether it asks one."""
        self._given.put(answer)
        self.question = self._asked.get()
        return self.question is not _ENDED

    @property
    def outcome(self) -> Result | Exception:
        """What the call returned or raised. To be read once it has ended."""
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

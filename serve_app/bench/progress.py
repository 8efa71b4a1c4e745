"""The progress of a benchmark: a bar on a terminal, and lines in a log."""

from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import TaskID


class Progress(rich.progress.Progress):
    """Rich's progress display on stderr, which also writes a line for every tenth and every new description if
    stderr is no terminal. Rich alone would write nothing there until the end."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console=console or Console(stderr=True))
        self._logged: dict[TaskID, tuple[str, int]] = {}

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        self._log(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._log(task_id)

    def _log(self, task_id: TaskID) -> None:
        task = self._tasks[task_id]
        now = (task.description, int(task.percentage // 10))
        if self.console.is_terminal or self._logged.get(task_id) == now:
            return
        self._logged[task_id] = now
        self.console.print(f"{task.description}: {task.percentage:.0f} %, {task.elapsed or 0.0:.0f} s")

"""Shows how an app starts: on a terminal, one live line per deployment; otherwise, one line per change."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

READY = "ready"


class StartProgress:
    """A context manager that shows the states. Other output to the console appears above them."""

    def __init__(self, console: Console) -> None:
        self._console, self._began = console, time.monotonic()
        self._states: dict[str, str] = {}
        self._ready_s: dict[str, float] = {}
        self._spinner = Spinner("dots")
        self._live = Live(console=console, transient=True, auto_refresh=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, states: Mapping[str, str]) -> None:
        """states: of all known deployments, by name; a state may say what the deployment waits for."""
        passed_s = time.monotonic() - self._began
        for name, state in states.items():
            if state == READY:
                self._ready_s.setdefault(name, passed_s)
            if self._live is None and self._states.get(name) != state:
                self._console.print(f"relay: {name}: {state} ({passed_s:.0f} s)", highlight=False, soft_wrap=True)
        self._states = dict(states)
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, state in self._states.items():
            is_ready = state == READY
            passed_s = self._ready_s.get(name, time.monotonic() - self._began)
            table.add_row("✓" if is_ready else self._spinner, name, state, f"{passed_s:.0f} s")
        return table

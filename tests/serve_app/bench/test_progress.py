"""Tests of the progress that a benchmark reports."""

import io

from rich.console import Console

from serve_app.bench.progress import Progress


def test_a_log_gets_a_line_for_each_tenth_and_each_new_description() -> None:
    log = io.StringIO()
    with Progress(Console(file=log)) as progress:
        task = progress.add_task("start", total=40)
        for _ in range(20):
            progress.advance(task)
        progress.update(task, description="flux, 64x64")
        while_it_runs = log.getvalue().splitlines()
    parts = [line.split(",")[0] for line in while_it_runs[:-1]]
    assert parts == ["start: 2 %", "start: 10 %", "start: 20 %", "start: 30 %", "start: 40 %", "start: 50 %"]
    assert while_it_runs[-1].startswith("flux, 64x64: 50 %, ")


def test_a_terminal_gets_a_bar_instead() -> None:
    terminal = io.StringIO()
    with Progress(Console(file=terminal, force_terminal=True)) as progress:
        list(progress.track(range(4), description="rounds"))
    assert "rounds" in terminal.getvalue()
    assert " %, " not in terminal.getvalue()

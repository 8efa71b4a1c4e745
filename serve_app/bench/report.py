"""Shows the result of a benchmark: a table, the machine that it ran on, and JSON on request."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.machines.machine import describe_machine

Row = Mapping[str, str | int | float]


def report(title: str, rows: Sequence[Row], json_file: Path | None) -> None:
    """Print rows (which share their keys) as a table; write {"machine": ..., "rows": [...]} if asked."""
    print_rows(title, rows)
    if json_file is not None:
        write_rows(rows, json_file)


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Prints rows, which share their keys, as a table with this machine as its caption."""
    machine = describe_machine()
    table = Table(*rows[0], title=title, caption=", ".join(f"{k} {v}" for k, v in machine.items()))
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    Console().print(table)


def print_columns(title: str, rows: Sequence[Row]) -> None:
    """Prints one column per row, which fits narrow terminals. A row's first value is the column's head."""
    first, *keys = dict.fromkeys(key for row in rows for key in row)
    table = Table(first, *(str(row[first]) for row in rows), title=title)
    for key in keys:
        table.add_row(key, *(_cell(row.get(key, "")) for row in rows))
    Console().print(table)


def write_rows(rows: Sequence[Row], json_file: Path) -> None:
    """Writes the rows with a description of this machine, as JSON."""
    document = {"machine": describe_machine(), "rows": list(rows)}
    json_file.write_text(json.dumps(document, indent=1) + "\n")


def _cell(value: str | int | float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

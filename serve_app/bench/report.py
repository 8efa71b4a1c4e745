"""How every benchmark shows its result: a table, the machine it ran on, and JSON on request."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.machine import describe_machine

Row = Mapping[str, str | int | float]


def report(title: str, rows: Sequence[Row], json_file: Path | None) -> None:
    """Print rows (which share their keys) as a table; write {"machine": ..., "rows": [...]} if asked."""
    machine = describe_machine()
    table = Table(*rows[0], title=title, caption=", ".join(f"{k} {v}" for k, v in machine.items()))
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    Console().print(table)
    if json_file is not None:
        write_rows(rows, json_file)


def write_rows(rows: Sequence[Row], json_file: Path) -> None:
    """With the machine that they are of: this one."""
    document = {"machine": describe_machine(), "rows": list(rows)}
    json_file.write_text(json.dumps(document, indent=1) + "\n")

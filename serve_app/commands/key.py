"""`relay key`: creates, lists and revokes API keys."""

from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from cluster.config import describe_errors
from serve_app.auth.config import KEYS_FILE
from serve_app.auth.keys import KeyFault, KeyLimits, Period, new_key, read_keys, write_keys

key = typer.Typer(no_args_is_help=True, help="Manage the keys that clients must send if the config has `auth`.")
console = Console(stderr=True, highlight=False, soft_wrap=True)
File = Annotated[Path, typer.Option("--file", help="the file that auth.keys_file in a config names")]


@key.command()
def create(
    name: Annotated[str, typer.Argument(help="name of the key, shown in logs and metrics")],
    file: File = Path(KEYS_FILE),
    requests_per_minute: Annotated[int | None, typer.Option(help="default: no limit")] = None,
    max_concurrent_requests: Annotated[
        int | None, typer.Option(help="requests in progress at once; default: no limit")
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="megapixel-steps of one request; default: no limit")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="megapixel-steps per period; default: no limit")] = None,
    per: Annotated[Period, typer.Option(help="period of the budget")] = "day",
) -> None:
    """Make a key and print it. It is never shown again: only its hash is kept."""
    limits = {
        "requests_per_minute": requests_per_minute,
        "max_concurrent_requests": max_concurrent_requests,
        "max_megapixel_steps": max_cost,
        "budget_megapixel_steps": budget,
        "budget_period": per,
    }
    try:
        secret, made = new_key(name, KeyLimits.model_validate(limits))
    except ValidationError as error:
        raise KeyFault(describe_errors(error)) from None
    file = file.expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file):
        keys = read_keys(file) if file.exists() else ()
        if any(each.name == name for each in keys):
            raise KeyFault(f"{file} already has a key {name!r}: revoke it, or give the new one another name")
        write_keys(file, [*keys, made])
    console.print(
        f"{file}: created the key {name!r}. It is shown only now, because the file keeps only its hash:",
        style="green",
    )
    print(secret)


@key.command(name="list")
def list_keys(file: File = Path(KEYS_FILE)) -> None:
    """List the keys and their limits."""
    table = Table("name", "created", "a minute", "at once", "one request", "budget", box=None, pad_edge=False)
    for each in read_keys(file.expanduser()):
        limits = each.limits
        budget = limits.budget_megapixel_steps
        table.add_row(
            each.name,
            str(each.created),
            str(limits.requests_per_minute or "any"),
            str(limits.max_concurrent_requests or "any"),
            "any" if limits.max_megapixel_steps is None else f"{limits.max_megapixel_steps:g} megapixel-steps",
            "any" if budget is None else f"{budget:g} megapixel-steps a {limits.budget_period}",
        )
    Console().print(table)


@key.command()
def revoke(name: Annotated[str, typer.Argument(help="name of the key")], file: File = Path(KEYS_FILE)) -> None:
    """Revoke a key: a running server rejects it within two seconds."""
    file = file.expanduser()
    with _locked(file):
        keys = read_keys(file)
        left = [each for each in keys if each.name != name]
        if len(left) == len(keys):
            names = ", ".join(each.name for each in keys) or "none"
            raise KeyFault(f"{file} has no key {name!r}; it has: {names}")
        write_keys(file, left)
    console.print(f"{file}: the key {name!r} is revoked", style="green")


def _locked(file: Path) -> FileLock:
    """Returns a lock for the key file: of two commands at once, one would overwrite the other's change."""
    return FileLock(file.with_name(f".{file.name}.lock"))

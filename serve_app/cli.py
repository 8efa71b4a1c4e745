"""The `relay` command. The only module that reads or sets the process's environment."""

import importlib
import importlib.metadata
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deployments.checkpoints.tiny.names import TINY_MODULES
from deployments.stages.imports import silence_imports
from serve_app.auth.keys import KeyFault
from serve_app.commands.bench import bench
from serve_app.commands.config_docs import render_config_docs
from serve_app.commands.generate import generate_command
from serve_app.commands.key import key
from serve_app.commands.plan import plan_command, profile_command
from serve_app.commands.ray_environment import RAY_ENVIRONMENT
from serve_app.commands.serve import serve_command
from serve_app.commands.status import NoStatus, fetch_status, render_status, watch_status
from serve_app.config.app import ConfigError
from serve_app.errors import RelayError

cli = typer.Typer(
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)
cli.add_typer(bench, name="bench")
cli.add_typer(key, name="key")
cli.command(name="generate")(generate_command)
cli.command(name="plan")(plan_command)
cli.command(name="profile")(profile_command)
cli.command(name="serve")(serve_command)
console = Console(stderr=True)

TINY = "deployments.checkpoints.tiny.write"
SHAPES = "deployments.training.shapes.train"
FAMILIES_DOCS = "serve_app.commands.families_docs"
"""Modules that import torch and diffusers, so only the commands that need them load them."""


def main() -> None:
    """Entry point of the console script."""
    os.environ.update(RAY_ENVIRONMENT | os.environ)
    silence_imports()
    try:
        cli()
    except (ConfigError, RelayError, KeyFault, NoStatus, FileExistsError, FileNotFoundError) as error:
        message = error.message if isinstance(error, RelayError) else str(error)
        console.print(f"relay: {message}", style="red", highlight=False, soft_wrap=True)
        raise SystemExit(2) from error


def tell_version(is_asked: bool) -> None:
    if is_asked:
        print(
            ", ".join(
                f"{name} {importlib.metadata.version(name)}" for name in ("latent-relay", "ray", "diffusers")
            )
        )
        raise typer.Exit


@cli.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=tell_version, is_eager=True, help="print the versions")
    ] = False,
) -> None:
    """Latent Relay: diffusion models over several GPUs."""


@cli.command()
def tiny(
    name: Annotated[str, typer.Argument(help=f"one of: {', '.join(TINY_MODULES)}")],
    out_dir: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
) -> None:
    """Write a complete checkpoint of random weights, in diffusers' layout, for tests and trials."""
    if name not in TINY_MODULES:
        raise typer.BadParameter(f"unknown checkpoint {name!r}; allowed: {', '.join(TINY_MODULES)}")
    importlib.import_module(TINY).write_tiny_checkpoint(name, out_dir)
    size = sum(path.stat().st_size for path in out_dir.rglob("*") if path.is_file())
    console.print(f"wrote {out_dir} ({size / 2**20:.1f} MiB)")


@cli.command()
def train_shapes(
    out_dir: Annotated[Path, typer.Argument(help="a new folder, or the folder of a training to continue")],
) -> None:
    """Train the `shapes` checkpoint: about 90 minutes on 2 idle cores. Run it again if it was interrupted."""
    checkpoint = importlib.import_module(SHAPES).train_shapes(out_dir, console=console)
    console.print(f"wrote {checkpoint}")


@cli.command()
def status(
    url: Annotated[str, typer.Option(help="URL of the running server")] = "http://127.0.0.1:8000",
    watch: Annotated[bool, typer.Option("--watch", help="update until interrupted")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print all of GET /v1/status, as JSON")] = False,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="RELAY_API_KEY", show_envvar=True, help="API key, if the server requires one"),
    ] = None,
) -> None:
    """Show replicas, queues, work and memory of every stage."""
    terminal = Console()
    if watch:
        watch_status(url, terminal, api_key)
    elif as_json:
        terminal.print_json(data=fetch_status(url, api_key))
    else:
        terminal.print(render_status(fetch_status(url, api_key)))


@cli.command()
def config() -> None:
    """Explain every config key (docs/config.md)."""
    print(render_config_docs(), end="")


@cli.command()
def families() -> None:
    """List diffusers' pipelines, and how they are served (docs/families.md). Makes the tiny checkpoints first."""
    print(importlib.import_module(FAMILIES_DOCS).render_families_docs(), end="")

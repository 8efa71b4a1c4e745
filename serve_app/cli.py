"""`relay`: what is done from a shell. The only place that reads or sets the process's environment."""

import importlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from deployments.checkpoints.tiny.names import TINY_MODULES
from deployments.stages.imports import silence_imports
from serve_app.bench_cli import bench
from serve_app.config import ConfigError, load_app_config
from serve_app.config_docs import render_config_docs
from serve_app.errors import RelayError
from serve_app.files import resolve_family
from serve_app.plan_cli import plan_command, profile_command
from serve_app.ray_environment import RAY_ENVIRONMENT
from serve_app.serve_cli import serve_command
from serve_app.status import NoStatus, fetch_status, status_table, watch_status
from serve_app.validation import Validator

if TYPE_CHECKING:
    from serve_app.generation import Picture

cli = typer.Typer(
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)
cli.add_typer(bench, name="bench")
cli.command(name="plan")(plan_command)
cli.command(name="profile")(profile_command)
cli.command(name="serve")(serve_command)
console = Console(stderr=True)

TINY = "deployments.checkpoints.tiny.write"
SHAPES = "deployments.checkpoints.shapes.train"
FAMILIES_DOCS = "serve_app.families_docs"
"""All import torch and diffusers, so they are looked up only by the command that needs them."""
LOCAL = "serve_app.local"
GENERATION = "serve_app.generation"
"""Both import Ray, likewise."""

FORMATS: dict[str, dict[str, dict[str, str]]] = {
    "image": {
        ".png": {"output_format": "png"},
        ".jpg": {"output_format": "jpeg"},
        ".jpeg": {"output_format": "jpeg"},
        ".webp": {"output_format": "webp"},
    },
    "video": {".mp4": {}},
}
"""What a file's ending asks for; the first is the one by default."""


def main() -> None:
    """Console script."""
    os.environ.update(RAY_ENVIRONMENT | os.environ)
    silence_imports()
    try:
        cli()
    except (ConfigError, RelayError, NoStatus, FileExistsError, FileNotFoundError) as error:
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
        bool, typer.Option("--version", callback=tell_version, is_eager=True, help="tell the versions")
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
    out_dir: Annotated[Path, typer.Argument(help="a new folder, or that of a training to go on with")],
) -> None:
    """Train the `shapes` checkpoint anew: about an hour on 2 idle cores; run it again if it was interrupted."""
    checkpoint = importlib.import_module(SHAPES).train_shapes(out_dir, console=console)
    console.print(f"wrote {checkpoint}")


@cli.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="what to draw")],
    out: Annotated[
        Path | None, typer.Option(help="file; its ending chooses the format; out.png, or out.mp4 of a video model")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Serve YAML to start; left out: the running app is asked")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    size: Annotated[str, typer.Option(help='"WIDTHxHEIGHT" in pixels, or "auto"')] = "auto",
    steps: Annotated[int | None, typer.Option(help="denoising steps; the model's default")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="the model's default")] = None,
    true_cfg_scale: Annotated[float | None, typer.Option(help="the model's default")] = None,
    seed: Annotated[int | None, typer.Option(help="random if left out")] = None,
    num_frames: Annotated[int | None, typer.Option(help="of a video")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="file to draw anew, or a video's first picture; several: say it again",
        ),
    ] = None,
    video: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="file to draw anew, MP4 or WebM")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="file: what is transparent, or white, is drawn anew"),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="from 0 to 1, how much of the image, or video, is drawn anew")
    ] = None,
    control: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="file that a ControlNet draws by")
    ] = None,
    control_scale: Annotated[float | None, typer.Option(help="how loud the ControlNet is")] = None,
) -> None:
    """Make one picture or video, by a running app or by one started for it."""
    local = importlib.import_module(LOCAL)
    if config is None and not local.is_running():
        raise ConfigError("no running app found: start one (`make serve`), or name a --config to start")
    fields = {
        "prompt": prompt,
        "size": size,
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "true_cfg_scale": true_cfg_scale,
        "seed": seed,
        "num_frames": num_frames,
        "strength": strength,
        "control_scale": control_scale,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    app_config = None if config is None else load_app_config(config)
    if app_config is not None:  # refuse at once what would be refused once the app is started
        validator = Validator(resolve_family(app_config).model, app_config.limits)
        media = validator.family.media
        pictures = read_pictures(image or [], mask, control, video, media)
        validator.requests(given | pictures | choose_file(out, media)[1])
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # `nohup` has it ignored
        signal.signal(signal.SIGHUP, lambda number, _frame: sys.exit(128 + number))
    with local.app_handle(app_config) as handle:
        media = handle.model.remote().result().media
        out, chosen = choose_file(out, media)
        picture = _watch(handle, given | read_pictures(image or [], mask, control, video, media) | chosen)
    out.write_bytes(picture.media.data)
    times = ", ".join(f"{stage} {ms:.0f} ms" for stage, ms in picture.timings_ms.items())
    console.print(f"{out}: {picture.media.media_type}, seed {picture.seed} ({times})", highlight=False)


@cli.command()
def status(
    url: Annotated[str, typer.Option(help="of the running server")] = "http://127.0.0.1:8000",
    watch: Annotated[bool, typer.Option("--watch", help="go on until interrupted")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="everything, as GET /v1/status tells it")] = False,
) -> None:
    """Replicas, queues, work and memory of every stage, at a glance."""
    terminal = Console()
    if watch:
        watch_status(url, terminal)
    elif as_json:
        terminal.print_json(data=fetch_status(url))
    else:
        terminal.print(status_table(fetch_status(url)))


@cli.command()
def config() -> None:
    """Explain every config key (docs/config.md)."""
    print(render_config_docs(), end="")


@cli.command()
def families() -> None:
    """Which of diffusers' pipelines are served, and how (docs/families.md); builds the tiny checkpoints first."""
    print(importlib.import_module(FAMILIES_DOCS).render_families_docs(), end="")


def choose_file(out: Path | None, media: Literal["image", "video"]) -> tuple[Path, dict[str, str]]:
    """Where a picture or video goes, and the fields of a request that make it what its ending says."""
    formats = FORMATS[media]
    if out is None:
        out = Path("out").with_suffix(next(iter(formats)))
    if out.suffix.lower() not in formats:
        raise ConfigError(f"--out {out}: this model makes {media}s; the file must end in {', '.join(formats)}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist")
    return out, formats[out.suffix.lower()]


def read_pictures(
    images: Sequence[Path],
    mask: Path | None,
    control: Path | None,
    video: Path | None,
    media: Literal["image", "video"],
) -> dict[str, bytes | list[bytes]]:
    """The fields of a request with these files."""
    fields: dict[str, bytes | list[bytes]] = {}
    if media == "video" and len(images) == 1:
        fields["input_reference"] = images[0].read_bytes()
    elif images:
        fields["image"] = [image.read_bytes() for image in images]
    if video is not None:
        if images:
            raise ConfigError("--video and --image: a video is made of one of them")
        fields["input_reference"] = video.read_bytes()
    if mask is not None:
        fields["mask"] = mask.read_bytes()
    if control is not None:
        fields["control_image"] = control.read_bytes()
    return fields


def _watch(handle: Any, fields: dict[str, Any]) -> "Picture":
    """The only picture, with a progress bar on the way."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("encoding", total=None)
        picture_class = importlib.import_module(GENERATION).Picture
        stream = handle.options(stream=True).stream.remote(**fields)
        try:
            for item in stream:
                if isinstance(item.news, picture_class):
                    return cast("Picture", item.news)
                step = item.news
                description = {"denoise": "denoising", "decode": "decoding"}[step.phase]
                progress.update(task, description=description, completed=step.step, total=step.num_steps)
        except (KeyboardInterrupt, SystemExit):  # Ray makes one of SIGTERM
            stream.cancel()
            with suppress(Exception):  # it ends by an error once it is cancelled
                next(stream)
            raise
    raise AssertionError("the stream ended without a picture")

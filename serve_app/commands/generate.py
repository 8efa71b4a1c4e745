"""`relay generate`: makes one image or video with the running app, or with one that is started for it."""

import importlib
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from deployments.options.qos import Priority
from serve_app.config.app import AppConfig, ConfigError
from serve_app.config.checkpoint_files import resolve_family
from serve_app.config.serve_file import load_app_config
from serve_app.models.names import find_name
from serve_app.validation import Validator

if TYPE_CHECKING:
    from serve_app.flow.events import Picture

LOCAL = "serve_app.commands.local"
EVENTS = "serve_app.flow.events"
"""Modules that import Ray, so they are imported only when something is generated."""

Media = Literal["image", "video"]
FORMATS: Mapping[Media, Mapping[str, dict[str, str]]] = {
    "image": {
        ".png": {"output_format": "png"},
        ".jpg": {"output_format": "jpeg"},
        ".jpeg": {"output_format": "jpeg"},
        ".webp": {"output_format": "webp"},
    },
    "video": {".mp4": {}},
}
"""Request fields by the output file's suffix; the first suffix is the default."""
console = Console(stderr=True)


def _file(help_text: str, *names: str) -> Any:
    return typer.Option(*names, exists=True, dir_okay=False, help=help_text)


Scale = Annotated[float | None, typer.Option(help="default: the model's")]
Images = Annotated[list[Path] | None, _file("image to redraw, or first frame of a video; may be repeated")]


def generate_command(
    prompt: Annotated[str, typer.Argument(help="what to draw")],
    out: Annotated[
        Path | None, typer.Option(help="output file; its suffix chooses the format; default: out.png or out.mp4")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Serve YAML to start, or the name of a shipped one; default: use the running server"),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    size: Annotated[str, typer.Option(help='"WIDTHxHEIGHT" in pixels, or "auto"')] = "auto",
    num_inference_steps: Annotated[
        int | None, typer.Option("--steps", help="denoising steps; default: the model's")
    ] = None,
    model: Annotated[str | None, typer.Option(help="served model's name; default: the first")] = None,
    guidance_scale: Scale = None,
    guidance_scale_2: Annotated[
        float | None, typer.Option(help="guidance of the second expert; default: that of the first")
    ] = None,
    true_cfg_scale: Scale = None,
    quality: Annotated[
        Literal["high", "medium", "low"] | None, typer.Option(help="medium and low compute fewer steps")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME=SCALE of an adapter; may be repeated")
    ] = None,
    prompt_weighting: Annotated[
        bool | None, typer.Option(help="read (word)1.3 as a weight; default: yes if the model can")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="one of the model's `schedulers`; default: its own")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="default: random")] = None,
    priority: Annotated[
        Priority | None, typer.Option(help="order among waiting requests; default: normal")
    ] = None,
    deadline_s: Annotated[float | None, typer.Option(help="give up after this many seconds")] = None,
    user: Annotated[str | None, typer.Option(help="name of the user; users get fair shares")] = None,
    num_frames: Annotated[int | None, typer.Option(help="frames of a video; default: the model's")] = None,
    seconds: Annotated[float | None, typer.Option(help="length of a video, instead of frames")] = None,
    fps: Annotated[int | None, typer.Option(help="frames per second of a video; default: the model's")] = None,
    image: Images = None,
    video: Annotated[Path | None, _file("video to redraw, MP4 or WebM")] = None,
    mask: Annotated[Path | None, _file("mask file; its transparent or white parts are redrawn")] = None,
    strength: Annotated[float | None, typer.Option(help="how much is redrawn, from 0 to 1")] = None,
    control_image: Annotated[Path | None, _file("input of the ControlNet", "--control")] = None,
    control_scale: Annotated[float | None, typer.Option(help="weight of the ControlNet")] = None,
) -> None:
    """Make one image or video, with the running server or with one that it starts."""
    _generate({name: value for name, value in locals().items() if value not in (None, [])})


def _generate(options: dict[str, Any]) -> None:
    """options: by name; all but `out` and `config` are fields of the request."""
    out, config = options.pop("out", None), options.pop("config", None)
    if "lora" in options:
        options["lora"] = [_read_lora(each) for each in options["lora"]]
    app_config = None if config is None else load_app_config(config)
    _check(options, out, app_config)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # under `nohup` it is ignored
        signal.signal(signal.SIGHUP, lambda number, _frame: sys.exit(128 + number))
    with importlib.import_module(LOCAL).app_handle(app_config) as handle:
        media = handle.model.remote(options.get("model")).result().media
        out, chosen = choose_file(out, media)
        picture = _watch(handle, read_files(options, media) | chosen)
    out.write_bytes(picture.media.data)
    times = ", ".join(f"{stage} {ms:.0f} ms" for stage, ms in picture.timings_ms.items())
    console.print(f"{out}: {picture.media.media_type}, seed {picture.seed} ({times})", highlight=False)
    for warning in picture.warnings:
        console.print(f"relay: {warning}", style="yellow", highlight=False)


def _read_lora(text: str) -> dict[str, Any]:
    name, _, scale = text.partition("=")
    try:
        return {"name": name} | ({"scale": float(scale)} if scale else {})
    except ValueError:
        raise ConfigError(f"--lora {text}: the scale after = must be a number, got {scale!r}") from None


def _check(fields: Mapping[str, Any], out: Path | None, app_config: AppConfig | None) -> None:
    """Rejects at once what a started app would reject. Raises ConfigError or BadRequest."""
    if app_config is not None:
        served = {each.name: each.model for each in resolve_family(app_config).served}
        name = next(iter(served)) if "model" not in fields else find_name(fields["model"], served)
        validator = Validator(served[name], app_config.limits)
        media = validator.family.media
        validator.requests(read_files(fields, media) | choose_file(out, media)[1])
    elif not importlib.import_module(LOCAL).is_running():
        raise ConfigError("no running app found: start one (`relay serve CONFIG`), or name a --config to start")


def choose_file(out: Path | None, media: Media) -> tuple[Path, dict[str, str]]:
    """Returns the output file, and the request fields for the format that its suffix names. Raises ConfigError."""
    formats = FORMATS[media]
    if out is None:
        out = Path("out").with_suffix(next(iter(formats)))
    if out.suffix.lower() not in formats:
        raise ConfigError(f"--out {out}: this model makes {media}s; the file must end in {', '.join(formats)}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist")
    return out, formats[out.suffix.lower()]


def read_files(fields: Mapping[str, Any], media: Media) -> dict[str, Any]:
    """Returns the fields with the files' contents in place of their paths. Raises ConfigError."""
    named = dict(fields)
    if "video" in named and "image" in named:
        raise ConfigError("--video and --image do not combine: give one of them")
    if "video" in named:
        named["input_reference"] = named.pop("video")
    elif media == "video" and len(named.get("image", ())) == 1:
        [named["input_reference"]] = named.pop("image")
    return {name: _read(value) for name, value in named.items()}


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(each) for each in value]
    return value.read_bytes() if isinstance(value, Path) else value


def _watch(handle: Any, fields: Mapping[str, Any]) -> "Picture":
    """Runs the request with a progress bar, and returns its only image or video."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("encoding", total=None)
        picture_class = importlib.import_module(EVENTS).Picture
        stream = handle.options(stream=True).stream.remote(**fields)
        try:
            for item in stream:
                if isinstance(item.payload, picture_class):
                    return cast("Picture", item.payload)
                step = item.payload
                description = {"denoise": "denoising", "decode": "decoding"}[step.phase]
                progress.update(task, description=description, completed=step.step, total=step.num_steps)
        except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into SystemExit
            stream.cancel()
            with suppress(Exception):  # a cancelled stream ends with an error
                next(stream)
            raise
    raise AssertionError("the stream ended without an image")

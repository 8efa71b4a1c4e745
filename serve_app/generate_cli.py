"""`relay generate`: one picture or video, by a running app or by one started for it."""

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

from serve_app.config import AppConfig, ConfigError, load_app_config
from serve_app.files import resolve_family
from serve_app.validation import Validator

if TYPE_CHECKING:
    from serve_app.generation import Picture

LOCAL = "serve_app.local"
GENERATION = "serve_app.generation"
"""Both import Ray, so they are looked up only when something is to be generated."""

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
"""What a file's ending asks for; the first is the one by default."""
console = Console(stderr=True)


def _file(help_text: str, *names: str) -> Any:
    return typer.Option(*names, exists=True, dir_okay=False, help=help_text)


Scale = Annotated[float | None, typer.Option(help="the model's default")]
Images = Annotated[
    list[Path] | None, _file("file to draw anew, or a video's first picture; several: say it again")
]


def generate_command(
    prompt: Annotated[str, typer.Argument(help="what to draw")],
    out: Annotated[
        Path | None, typer.Option(help="file; its ending chooses the format; out.png, or out.mp4 of a video model")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Serve YAML to start; left out: the running app is asked")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    size: Annotated[str, typer.Option(help='"WIDTHxHEIGHT" in pixels, or "auto"')] = "auto",
    num_inference_steps: Annotated[
        int | None, typer.Option("--steps", help="denoising steps; the model's default")
    ] = None,
    guidance_scale: Scale = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="of a second expert; as the first's")] = None,
    true_cfg_scale: Scale = None,
    quality: Annotated[
        Literal["high", "medium", "low"] | None, typer.Option(help="medium and low: fewer steps compute")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME=SCALE of an adapter; several: say it again")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="random if left out")] = None,
    num_frames: Annotated[int | None, typer.Option(help="of a video; the model's default")] = None,
    seconds: Annotated[float | None, typer.Option(help="of a video, in place of frames")] = None,
    fps: Annotated[int | None, typer.Option(help="frames a second of a video; the model's default")] = None,
    image: Images = None,
    video: Annotated[Path | None, _file("file to draw anew, MP4 or WebM")] = None,
    mask: Annotated[Path | None, _file("file: what is transparent, or white, is drawn anew")] = None,
    strength: Annotated[float | None, typer.Option(help="from 0 to 1, how much is drawn anew")] = None,
    control_image: Annotated[Path | None, _file("file that a ControlNet draws by", "--control")] = None,
    control_scale: Annotated[float | None, typer.Option(help="how loud the ControlNet is")] = None,
) -> None:
    """Make one picture or video, by a running app or by one started for it."""
    _generate({name: value for name, value in locals().items() if value not in (None, [])})


def _generate(options: dict[str, Any]) -> None:
    """options: all but two are fields of the request, and named as they are."""
    out, config = options.pop("out", None), options.pop("config", None)
    if "lora" in options:
        options["lora"] = [_read_lora(each) for each in options["lora"]]
    app_config = None if config is None else load_app_config(config)
    _check(options, out, app_config)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # `nohup` has it ignored
        signal.signal(signal.SIGHUP, lambda number, _frame: sys.exit(128 + number))
    with importlib.import_module(LOCAL).app_handle(app_config) as handle:
        media = handle.model.remote().result().media
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
        raise ConfigError(f"--lora {text}: the scale behind = is a number, got {scale!r}") from None


def _check(fields: Mapping[str, Any], out: Path | None, app_config: AppConfig | None) -> None:
    """Refuses at once what would be refused once an app is started. Raises ConfigError, or BadRequest."""
    if app_config is not None:
        validator = Validator(resolve_family(app_config).model, app_config.limits)
        media = validator.family.media
        validator.requests(read_files(fields, media) | choose_file(out, media)[1])
    elif not importlib.import_module(LOCAL).is_running():
        raise ConfigError("no running app found: start one (`make serve`), or name a --config to start")


def choose_file(out: Path | None, media: Media) -> tuple[Path, dict[str, str]]:
    """Where a picture or video goes, and the fields of a request that make it what its ending says."""
    formats = FORMATS[media]
    if out is None:
        out = Path("out").with_suffix(next(iter(formats)))
    if out.suffix.lower() not in formats:
        raise ConfigError(f"--out {out}: this model makes {media}s; the file must end in {', '.join(formats)}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist")
    return out, formats[out.suffix.lower()]


def read_files(fields: Mapping[str, Any], media: Media) -> dict[str, Any]:
    """The same fields, with what the files hold in place of their paths."""
    named = dict(fields)
    if "video" in named and "image" in named:
        raise ConfigError("--video and --image: a video is made of one of them")
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

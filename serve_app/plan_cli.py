"""`relay plan` and `relay profile`. What imports torch is looked up when a command needs it."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from cluster.inventory import parse_gpus
from deployments.config import ModelConfig
from deployments.plan.advice import Admitted
from deployments.plan.picture import draw_placement
from deployments.plan.plan import SizesOf, StageConfigs, plan
from deployments.plan.profile import Profile, read_profile, write_profile
from deployments.plan.propose import propose
from deployments.plan.report import plan_as_json, print_plan
from deployments.plan.sizes import default_size, largest
from deployments.request import MediaSize
from serve_app.config import APP_NAME, IMPORT_PATH, AppConfig, ConfigError, LimitsConfig, load_app_config
from serve_app.files import resolve_family

WIDTH = 110
"""Columns of a plan that goes into a file or a pipe."""
MAX_SIDE = 8192
"""Pixels. Of four times as many, FLUX's own pipeline cannot compute the noise levels."""

ConfigArgument = Annotated[Path | None, typer.Argument(help="Serve YAML")]
SizeOption = Annotated[
    list[str] | None,
    typer.Option("--size", help='"1024x1024", of a video "832x480x81"; several times; the defaults'),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="a checkpoint to propose a config for")]


def plan_command(
    config: ConfigArgument = None,
    gpus: Annotated[
        str, typer.Option(help='"2x16GiB", "2x(4x24GiB)" (two nodes of four), or a sum: "1x(8x80GiB)+2x(4x24GiB)"')
    ] = "",
    model: ModelOption = None,
    size: SizeOption = None,
    configs_dir: Annotated[
        Path | None, typer.Option("--configs", help="folder with the checkpoint's config files, to read instead")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="times from relay profile")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the plan to this file")] = None,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="also draw the placement into this file")] = None,
    out: Annotated[Path | None, typer.Option(help="write the proposed config here instead of printing it")] = None,
) -> None:
    """What fits where: bytes, working memory, cuts, placement, throughput. Reads configs, no weights."""
    try:
        inventory = parse_gpus(gpus) if gpus else ()
        app = _resolved(_app_config(config, model), configs_dir)
        sizes = _sizes(size, app.model)
        measured = None if profile is None else read_profile(profile)
        sizes_of = _sizes_of(app.model, configs_dir, sizes)
        stages = StageConfigs(app.encoder, app.transformer, app.vae)
        if config is None:
            if not inventory:
                raise ConfigError("a config is proposed for GPUs: say which by --gpus, such as 2x16GiB")
            app = app.model_copy(update={"limits": _limits(sizes), "model": _drawing(app.model, largest(sizes))})
            stages = propose(sizes_of, inventory, None if measured is None else measured.at(largest(sizes)))
        planned = plan(
            app.model.name,
            stages,
            sizes_of(stages),
            inventory,
            profile=measured,
            admitted=_admitted(app),
        )
    except (ValueError, KeyError) as error:
        raise ConfigError(str(error.args[0] if error.args else error)) from error
    print_plan(planned, Console(width=None if sys.stdout.isatty() else WIDTH))
    if json_file is not None:
        json_file.write_text(json.dumps(plan_as_json(planned), indent=1) + "\n")
    if svg_file is not None:
        if not inventory:
            raise ConfigError("a picture shows GPUs: say which by --gpus")
        svg_file.write_text(draw_placement(planned))
    if config is None:
        text = _render(app, stages, gpus)
        if out is None:
            print(text, end="")
        else:
            out.write_text(text)
    if planned.shortfalls:
        raise typer.Exit(1)


def profile_command(
    config: Annotated[Path, typer.Argument(help="Serve YAML")],
    out: Annotated[Path, typer.Option(help="file to write")] = Path("profile.json"),
    size: SizeOption = None,
    steps: Annotated[int, typer.Option(min=2, help="denoising steps to measure")] = 4,
) -> None:
    """Measure encode, every block and decode on this machine, for `relay plan --profile`. Loads the weights."""
    app = resolve_family(load_app_config(config))
    sizes = _sizes(size, app.model)
    stages = StageConfigs(app.encoder, app.transformer, app.vae)
    measure = importlib.import_module("deployments.plan.measure").measure
    machine = importlib.import_module("cluster.machine").describe_machine()
    times = measure(app.model, stages, sizes, num_steps=steps)
    write_profile(Profile(machine, app.model.checkpoint, times), out)
    for name, found in times.items():
        forwards = " and ".join(
            f"{of.num_forwards} forwards of {len(of.blocks_s)} blocks" for of in found.denoisers.values()
        )
        Console().print(
            f"{name}: encode {found.encode_s:.3g} s, denoise {found.rank_s(None):.3g} s in {forwards}, decode "
            f"{found.decode_s:.3g} s; wrote {out}",
            highlight=False,
        )


def _resolved(app: AppConfig, configs_dir: Path | None) -> AppConfig:
    """With what the checkpoint's configs say, or those in this folder."""
    if configs_dir is None:
        return resolve_family(app)
    said = app.model.model_dump(include={"checkpoint", "config", "components"})
    there = app.model.model_copy(update={"checkpoint": str(configs_dir), "config": None, "components": {}})
    found = resolve_family(app.model_copy(update={"model": there})).model
    return app.model_copy(update={"model": found.model_copy(update=said)})


def _app_config(path: Path | None, model: str | None) -> AppConfig:
    if path is not None and model is not None:
        raise ConfigError("a config names its model: leave out --model, or the config")
    if path is not None:
        return load_app_config(path)
    if model is None:
        raise ConfigError("nothing to plan: name a config, or a checkpoint by --model")
    name = re.sub(r"[^a-z0-9]+", "-", model.rpartition("/")[2].lower()).strip("-")
    return AppConfig(model=ModelConfig(name=name, checkpoint=model))


def _sizes(asked: list[str] | None, model: ModelConfig) -> tuple[MediaSize, ...]:
    """As asked, or the one a request gets by default."""
    default, multiple, own = default_size(model), model.geometry.size_multiple, model.geometry.sizes
    if not asked:
        return (default,)
    found = []
    for text in asked:
        match = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text)
        if match is None:
            raise ConfigError(f"--size {text!r} is no size: write 1024x1024, or 832x480x81 for a video")
        width, height, num_frames = int(match[1]), int(match[2]), int(match[3] or default.num_frames)
        if any(side % multiple or not multiple <= side <= MAX_SIDE for side in (width, height)):
            raise ConfigError(
                f"--size {text}: width and height must be multiples of {multiple}, {multiple} to {MAX_SIDE}"
            )
        if own and [width, height] not in map(list, own):
            raise ConfigError(f"--size {text}: this model draws {', '.join(f'{w}x{h}' for w, h in own)}")
        if not num_frames:
            raise ConfigError(f"--size {text}: a video has at least one frame")
        found.append(MediaSize(width, height, num_frames))
    return tuple(found)


def _limits(sizes: tuple[MediaSize, ...]) -> LimitsConfig:
    """No request that is larger than what is planned for."""
    most = largest(sizes)
    return LimitsConfig(max_pixels=most.width * most.height, max_num_frames=most.num_frames)


def _drawing(model: ModelConfig, size: MediaSize) -> ModelConfig:
    """By default what was planned for: the limits may admit no more."""
    if size == model.default_size:
        return model
    num_frames = size.num_frames if model.architecture.media == "video" else None
    said = {"width": size.width, "height": size.height, "num_frames": num_frames}
    return model.model_copy(update={"defaults": model.defaults.model_copy(update=said)})


def _admitted(app: AppConfig) -> Admitted:
    limits, own = app.limits, app.model.geometry.sizes
    most = max((width * height for width, height in own), default=limits.max_pixels)
    return Admitted(limits.max_concurrent_requests, min(limits.max_pixels, most), limits.max_num_frames)


def _sizes_of(model: ModelConfig, configs_dir: Path | None, sizes: tuple[MediaSize, ...]) -> SizesOf:
    description = importlib.import_module("deployments.plan.describe").Description(model, configs_dir)

    def sizes_of(stages: StageConfigs) -> Any:
        return description.sizes(stages.encoder, stages.transformer, stages.vae, sizes)

    return sizes_of


def _render(app: AppConfig, stages: StageConfigs, gpus: str) -> str:
    """A Serve YAML file."""
    args = {
        "model": app.model.model_dump(
            exclude_defaults=True, mode="json", exclude={"family"} if app.model.has_derived_family else None
        ),
        "encoder": stages.encoder.model_dump(exclude_defaults=True, mode="json"),
        "transformer": stages.transformer.model_dump(exclude_defaults=True, mode="json"),
        "vae": stages.vae.model_dump(exclude_defaults=True, mode="json"),
        "limits": app.limits.model_dump(exclude_defaults=True, mode="json"),
    }
    application = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": args,
    }
    served = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [application],
    }
    return f"# Planned for {gpus} by `relay plan`.\n" + yaml.safe_dump(served, sort_keys=False)

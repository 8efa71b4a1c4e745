"""`relay plan` and `relay profile`. Modules that import torch are imported when a command needs them."""

import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from cluster.machines.inventory import parse_gpus
from deployments.config.model import ModelConfig
from deployments.plan.picture import draw_placement
from deployments.plan.plan import Plan, SizesOf, StageConfigs
from deployments.plan.profile import Profile, read_profile, write_profile
from deployments.plan.report import plan_as_json, print_plan
from deployments.plan.sizes import default_size
from deployments.request import MediaSize
from serve_app.config.app import AppConfig, ConfigError
from serve_app.config.checkpoint_files import resolve_family
from serve_app.config.planning import plan_app, propose_app, stages_of
from serve_app.config.serve_file import APP_NAME, IMPORT_PATH, load_app_config
from serve_app.config.served_model import ServedModelConfig, deployed_name

WIDTH = 110
"""Width in columns of a plan that is printed into a file or a pipe."""
MAX_SIDE = 8192
"""Largest width or height in pixels. At four times this, FLUX's own pipeline cannot compute the noise levels."""

ConfigArgument = Annotated[Path | None, typer.Argument(help="Serve YAML, or the name of a shipped one")]
SizeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--size", help='"1024x1024", or "832x480x81" for a video; may be repeated; default: the model\'s'
    ),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model", help="checkpoint to propose a config for; if repeated, one server for all"),
]


def plan_command(
    config: ConfigArgument = None,
    gpus: Annotated[
        str, typer.Option(help='"2x16GiB", "2x(4x24GiB)" (two nodes of four), or a sum: "1x(8x80GiB)+2x(4x24GiB)"')
    ] = "",
    model: ModelOption = None,
    size: SizeOption = None,
    configs_dir: Annotated[
        Path | None,
        typer.Option("--configs", help="folder to read the checkpoint's config files from instead"),
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="file of times that `relay profile` wrote")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the plan to this file")] = None,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="also draw the placement into this file")] = None,
    out: Annotated[Path | None, typer.Option(help="write the proposed config here instead of printing it")] = None,
) -> None:
    """Plan what fits where: bytes, working memory, cuts, placement, throughput. Reads configs, no weights."""
    try:
        inventory = parse_gpus(gpus) if gpus else ()
        app = _resolved(_app_config(config, model), configs_dir)
        sizes = {served.name: _sizes(size, served.model) for served in app.served}
        measured = None if profile is None else read_profile(profile)
        sizes_of = {served.name: _sizes_of(served.model, configs_dir, sizes[served.name]) for served in app.served}
        if config is None:
            if not inventory:
                raise ConfigError("--model needs --gpus, such as --gpus 2x16GiB")
            app = propose_app(app, sizes, sizes_of, inventory, measured)
        plans = plan_app(app, sizes_of, inventory, measured)
    except (ValueError, KeyError) as error:
        raise ConfigError(str(error.args[0] if error.args else error)) from error
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for planned in plans:
        print_plan(planned, console)
    if json_file is not None:
        told = [plan_as_json(planned) for planned in plans]
        json_file.write_text(json.dumps(told[0] if len(told) == 1 else told, indent=1) + "\n")
    if svg_file is not None:
        _draw(plans, svg_file)
    if config is None:
        text = _render(app, gpus)
        if out is None:
            print(text, end="")
        else:
            out.write_text(text)
    if any(planned.shortfalls for planned in plans):
        raise typer.Exit(1)


def _draw(plans: Sequence[Plan], file: Path) -> None:
    """Draws the placement; with several models, one file each: `plan.svg` becomes `plan-NAME.svg`."""
    if not plans[0].placement.gpus:
        raise ConfigError("--svg needs --gpus, such as --gpus 2x16GiB")
    for planned in plans:
        name = file.name if len(plans) == 1 else f"{file.stem}-{deployed_name(planned.name)}{file.suffix}"
        file.with_name(name).write_text(draw_placement(planned))


def profile_command(
    config: Annotated[Path, typer.Argument(help="Serve YAML, or the name of a shipped one")],
    out: Annotated[Path, typer.Option(help="file to write the times to")] = Path("profile.json"),
    size: SizeOption = None,
    steps: Annotated[int, typer.Option(min=2, help="denoising steps to measure")] = 4,
) -> None:
    """Measure encode, every block and decode on this machine, for `relay plan --profile`. Loads the weights."""
    models = resolve_family(load_app_config(config)).served
    if len(models) > 1:
        raise ConfigError(f"{config} serves several models: write the one to measure into a file of its own")
    [served] = models
    sizes = _sizes(size, served.model)
    stages = stages_of(served)
    measure = importlib.import_module("deployments.plan.measure").measure
    machine = importlib.import_module("cluster.machines.machine").describe_machine()
    times = measure(served.model, stages, sizes, num_steps=steps)
    write_profile(Profile(machine, served.model.checkpoint, times), out)
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
    """Completes the app config from the checkpoint's config files, or from those in `configs_dir`."""
    if configs_dir is None:
        return resolve_family(app)
    if not app.is_one:
        raise ConfigError("--configs is the folder of one checkpoint: plan only one model")
    [served] = app.served
    said = served.model.model_dump(include={"checkpoint", "config", "components"})
    there = served.model.model_copy(update={"checkpoint": str(configs_dir), "config": None, "components": {}})
    [found] = resolve_family(app.serving([served.model_copy(update={"model": there})])).served
    return app.serving([served.model_copy(update={"model": found.model.model_copy(update=said)})])


def _app_config(path: Path | None, checkpoints: list[str] | None) -> AppConfig:
    if path is not None and checkpoints:
        raise ConfigError("a config names its model: leave out --model, or the config")
    if path is not None:
        return load_app_config(path)
    if not checkpoints:
        raise ConfigError("nothing to plan: name a config, or a checkpoint with --model")
    models = [ModelConfig(name=_name(checkpoint), checkpoint=checkpoint) for checkpoint in checkpoints]
    if len(models) == 1:
        return AppConfig(model=models[0])
    return AppConfig(models=tuple(ServedModelConfig(model=model) for model in models))


def _name(checkpoint: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", checkpoint.rpartition("/")[2].lower()).strip("-")


def _sizes(asked: list[str] | None, model: ModelConfig) -> tuple[MediaSize, ...]:
    """Returns the sizes asked for, or else the default size of a request. Raises ConfigError."""
    default, multiple, own = default_size(model), model.geometry.size_multiple, model.geometry.sizes
    if not asked:
        return (default,)
    found = []
    for text in asked:
        match = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text)
        if match is None:
            raise ConfigError(f"--size {text!r} is not a size: write 1024x1024, or 832x480x81 for a video")
        width, height, num_frames = int(match[1]), int(match[2]), int(match[3] or default.num_frames)
        if any(side % multiple or not multiple <= side <= MAX_SIDE for side in (width, height)):
            raise ConfigError(
                f"--size {text}: width and height must be multiples of {multiple}, from {multiple} to {MAX_SIDE}"
            )
        if own and [width, height] not in map(list, own):
            raise ConfigError(f"--size {text}: this model draws {', '.join(f'{w}x{h}' for w, h in own)}")
        if not num_frames:
            raise ConfigError(f"--size {text}: a video has at least one frame")
        found.append(MediaSize(width, height, num_frames))
    return tuple(found)


def _sizes_of(model: ModelConfig, configs_dir: Path | None, sizes: tuple[MediaSize, ...]) -> SizesOf:
    description = importlib.import_module("deployments.plan.describe").Description(model, configs_dir)

    def sizes_of(stages: StageConfigs) -> Any:
        return description.sizes(stages.encoder, stages.transformer, stages.vae, sizes)

    return sizes_of


def _render(app: AppConfig, gpus: str) -> str:
    """Returns the text of a Serve YAML file."""
    models = [_render_model(served) for served in app.served]
    limits = {"limits": app.limits.model_dump(exclude_defaults=True, mode="json")}
    application = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": (models[0] if app.is_one else {"models": models}) | limits,
    }
    file = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [application],
    }
    return f"# Planned for {gpus} by `relay plan`.\n" + yaml.safe_dump(file, sort_keys=False)


def _render_model(served: ServedModelConfig) -> dict[str, Any]:
    derived = {"family"} if served.model.has_derived_family else None
    stages = {
        name: {"shared_with": owner}
        if (owner := served.owners[name]) != served.name
        else stage.model_dump(exclude_defaults=True, mode="json")
        for name, stage in served.stages.items()
    }
    return {"model": served.model.model_dump(exclude_defaults=True, mode="json", exclude=derived), **stages}

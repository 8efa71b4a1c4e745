"""`relay bench`: one command per benchmark, looked up when called, for they import torch."""

import importlib
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

bench = typer.Typer(help="Measure this machine; every row is against a baseline of the same run.")

JsonFile = Annotated[Path | None, typer.Option("--json", help="also write machine and rows to this file")]
Quick = Annotated[bool, typer.Option("--quick", help="a coarse answer in under a minute")]


@bench.command()
def latency(
    config: Annotated[Path, typer.Option(help="Serve YAML to measure")] = Path("configs/quickstart.yaml"),
    port: Annotated[int, typer.Option(help="free port to serve on")] = 8765,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """Time to the first 200, and one request's latency against the plain pipeline."""
    _run("latency", config, port=port, num_requests=10 if quick else 40, json_file=json_file)


@bench.command()
def batching(json_file: JsonFile = None, quick: Quick = False) -> None:
    """Requests per second at concurrency 1 to 8: merging on, off, and the whole pipeline; prompts per second."""
    _run(
        "batching",
        loads={"tiny": (8, 8)} if quick else {"tiny": (32, 28), "100M": (16, 4)},
        concurrencies=(1, 8) if quick else (1, 2, 4, 8),
        json_file=json_file,
    )


@bench.command()
def adapters(json_file: JsonFile = None, quick: Quick = False) -> None:
    """Requests per second with a LoRA adapter for each, with one for all, and without."""
    loads = {"tiny": (16, 8)} if quick else {"tiny": (32, 8), "100M": (16, 4)}
    _run("adapters", loads=loads, concurrencies=(8,) if quick else (1, 8), json_file=json_file)


@bench.command()
def overhead(json_file: JsonFile = None, quick: Quick = False) -> None:
    """What the engine costs a lone request's denoise, over the plain pipeline."""
    loads = {"tiny": (20, 8)} if quick else {"tiny": (40, 28), "100M": (20, 4)}
    _run("overhead", loads=loads, json_file=json_file)


@bench.command()
def pipeline(json_file: JsonFile = None, quick: Quick = False) -> None:
    """How well 2·S requests fill S shards, against one request at a time over the same shards."""
    _run(
        "pipeline",
        shards=(1, 2) if quick else (1, 2, 4),
        steps_ms={20: 10} if quick else {5: 20, 20: 10, 100: 4},
        payloads_mb=(0.4,) if quick else (0.4, 8.0),
        json_file=json_file,
    )


@bench.command()
def ready(json_file: JsonFile = None, quick: Quick = False) -> None:
    """From deploying to ready: the three stages and the whole pipeline; processes, imports and weights apart."""
    _run("ready", model="tiny" if quick else "100M", num_rounds=1 if quick else 5, json_file=json_file)


@bench.command()
def faults(
    processes: Annotated[
        str, typer.Option(help="of those that serve; left out, all, and requests that kill or are left")
    ] = "",
    signals: Annotated[str, typer.Option(help="SIGSTOP ends after 20 s")] = "SIGKILL,SIGTERM,SIGSTOP",
    when: Annotated[
        str,
        typer.Option(
            help="loaded: under eight requests; starting, serving: and once more when a successor does so"
        ),
    ] = "loaded,idle",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="keep the rows in this file, beside those of other cells")
    ] = None,
    quick: Quick = False,
) -> None:
    """Every process killed, told to go and stopped, idle and loaded: who is answered, and when."""
    module = importlib.import_module("serve_app.bench.faults")
    axes = (processes.split(",") if processes else module.PROCESSES, signals.split(","), when.split(","))
    for given, allowed in zip(axes, (module.PROCESSES, module.SIGNALS, module.WHEN), strict=True):
        if unknown := set(given) - set(allowed):
            raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
    cells = module.QUICK if quick else [module.Cell(*cell) for cell in product(*axes)]
    module.run(cells=cells, with_killer=not (processes or quick), with_leavers=not processes, json_file=json_file)


@bench.command()
def nodes(json_file: JsonFile = None) -> None:
    """A cluster of nodes on this machine: load comes and goes, a node joins, a node dies."""
    _run("nodes", json_file=json_file)


@bench.command()
def simulate(
    target_load: Annotated[float | None, typer.Option(help="of every stage; the config's default")] = None,
    seed: Annotated[int, typer.Option(help="of the requests' times")] = 0,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="draw the days into this file")] = None,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """A day of 64 to 512 GPUs, simulated from published stage times: fixed replicas against autoscaling."""
    num_gpus = (64,) if quick else (64, 128, 256, 512)
    _run(
        "simulate",
        num_gpus=num_gpus,
        seed=seed,
        target_load=target_load,
        json_file=json_file,
        svg_file=svg_file,
    )


@bench.command()
def streaming(
    config: Annotated[Path, typer.Option(help="Serve YAML to measure")] = Path("configs/quickstart.yaml"),
    port: Annotated[int, typer.Option(help="free port to serve on")] = 8765,
    model: Annotated[str | None, typer.Option(help="100M, or a checkpoint, in place of the config's")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; the model's default")] = None,
    requests: Annotated[int, typer.Option(help="of each kind")] = 30,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """What partial pictures and progress cost a lone request."""
    num_requests = 5 if quick else requests
    _run(
        "streaming",
        config,
        model=model,
        port=port,
        num_steps=steps,
        num_requests=num_requests,
        json_file=json_file,
    )


@bench.command()
def memory(
    model: Annotated[str, typer.Option(help="tiny, 100M, or a checkpoint")] = "100M",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="also write the rows to this file")] = None,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="draw time over memory into this file")] = None,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """Time to load, time per picture and peak memory of every technique, against the plain pipeline."""
    module = importlib.import_module("serve_app.bench.memory")
    module.run(
        model="tiny" if quick else model,
        ways=module.QUICK if quick else tuple(module.WAYS),
        num_pictures=2 if quick else 3,
        num_steps=4,
        json_file=json_file,
        csv_file=csv_file,
        svg_file=svg_file,
    )


@bench.command()
def tiers(
    model: Annotated[
        str, typer.Option(help="a checkpoint; only of pictures of shapes can be told what they show")
    ] = "embedded://shapes",
    steps: Annotated[int, typer.Option(help="denoising steps")] = 28,
    prompts: Annotated[int, typer.Option(help="of each tier, half of them eight at once")] = 200,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="draw loss over time into this file")] = None,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """What tiers and other step caches save and cost: speed alone and at 8, PSNR, and what pictures show."""
    module = importlib.import_module("serve_app.bench.tiers")
    module.run(
        model=model,
        tiers=module.QUICK if quick else module.TIERS,
        num_prompts=16 if quick else prompts,
        num_steps=steps,
        json_file=json_file,
        svg_file=svg_file,
    )


@bench.command()
def tiles(json_file: JsonFile = None, quick: Quick = False) -> None:
    """One tiled decode over two replicas of the VAE, against one replica; and whether the picture is the same."""
    load: dict[str, Any] = {"model": "VAE", "size": 1024, "tile": 256, "num_rounds": 3}
    if quick:
        load |= {"size": 512, "tile": 128, "num_rounds": 1}
    _run("tiles", **load, json_file=json_file)


@bench.command()
def gpu(
    models: Annotated[str, typer.Option(help="flux, qwen-image, or both with a comma")] = "flux,qwen-image",
    limit_s: Annotated[float, typer.Option(help="seconds for all; what will not fit is left out")] = 570.0,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """The memory techniques at FLUX's and Qwen-Image's sizes, random weights, each against its bound."""
    _run("gpu", tuple(models.split(",")), is_quick=quick, limit_s=limit_s, json_file=json_file)


def _run(name: str, *args: Any, **kwargs: Any) -> None:
    importlib.import_module(f"serve_app.bench.{name}").run(*args, **kwargs)

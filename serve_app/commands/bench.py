"""`relay bench`: one command per benchmark. Their modules import torch, so each is imported when it is called."""

import importlib
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from serve_app.commands.bench_load import compare, gate, serve

bench = typer.Typer(help="Measure this machine. Every row is compared with a baseline of the same run.")

bench.command()(serve)
bench.command()(compare)
bench.command()(gate)
JsonFile = Annotated[Path | None, typer.Option("--json", help="also write the machine and the rows to this file")]
Quick = Annotated[bool, typer.Option("--quick", help="measure coarsely, in under a minute")]


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
    """Requests per second with one LoRA adapter per request, with one adapter for all requests, and without."""
    loads = {"tiny": (16, 8)} if quick else {"tiny": (32, 8), "100M": (16, 4)}
    _run("adapters", loads=loads, concurrencies=(8,) if quick else (1, 8), json_file=json_file)


@bench.command()
def order(json_file: JsonFile = None, quick: Quick = False) -> None:
    """Short requests among long ones, and one client beside one with 50 x as many: fair against fifo."""
    _run(
        "order",
        model="tiny" if quick else "100M",
        num_long=40,
        num_measured=8,
        num_rounds=1 if quick else 2,
        json_file=json_file,
    )


@bench.command()
def overhead(json_file: JsonFile = None, quick: Quick = False) -> None:
    """How much longer a lone request's denoising takes in the engine than in the plain pipeline."""
    loads = {"tiny": (20, 8)} if quick else {"tiny": (40, 28), "100M": (20, 4)}
    _run("overhead", loads=loads, json_file=json_file)


@bench.command()
def resume(json_file: JsonFile = None, quick: Quick = False) -> None:
    """What it costs to store a request's steps for another replica, and to continue from them."""
    loads = {"tiny": (5, 10)} if quick else {"tiny": (20, 30), "100M": (8, 10)}
    _run("resume", loads=loads, json_file=json_file)


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
    """Time from deploying to ready, of the three stages and the whole pipeline: processes, imports, weights."""
    _run("ready", model="tiny" if quick else "100M", num_rounds=1 if quick else 5, json_file=json_file)


@bench.command()
def faults(
    processes: Annotated[
        str,
        typer.Option(
            help="comma-separated; default: all, and also requests that kill processes or whose client leaves"
        ),
    ] = "",
    signals: Annotated[
        str, typer.Option(help="comma-separated; SIGSTOP ends after 20 s")
    ] = "SIGKILL,SIGTERM,SIGSTOP",
    when: Annotated[
        str,
        typer.Option(
            help="loaded: during eight requests; starting, serving: again when the successor starts or serves"
        ),
    ] = "loaded,idle",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the rows to this file, and keep its rows of other cells")
    ] = None,
    quick: Quick = False,
) -> None:
    """Every process killed, terminated and stopped, idle and loaded: which requests are answered, and when."""
    module = importlib.import_module("serve_app.bench.faults")
    axes = (processes.split(",") if processes else module.PROCESSES, signals.split(","), when.split(","))
    for given, allowed in zip(axes, (module.PROCESSES, module.SIGNALS, module.WHEN), strict=True):
        if unknown := set(given) - set(allowed):
            raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
    cells = module.QUICK if quick else [module.Cell(*cell) for cell in product(*axes)]
    module.run(cells=cells, with_killer=not (processes or quick), with_leavers=not processes, json_file=json_file)


@bench.command()
def shortages(
    names: Annotated[
        str, typer.Option(help="which ones, comma-separated")
    ] = "object store,object store and disk,memory",
    json_file: JsonFile = None,
) -> None:
    """Requests while the object store is full, the disk as well, or another process takes the memory."""
    _run("shortages", names=names.split(","), json_file=json_file)


@bench.command()
def soak(
    minutes: Annotated[float, typer.Option(help="minutes of load")] = 30.0,
    seed: Annotated[int, typer.Option(help="seed of the clients' requests")] = 0,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """Mixed load, aborts and bad requests: what every process holds before and after, and whether it grows."""
    _run("soak", minutes=0.5 if quick else minutes, seed=seed, json_file=json_file)


@bench.command()
def nodes(json_file: JsonFile = None) -> None:
    """A cluster of several nodes on this machine: load comes and goes, a node joins, a node dies."""
    _run("nodes", json_file=json_file)


@bench.command()
def growth(json_file: JsonFile = None) -> None:
    """Three nodes on this machine, and an app that may use all: 1 client, 32, then a node dies, then 1 client."""
    _run("growth", json_file=json_file)


@bench.command()
def simulate(
    target_load: Annotated[
        float | None, typer.Option(help="target load of every stage; default: the config's")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the requests' times")] = 0,
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
    config: Annotated[Path, typer.Option(help="Serve YAML to measure, or the name of a shipped one")] = Path(
        "quickstart"
    ),
    port: Annotated[int, typer.Option(help="free port to serve on")] = 8765,
    model: Annotated[str | None, typer.Option(help="100M, or a checkpoint, in place of the config's")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; default: the model's")] = None,
    requests: Annotated[int, typer.Option(help="requests of each kind")] = 30,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """What partial images and progress cost a lone request."""
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
def overload(
    config: Annotated[Path, typer.Option(help="Serve YAML to measure, or the name of a shipped one")] = Path(
        "quickstart"
    ),
    port: Annotated[int, typer.Option(help="free port to serve on")] = 8765,
    steps: Annotated[
        int, typer.Option(help="denoising steps; with few of them, an image costs little more than a rejection")
    ] = 100,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """Five times the capacity: goodput over its peak, time to a rejection, and whether Retry-After fits."""
    _run("overload", config, port=port, num_steps=steps, duration_s=20.0 if quick else 120.0, json_file=json_file)


@bench.command()
def keys(
    config: Annotated[Path, typer.Option(help="Serve YAML to measure, or the name of a shipped one")] = Path(
        "quickstart"
    ),
    port: Annotated[int, typer.Option(help="free port to serve on")] = 8765,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 28,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """Two API keys, one with 50 times the requests of the other: how much longer the other one waits."""
    _run("keys", config, port=port, num_steps=steps, num_requests=8 if quick else 40, json_file=json_file)


@bench.command()
def memory(
    model: Annotated[str, typer.Option(help="tiny, 100M, or a checkpoint")] = "100M",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="also write the rows to this file")] = None,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="draw time over memory into this file")] = None,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """Time to load, time per image and peak memory of every technique, against the plain pipeline."""
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
        str, typer.Option(help="a checkpoint; what images show is checked only for the default")
    ] = "embedded://shapes",
    steps: Annotated[int, typer.Option(help="denoising steps")] = 28,
    prompts: Annotated[int, typer.Option(help="prompts of each tier; half of them are sent eight at once")] = 200,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="draw loss over time into this file")] = None,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """What tiers and other step caches save and cost: speed with 1 and 8 requests, PSNR, and what images show."""
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
    """One tiled decode over two replicas of the VAE, against one replica; and whether the image is the same."""
    load: dict[str, Any] = {"model": "VAE", "size": 1024, "tile": 256, "num_rounds": 3}
    if quick:
        load |= {"size": 512, "tile": 128, "num_rounds": 1}
    _run("tiles", **load, json_file=json_file)


@bench.command()
def gpu(
    models: Annotated[str, typer.Option(help="flux, qwen-image, or both, comma-separated")] = "flux,qwen-image",
    limit_s: Annotated[
        float, typer.Option(help="seconds for all measurements; those that do not fit are left out")
    ] = 570.0,
    json_file: JsonFile = None,
    quick: Quick = False,
) -> None:
    """The memory techniques at FLUX's and Qwen-Image's sizes, with random weights, each against its bound."""
    _run("gpu", tuple(models.split(",")), is_quick=quick, limit_s=limit_s, json_file=json_file)


def _run(name: str, *args: Any, **kwargs: Any) -> None:
    importlib.import_module(f"serve_app.bench.{name}").run(*args, **kwargs)

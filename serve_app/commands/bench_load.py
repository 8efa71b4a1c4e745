"""`relay bench serve`, `compare` and `gate`.

Options of `serve` have the names of those of `vllm bench serve` if they mean the same.
"""

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from serve_app.bench.load.endpoint import Server
from serve_app.bench.load.loads import plan_loads, read_counts, read_goodput, read_numbers
from serve_app.bench.load.workload import Ask, Mix, WorkloadFault, plan_asks, read_mix

SERVE = "serve_app.bench.serve"
SERVING = "serve_app.bench.serving"
COMPARE = "serve_app.bench.compare"
CONTENDERS = "serve_app.bench.contenders"
GATE = "serve_app.bench.gate"
QUICK_PROMPTS = 12
AN_EXISTING_FILE: Any = {"exists": True, "dir_okay": False}


def serve(
    base_url: Annotated[
        str | None, typer.Option(help="URL of any server with OpenAI's image API; default: serve --config")
    ] = None,
    config: Annotated[Path, typer.Option(help="Serve YAML to start, or the name of a shipped one")] = Path(
        "quickstart"
    ),
    port: Annotated[int, typer.Option(help="free port to serve it on")] = 8765,
    model: Annotated[str | None, typer.Option(help="default: the first that the server lists")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="RELAY_API_KEY", show_envvar=True, help="API key, if the server requires one"),
    ] = None,
    endpoint: Annotated[Literal["generations", "edits", "videos"], typer.Option()] = "generations",
    image: Annotated[Path | None, typer.Option(**AN_EXISTING_FILE, help="input file of --endpoint edits")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="requests of each load")] = 32,
    prompts: Annotated[
        Path | None,
        typer.Option(**AN_EXISTING_FILE, help="file with one prompt per line; default: every prompt is new"),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="mix, such as 512x512:3,768x768:1; default: the server's")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="mix of num_inference_steps, such as 8:1,28:3; OpenAI's API has no such field"),
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="images per request")] = 1,
    extra_body: Annotated[str | None, typer.Option(help="further fields of every request, as JSON")] = None,
    max_concurrency: Annotated[
        str | None,
        typer.Option(help="closed loop: number of clients, one load for each, comma-separated; open loop: limit"),
    ] = None,
    request_rate: Annotated[
        str | None, typer.Option(help="open loop: requests per second, one load for each, comma-separated")
    ] = None,
    burstiness: Annotated[float, typer.Option(min=0.01, help="1: Poisson arrivals; less: bursts")] = 1.0,
    trace: Annotated[
        Path | None,
        typer.Option(**AN_EXISTING_FILE, help="open loop: file of JSON lines with at_s, prompt, size, steps, n"),
    ] = None,
    slo_scale: Annotated[
        float,
        typer.Option(min=0, help="goodput counts requests that take at most this many times their time alone"),
    ] = 3.0,
    goodput: Annotated[str | None, typer.Option(help="e2el:MILLISECONDS, instead of --slo-scale")] = None,
    num_solo: Annotated[
        int, typer.Option(min=1, help="requests sent alone for each size and number of steps")
    ] = 3,
    retry_refused: Annotated[
        bool, typer.Option("--retry-refused", help="send a refused request again after its Retry-After")
    ] = False,
    timeout_s: Annotated[float, typer.Option(help="seconds that one request may take")] = 600.0,
    processes: Annotated[int, typer.Option(min=1, help="processes that run the clients")] = 1,
    seed: Annotated[int, typer.Option(help="seed of prompts, mixes and arrivals")] = 0,
    svg_file: Annotated[
        Path | None, typer.Option("--svg", help="draw latencies and stage times into this file")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write all results to this file")] = None,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="also write every request to --json")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="fewer requests, two loads")] = False,
) -> None:
    """Load an image server, ours or another: rates, p50 to p99, goodput, and the time of each stage.

    \f
    The function is long because every option is a parameter.
    """
    told = {key: str(value) if isinstance(value, Path) else value for key, value in locals().items()}
    workload = {key: value for key, value in told.items() if value is not None and key != "api_key"}
    if (endpoint == "edits") != (image is not None):
        raise WorkloadFault("--endpoint edits and --image need each other: give both or neither")
    sizes: Mix[str | None] = [(None, 1.0)] if size is None else read_mix(size, "--size")
    numbers: Mix[int | None] = [(None, 1.0)] if steps is None else _read_steps(steps)
    texts = [line for line in prompts.read_text().splitlines() if line.strip()] if prompts else []
    count = min(num_prompts, QUICK_PROMPTS) if quick else num_prompts

    def plan(number: int) -> list[Ask]:
        return plan_asks(count, sizes, numbers, n=n, prompts=texts, seed=seed + 1000 * number)

    is_open = trace is not None or request_rate is not None
    clients = max_concurrency or ("" if is_open else "1,4" if quick else "1,2,4,8")
    loads = plan_loads(
        plan,
        max_concurrency=read_counts(clients, "--max-concurrency"),
        request_rate=read_numbers(request_rate, "--request-rate"),
        burstiness=burstiness,
        trace=trace,
        seed=seed,
    )
    server = Server(
        base_url=(base_url or f"http://127.0.0.1:{port}").rstrip("/").removesuffix("/v1"),
        model=model,
        api_key=api_key,
        endpoint=endpoint,
        extra_body=_json_object(extra_body),
        image=image,
        retries_refused=retry_refused,
        timeout_s=timeout_s,
    )
    slo_ms = None if goodput is None else read_goodput(goodput)
    module = importlib.import_module(SERVE)
    with nullcontext() if base_url else importlib.import_module(SERVING).serving(config, port):
        module.run(
            server,
            loads,
            module.Outputs(json_file, svg_file, save_detailed),
            slo_scale=slo_scale or None,
            slo_ms=slo_ms,
            num_solo=1 if quick else num_solo,
            num_processes=processes,
            workload=workload,
        )


def compare(
    model: Annotated[str, typer.Option(help="tiny, 100M, or a checkpoint")] = "tiny",
    sizes: Annotated[str, typer.Option(help="image sizes, comma-separated")] = "64x64,256x256",
    max_concurrency: Annotated[str, typer.Option(help="numbers of clients, comma-separated")] = "1,8",
    steps: Annotated[int, typer.Option(min=1, help="denoising steps")] = 28,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="requests in each turn of a way, at least one per client")
    ] = 16,
    rounds: Annotated[
        int, typer.Option(min=1, help="each round is two turns: the ways in order, then in reverse")
    ] = 2,
    cores: Annotated[
        int | None, typer.Option(min=1, help="cores that every way runs on; default: all of this machine")
    ] = None,
    ways: Annotated[
        str, typer.Option(help="comma-separated, in addition to diffusers and relay; default: all")
    ] = "",
    port: Annotated[int, typer.Option(help="free port to serve on")] = 8765,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write all results to this file")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="small images, few steps and ways, two turns")] = False,
) -> None:
    """Compare plain diffusers, replicas of its whole pipeline, and relay, in turn on the same cores or GPUs."""
    wanted = [name.strip() for name in ways.split(",") if name.strip()]
    importlib.import_module(COMPARE).run(
        model=model,
        sizes=["64x64"] if quick else [each for each in sizes.split(",") if each],
        concurrencies=read_counts(max_concurrency, "--max-concurrency"),
        num_steps=min(steps, 8) if quick else steps,
        num_requests=8 if quick else num_prompts,
        num_rounds=1 if quick else rounds,
        num_cores=cores,
        names=wanted or (importlib.import_module(CONTENDERS).QUICK if quick else ()),
        port=port,
        json_file=json_file,
    )


def gate(
    history: Annotated[
        Path, typer.Option(dir_okay=False, help="file of earlier runs, by machine and versions")
    ] = Path("docs/benchmarks/gate.json"),
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="add this run to --history if nothing fails; only for the main branch on a quiet machine",
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="also write the machine and the rows to this file")
    ] = None,
) -> None:
    """Fail if one of a few speed ratios has become worse or cannot be measured; CI runs this."""
    if not importlib.import_module(GATE).run(history_file=history, keeps=keep, json_file=json_file):
        raise typer.Exit(1)


def _read_steps(text: str) -> list[tuple[int | None, float]]:
    return [(read_counts(value, "--steps")[0], weight) for value, weight in read_mix(text, "--steps")]


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise WorkloadFault(f"--extra-body: {error}") from error
    if not isinstance(value, dict):
        raise WorkloadFault("--extra-body: must be a JSON object")
    return value

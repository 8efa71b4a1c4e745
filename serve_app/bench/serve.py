"""Runs loads on a server with OpenAI's API, relay or another: rates, latencies, goodput, and time per stage.

First runs each kind of request (size, steps, n) alone, which warms the server up and measures the time of which an
SLO is a multiple; then runs one load after another.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.machines.machine import describe_machine
from serve_app.bench.load.curves import draw_curves
from serve_app.bench.load.endpoint import Outcome, Server
from serve_app.bench.load.figures import duration_s, percentile, stage_means, summarize, summarize_kinds
from serve_app.bench.load.loads import Load
from serve_app.bench.load.loop import drive_apart
from serve_app.bench.report import Row, print_columns
from serve_app.config.app import ConfigError

LAG_SHARE = 0.05
"""Share of the median latency; if requests are sent later than this, the run measures the client."""
console = Console(stderr=True)


@dataclass(frozen=True)
class Outputs:
    """Files to write in addition to what is printed."""

    json_file: Path | None = None
    svg_file: Path | None = None
    with_requests: bool = False
    """Whether the JSON file also contains every request."""


def run(
    server: Server,
    loads: Sequence[Load],
    outputs: Outputs,
    *,
    slo_scale: float | None,
    slo_ms: float | None,
    num_solo: int,
    num_processes: int,
    workload: Mapping[str, Any],
) -> None:
    """Runs all loads, prints the results and writes the files.

    Args:
        slo_scale: a kind's SLO is this many times its time alone. slo_ms: one SLO for all kinds, used instead.
        num_solo: requests of each kind alone, after one for warm-up.
        workload: the command's options, for the JSON file.
    """
    server = _with_model(server)
    outcomes: dict[str, list[Outcome]] = {}
    with _progress() as progress:
        solo_s = _measure_alone(server, loads, num_solo, progress)
        for load in loads:
            tell = _shown(progress, load.name, len(load.asks))
            outcomes[load.name] = drive_apart(
                server, load.asks, load.max_concurrency, tell, num_processes=num_processes
            )
    if slo_ms is not None:
        slo_s = dict.fromkeys(solo_s, slo_ms / 1e3)
    else:
        slo_s = {} if slo_scale is None else {kind: slo_scale * alone_s for kind, alone_s in solo_s.items()}
    rows = [summarize(name, of, slo_s) for name, of in outcomes.items()]
    kinds = [row for name, of in outcomes.items() for row in summarize_kinds(name, of, solo_s, slo_s)]
    stages = {name: stage_means(of) for name, of in outcomes.items()}
    print_columns(f"{server.base_url}, {server.model}", rows)
    print_columns("by kind of request", kinds)
    if told := [{"ms per answered request": name} | means for name, means in stages.items() if means]:
        print_columns("average time in each stage", told)
    _warn(loads, outcomes)
    if outputs.svg_file is not None:
        latencies = {name: [each.latency_s for each in of if each.is_answered] for name, of in outcomes.items()}
        outputs.svg_file.write_text(draw_curves(latencies, stages))
    if outputs.json_file is not None:
        document: dict[str, Any] = {
            "machine": describe_machine(),
            "workload": dict(workload) | {"model": server.model},
        }
        document |= {"rows": rows, "kinds": kinds, "stages_ms": stages}
        if outputs.with_requests:
            document["requests"] = {name: [_plain(each) for each in of] for name, of in outcomes.items()}
        outputs.json_file.write_text(json.dumps(document, indent=1) + "\n")


def _with_model(server: Server) -> Server:
    """Sets the model to the first that the server lists, unless one is named. Raises ConfigError if the server
    cannot be reached."""
    headers = {} if server.api_key is None else {"Authorization": f"Bearer {server.api_key}"}
    try:
        answer = httpx.get(f"{server.base_url}/v1/models", headers=headers, timeout=30)
    except httpx.HTTPError as error:
        raise ConfigError(f"--base-url {server.base_url} does not answer: {error!r}") from error
    if server.model is not None:
        return server
    try:
        return replace(server, model=answer.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{server.base_url}/v1/models lists no model ({error!r}): name one with --model"
        ) from error


def _measure_alone(server: Server, loads: Sequence[Load], num_solo: int, progress: Progress) -> dict[str, float]:
    """Returns the median seconds by kind. Raises ConfigError with the server's message if a request fails."""
    kinds = {ask.kind: ask for load in loads for ask in load.asks}
    asks = [
        ask.model_copy(update={"at_s": None, "prompt": f"{ask.prompt}, alone {i}"})
        for ask in kinds.values()
        for i in range(num_solo + 1)
    ]
    outcomes = drive_apart(server, asks, 1, _shown(progress, "alone", len(asks)))
    for outcome in outcomes:
        if not outcome.is_answered:
            raise ConfigError(f"{outcome.ask.kind}, alone on {server.base_url}: {outcome.error}")
    times = {kind: [each.latency_s for each in outcomes if each.ask.kind == kind] for kind in kinds}
    return {kind: statistics.median(of[1:]) for kind, of in times.items()}


def _progress() -> Progress:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[told]}"), console=console)


def _shown(progress: Progress, name: str, total: int) -> Callable[[Outcome], None]:
    """Returns a function to which each outcome is passed, and which updates the progress bar."""
    task = progress.add_task(name, total=total, told="")
    seen: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        seen.append(outcome)
        answered = [each.latency_s for each in seen if each.is_answered]
        refused = sum(each.is_refused for each in seen)
        told = f"{len(answered) / duration_s(seen):.3g}/s, p50 {percentile(answered, 50):.3g} s"
        told += f", p95 {percentile(answered, 95):.3g} s, {refused} refused"
        told += f", {len(seen) - len(answered) - refused} failed"
        progress.update(task, advance=1, told=told)

    return tell


def _warn(loads: Sequence[Load], outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    """Warns about late clients and failed requests, with the first error."""
    for load in loads:
        of = outcomes[load.name]
        median_s = percentile([each.latency_s for each in of if each.is_answered], 50)
        lag_s = percentile([each.lag_s for each in of], 99)
        if load.is_open and lag_s > LAG_SHARE * median_s:
            why = (
                "--max-concurrency delayed them"
                if load.max_concurrency
                else "the clients are busy: raise --processes"
            )
            console.print(f"{load.name}: requests were sent up to {lag_s:.3g} s late ({why})", style="yellow")
        if failed := [each for each in of if not (each.is_answered or each.is_refused)]:
            console.print(f"{load.name}: {len(failed)} failed, the first: {failed[0].error}", style="red")


def _plain(outcome: Outcome) -> Row:
    return asdict(replace(outcome, ask=outcome.ask.model_dump(exclude_none=True)))  # type: ignore[arg-type]

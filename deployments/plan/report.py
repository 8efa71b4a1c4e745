"""Prints a plan as text, or converts it to JSON."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deployments.config.stage import StageConfig
from deployments.memory.limit import OVERHEAD_BYTES
from deployments.plan.place import GIB, Process
from deployments.plan.plan import Plan
from deployments.plan.sizes import STAGES, ModelSizes, largest


def print_plan(plan: Plan, console: Console) -> None:
    """Prints components, blocks, processes, GPUs, rate, shortfalls and advice."""
    asked = ", ".join(map(str, plan.sizes.sizes))
    console.print(f"[bold]{plan.name}[/bold] at {asked}", highlight=False)
    console.print(_components(plan))
    for line in _blocks(plan):
        console.print(line, highlight=False)
    console.print(_processes(plan))
    if plan.placement.gpus:
        console.print(_gpus(plan))
    for line in (*_replicas(plan), *_rate(plan)):
        console.print(line, highlight=False)
    if plan.placement.gpus and not plan.shortfalls:
        console.print("it fits", style="green")
    for shortfall in plan.shortfalls:
        console.print(f"does not fit: {shortfall}", style="red", highlight=False)
    for advice in plan.advice:
        console.print(f"advice: {advice}", style="yellow", highlight=False)


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON values, in bytes and seconds."""
    sizes = plan.sizes
    return {
        "model": plan.name,
        "sizes": [str(size) for size in sizes.sizes],
        "overhead_bytes": OVERHEAD_BYTES,
        "batch_size": sizes.batch_size,
        "components": {
            part.name: {"class": part.class_name, "parameters": part.num_parameters, "bytes": part.weights_bytes}
            for stage in STAGES
            for part in sizes.stage(stage).components
        },
        "denoisers": {
            of.name: {
                "blocks_bytes": {block.name: block.weights_bytes for block in of.blocks},
                "head_bytes": of.head_bytes,
                "tail_bytes": of.tail_bytes,
            }
            for of in sizes.denoisers
        },
        "processes": [_process_as_json(process, sizes) for process in plan.placement.processes],
        "gpus": [
            {
                "node": gpu.node,
                "gpu": gpu.index,
                "bytes": gpu.memory_bytes,
                "planned_bytes": plan.placement.used_bytes(gpu),
                "use": None if plan.rate is None else plan.rate.gpu_use[gpu],
            }
            for gpu in plan.placement.gpus
        ],
        "replicas": {stage: plan.placement.num_replicas(stage) for stage in STAGES},
        "bound_per_s": None if plan.rate is None else plan.rate.bound,
        "stage_s": None if plan.rate is None else dict(plan.rate.stage_s),
        "fits": not plan.shortfalls,
        "shortfalls": list(plan.shortfalls),
        "advice": list(plan.advice),
    }


def _process_as_json(process: Process, sizes: ModelSizes) -> dict[str, Any]:
    blocks, names = process.sizes.blocks, [of.name for of in sizes.denoisers]
    return {
        "stage": process.stage,
        "replica": process.replica,
        "rank": process.rank,
        "blocks": None if blocks is None else dict(zip(names, blocks, strict=True)),
        "num_gpus": process.num_gpus,
        "gpus": [(gpu.node, gpu.index) for gpu in process.gpus],
        "weights_bytes": process.sizes.weights_bytes,
        "device_bytes": process.sizes.device_bytes,
        "working_bytes": process.sizes.working_bytes,
        "adapter_bytes": process.sizes.adapter_bytes,
        "need_bytes": process.sizes.need_bytes,
    }


def _components(plan: Plan) -> Table:
    table = _table("component", "class", "billions", "GiB", "as")
    for stage, config in plan.stages.by_stage().items():
        for part in plan.sizes.stage(stage).components:
            billions = f"{part.num_parameters / 1e9:.3f}"
            table.add_row(part.name, part.class_name, billions, _in_gib(part.weights_bytes), _settings(config))
    return table


def _settings(config: StageConfig) -> str:
    """Returns the settings that determine the bytes of a stage's weights."""
    found: list[str] = [config.dtype]
    if config.quantization is not None:
        found.append(config.quantization.kind)
    if config.layerwise_casting is not None:
        found.append(config.layerwise_casting.storage_dtype)
    if config.vram_limit_gib is not None:
        found.append(f"vram_limit {config.vram_limit_gib:g} GiB")
    if config.offload is not None:
        found.append(f"offload {config.offload.kind}")
    if getattr(config, "tiling", None) is not None:
        found.append("tiling")
    return ", ".join(found)


def _blocks(plan: Plan) -> Iterator[str]:
    """Yields runs of equal blocks, such as `blocks of transformer: 19 x transformer_blocks 0.61`."""
    for of in plan.sizes.denoisers:
        if not of.blocks:
            yield f"{of.name} cannot be cut into shards"
            continue
        runs = [
            f"{len(list(run))} x {name} {_in_gib(num_bytes)}"
            for (name, num_bytes), run in groupby(
                of.blocks, key=lambda block: (block.name.rpartition(".")[0] or block.name, block.weights_bytes)
            )
        ]
        head, tail = _in_gib(of.head_bytes), _in_gib(of.tail_bytes)
        yield f"blocks of {of.name}: {', '.join(runs)} GiB; {head} more on every rank, {tail} on the last"


def _processes(plan: Plan) -> Table:
    processes = plan.placement.processes
    adapters = ("adapters",) if any(process.sizes.adapter_bytes for process in processes) else ()
    table = _table("process", "blocks", "weights", "on device", "working", *adapters, "needs", "num_gpus", "where")
    for process in processes:
        sizes = process.sizes
        table.add_row(
            str(process),
            ", ".join(dict.fromkeys(f"{start}:{end}" for start, end in sizes.blocks or () if end)),
            _in_gib(sizes.weights_bytes),
            _in_gib(sizes.device_bytes),
            _in_gib(sizes.working_bytes),
            *(_in_gib(sizes.adapter_bytes) for _ in adapters),
            _in_gib(sizes.need_bytes - (0 if process.num_gpus else OVERHEAD_BYTES)),
            f"{process.num_gpus:g}",
            ", ".join(map(str, process.gpus)) or ("-" if process.num_gpus else "CPU"),
        )
    batch = f", {plan.sizes.batch_size} merged" if plan.sizes.batch_size > 1 else ""
    parts = " + ".join(("on device", "working", *adapters, _in_gib(OVERHEAD_BYTES)))
    table.caption = (
        f"GiB; working: at {largest(plan.sizes.sizes)}{batch}; needs: {parts} of CUDA and allocator, assumed"
    )
    return table


def _gpus(plan: Plan) -> Table:
    table = _table("GPU", "GiB", "planned", "free", *(() if plan.rate is None else ("busy",)))
    for gpu in plan.placement.gpus:
        used = plan.placement.used_bytes(gpu)
        busy = () if plan.rate is None else (f"{plan.rate.gpu_use[gpu]:.0%}",)
        table.add_row(str(gpu), *map(_in_gib, (gpu.memory_bytes, used, gpu.memory_bytes - used)), *busy)
    return table


def _replicas(plan: Plan) -> Iterator[str]:
    """Yields the number of replicas of the stages that only these GPUs limit."""
    found = [f"{stage} {plan.placement.num_replicas(stage)}" for stage in plan.auto]
    if found:
        times = "assumed" if plan.rate is None else "measured"
        yield f"under load, with the {times} times of the stages, these GPUs hold {', '.join(found)} replicas"


def _rate(plan: Plan) -> Iterator[str]:
    if plan.rate is None:
        yield "throughput: unknown without times (relay profile, then --profile)"
        return
    stages = ", ".join(
        f"{stage} {plan.placement.num_replicas(stage)} / {plan.rate.stage_s[stage]:.3g} s" for stage in STAGES
    )
    yield f"throughput: at most {plan.rate.bound:.3g} a second, by replicas / time ({stages}), without merging"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for column in columns:
        is_text = column in {"component", "class", "as", "process", "blocks", "where", "GPU"}
        table.add_column(column, justify="left" if is_text else "right")
    return table


def _in_gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"

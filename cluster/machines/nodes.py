"""The nodes and GPUs of the running Ray cluster. Ray only counts GPUs; their memory is read from each node's
driver."""

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.machines.inventory import USABLE_MEMORY_SHARE, Gpu

_ANSWER_S = 30.0
"""Timeout for a worker process to start on every node and query the driver."""
_COMMAND = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """One machine, with the resources that Ray counts."""

    num_cpus: float
    labels: Mapping[str, str]

    def has_labels(self, selector: Mapping[str, str]) -> bool:
        """selector: conditions by label name, in Ray's syntax: `a`, `!a`, `in(a,b)` or `!in(a,b)`."""
        return all(_matches(self.labels.get(name), wanted) for name, wanted in selector.items())


def _matches(value: str | None, wanted: str) -> bool:
    positive = wanted.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", positive)
    values = [each.strip() for each in listed[1].split(",")] if listed else [positive]
    return (value in values) != wanted.startswith("!")


def is_connected() -> bool:
    """Whether this process belongs to a Ray cluster."""
    return bool(ray.is_initialized())


def cluster_nodes() -> tuple[Node, ...]:
    """Returns the nodes that are alive."""
    return tuple(Node(node["Resources"].get("CPU", 0.0), node["Labels"]) for node in ray.nodes() if node["Alive"])


def cluster_gpus() -> tuple[Gpu, ...]:
    """Returns the GPUs of all nodes that are alive. `memory_bytes` is 0 if unknown: without a driver, Ray's GPUs
    are mere numbers."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    memory = _ask_nodes([node["NodeID"] for node in nodes])
    return tuple(
        Gpu(i, index, int(USABLE_MEMORY_SHARE * memory[i]))
        for i, node in enumerate(nodes)
        for index in range(int(node["Resources"]["GPU"]))
    )


def has_autoscaler() -> bool:
    """Whether nodes may be added on demand: Ray's launcher and KubeRay label theirs with their node group."""
    return any(node["Alive"] and node["Labels"].get("ray.io/node-group") for node in ray.nodes())


def is_single_node() -> bool:
    """Whether this machine is the whole Ray cluster of this process, and no node can be added."""
    return is_connected() and sum(node["Alive"] for node in ray.nodes()) == 1 and not has_autoscaler()


def run_in_ray_task(function: Callable[..., T], *args: Any) -> T:
    """Calls `function` in a separate process that takes none of the cluster's resources; blocks. Raises its
    exceptions."""
    result: T = ray.get(ray.remote(num_cpus=0, max_calls=1)(function).remote(*args))
    return result


def _ask_nodes(node_ids: list[str]) -> list[int]:
    """Returns the bytes of the largest GPU of every node, 0 if unknown. Queries all nodes at once."""
    asked = [
        ray.remote(driver_memory_bytes)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
        .remote()
        for node_id in node_ids
    ]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_S) if asked else ([], [])
    return [ray.get(answer) if answer in ready else 0 for answer in asked]


def driver_memory_bytes() -> int:
    """Returns the memory of this machine's largest GPU, read from its driver; 0 without one. Takes 0.1 s, because
    it needs neither a CUDA context nor torch."""
    try:
        answer = subprocess.run(_COMMAND, capture_output=True, text=True, timeout=_ANSWER_S / 2, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return max((int(line) * 2**20 for line in answer.stdout.split() if line.isdecimal()), default=0)

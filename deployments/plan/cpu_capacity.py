"""Checks whether the available nodes have the CPUs and labels that an app needs."""

from collections.abc import Iterator, Mapping, Sequence

from cluster.machines.nodes import Node
from cluster.replicas.resources import ResourceConfig
from deployments.config.stage import StageConfig
from deployments.plan.capacity import Shortage

_EPSILON = 1e-6


def find_cpu_shortage(stages: Mapping[str, StageConfig], others: float, nodes: Sequence[Node]) -> Shortage:
    """Returns what an app lacks: surely, if first replicas have no place; perhaps, if only further ones have none.

    Args:
        stages: configs by name.
        others: CPUs that the rest of the app needs.
    """
    lone = [sentence for name, config in stages.items() for sentence in _find_unplaced(name, config, nodes)]
    if lone:
        return Shortage(tuple(lone), ())
    awake = {name: config for name, config in stages.items() if config.min_replicas}
    return Shortage(
        tuple(_find_too_many(awake, dict.fromkeys(awake, 1), others, nodes)),
        tuple(_find_too_many(awake, {n: c.min_replicas for n, c in awake.items()}, others, nodes)),
    )


def _find_unplaced(name: str, config: ResourceConfig, nodes: Sequence[Node]) -> Iterator[str]:
    """Yields a sentence if no node could hold one process of the stage."""
    chosen = [node for node in nodes if node.has_labels(config.label_selector)]
    if not chosen:
        labels = ", ".join(f"{label}: {value}" for label, value in config.label_selector.items())
        yield f"{name} needs a node with {labels}, but none of the {len(nodes)} nodes has that: label one so"
        return
    largest = max(node.num_cpus for node in chosen)
    if config.num_cpus > largest + _EPSILON:
        yield (
            f"{name}.num_cpus is {config.num_cpus:g}, but the largest node it may go to has {largest:g} CPUs: "
            "lower num_cpus, or add a node that has them"
        )


def _find_too_many(
    stages: Mapping[str, StageConfig], replicas: Mapping[str, int], others: float, nodes: Sequence[Node]
) -> Iterator[str]:
    """Yields a sentence if the stages, each of which has a place alone, need more CPUs together than there are."""
    asked = {name: replicas[name] * config.num_ranks * config.num_cpus for name, config in stages.items()}
    wanted, found = sum(asked.values()) + others, sum(node.num_cpus for node in nodes)
    if wanted > found + _EPSILON:
        shares = ", ".join(
            f"{name} {replicas[name] * config.num_ranks} x {config.num_cpus:g}" for name, config in stages.items()
        )
        yield (
            f"num_cpus is {wanted:g} in all ({shares}), but the cluster has {found:g} CPUs: lower num_cpus "
            "(fractions are allowed), shards or min_replicas, or add nodes"
        )

"""What an app that is about to start lacks of the CPUs and labels of the nodes that are there."""

from collections.abc import Iterator, Mapping, Sequence

from cluster.nodes import Node
from cluster.resources import ResourceConfig
from deployments.config import StageConfig
from deployments.plan.room import Lack

_EPSILON = 1e-6


def find_cpu_lack(stages: Mapping[str, StageConfig], others: float, nodes: Sequence[Node]) -> Lack:
    """Surely, if one replica of every stage has no place; perhaps, if it is the further ones.

    Args:
        stages: by name.
        others: CPUs that the rest of the app asks for.
    """
    lone = [sentence for name, config in stages.items() for sentence in _find_unplaced(name, config, nodes)]
    if lone:
        return Lack(tuple(lone), ())
    awake = {name: config for name, config in stages.items() if config.min_replicas}
    return Lack(
        tuple(_find_too_many(awake, dict.fromkeys(awake, 1), others, nodes)),
        tuple(_find_too_many(awake, {n: c.min_replicas for n, c in awake.items()}, others, nodes)),
    )


def _find_unplaced(name: str, config: ResourceConfig, nodes: Sequence[Node]) -> Iterator[str]:
    """One process that no node could hold."""
    chosen = [node for node in nodes if node.has_labels(config.label_selector)]
    if not chosen:
        labels = ", ".join(f"{label}: {value}" for label, value in config.label_selector.items())
        yield f"{name} wants a node with {labels}, and none of the {len(nodes)} nodes has that: label one so"
        return
    largest = max(node.num_cpus for node in chosen)
    if config.num_cpus > largest + _EPSILON:
        yield (
            f"{name}.num_cpus is {config.num_cpus:g}, and the largest node it may go to has {largest:g} CPUs: "
            "lower num_cpus, or add a node that has them"
        )


def _find_too_many(
    stages: Mapping[str, StageConfig], replicas: Mapping[str, int], others: float, nodes: Sequence[Node]
) -> Iterator[str]:
    """All together; each for itself has a place."""
    asked = {name: replicas[name] * config.num_ranks * config.num_cpus for name, config in stages.items()}
    wanted, found = sum(asked.values()) + others, sum(node.num_cpus for node in nodes)
    if wanted > found + _EPSILON:
        shares = ", ".join(
            f"{name} {replicas[name] * config.num_ranks} x {config.num_cpus:g}" for name, config in stages.items()
        )
        yield (
            f"num_cpus is {wanted:g} in all ({shares}), and the cluster has {found:g} CPUs: lower num_cpus, which "
            "may be fractions, or shards or min_replicas, or add nodes"
        )

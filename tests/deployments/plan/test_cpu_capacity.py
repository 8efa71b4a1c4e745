"""What an app lacks of the CPUs and labels of the available nodes, found before it starts."""

from typing import Any

import pytest

from cluster.machines.nodes import Node
from deployments.config.encoder import EncoderConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.plan.cpu_capacity import find_cpu_shortage

TWO = [Node(2, {}), Node(4, {"zone": "b", "ray.io/accelerator-type": "H100"})]


def stages(**transformer: Any) -> dict[str, StageConfig]:
    return {
        "encoder": EncoderConfig(num_cpus=0.5),
        "transformer": TransformerConfig(**transformer),
        "vae": VaeConfig(num_cpus=0.5),
    }


def test_what_fits_is_let_in() -> None:
    assert find_cpu_shortage(stages(num_cpus=4), 1, TWO).surely == ()


def test_more_than_the_largest_node_has_is_told_with_both_numbers() -> None:
    [sentence] = find_cpu_shortage(stages(num_cpus=64), 0, TWO).surely
    assert sentence.startswith("transformer.num_cpus is 64, but the largest node it may go to has 4 CPUs: lower")


def test_more_than_all_nodes_have_is_told_with_its_parts() -> None:
    [sentence] = find_cpu_shortage(stages(num_cpus=2, shards=3), 0, TWO).surely
    assert (
        "num_cpus is 7 in all (encoder 1 x 0.5, transformer 3 x 2, vae 1 x 0.5), but the cluster has 6" in sentence
    )


def test_the_ingress_counts() -> None:
    assert find_cpu_shortage(stages(num_cpus=4), 1.5, TWO).surely


def test_further_replicas_may_wait() -> None:
    shortage = find_cpu_shortage(stages(num_cpus=2, min_replicas=3, max_replicas=3), 0, TWO)
    assert shortage.surely == ()
    assert "transformer 3 x 2" in shortage.perhaps[0]


def test_a_stage_that_may_sleep_counts_for_itself_alone() -> None:
    assert find_cpu_shortage(stages(num_cpus=4, min_replicas=0), 1.5, TWO).surely == ()
    assert find_cpu_shortage(stages(num_cpus=5, min_replicas=0), 0, TWO).surely


@pytest.mark.parametrize(
    ("labels", "fits"),
    [
        ({"zone": "b"}, True),
        ({"zone": "c"}, False),
        ({"zone": "!b"}, True),
        ({"zone": "in(a, b)"}, True),
        ({"zone": "in(a,c)"}, False),
        ({"zone": "!in(a,c)"}, True),
        ({"zone": "b", "disk": "fast"}, False),
    ],
)
def test_labels_are_read_as_ray_reads_them(labels: dict[str, str], fits: bool) -> None:
    assert (find_cpu_shortage(stages(labels=labels), 0, TWO).surely == ()) == fits


def test_an_accelerator_that_no_node_has_is_told() -> None:
    assert find_cpu_shortage(stages(accelerator_type="H100"), 0, TWO).surely == ()
    [sentence] = find_cpu_shortage(stages(accelerator_type="B200"), 0, TWO).surely
    assert sentence.startswith(
        "transformer needs a node with ray.io/accelerator-type: B200, but none of the 2 nodes"
    )


def test_only_nodes_with_the_labels_count() -> None:
    [sentence] = find_cpu_shortage(stages(num_cpus=3, labels={"zone": "!b"}), 0, TWO).surely
    assert "the largest node it may go to has 2 CPUs" in sentence

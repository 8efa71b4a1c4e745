"""Deliberate faults of the product: one changed line each, and the test on the simulated device that finds it."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    line: str
    """Regular expression of the code to replace, which must match once."""
    by: str
    killed_by: str

    def apply(self, root: Path) -> None:
        """Changes the line in the copy of the product at root. Raises ValueError unless it is there once."""
        path = root / self.file
        changed, number = re.subn(self.line, self.by, path.read_text())
        if number != 1:
            raise ValueError(f"{self.name}: {number} places in {self.file} match {self.line!r}, not 1")
        path.write_text(changed)


ENGINE = "deployments/engine/engine.py"
VRAM_LIMIT, TRANSPORT = "deployments/memory/vram_limit.py", "cluster/ranks/transport.py"
TEST_VRAM_LIMIT = "tests/deployments/memory/test_vram_limit.py"
TEST_GLOO = "tests/cluster/ranks/test_transport.py::test_gloo_brings_tensors_between_two_ranks_of_one_gpu"
TEST_GPU = "tests/deployments/stages/test_on_gpu.py::test_a_gpu_gives_what_the_cpu_gives"
TEST_REQUESTS = "tests/deployments/stages/test_request_stream.py"

MUTANTS = (
    Mutant(
        "a receiver's memory without record_stream",
        "cluster/ranks/message.py",
        r"payload\.record_stream\(.*",
        "pass",
        "tests/cluster/ranks/test_message.py::test_what_arrived_is_not_overwritten_while_the_gpu_still_reads_it",
    ),
    Mutant(
        "weights fetched ahead into memory that may be in use",
        VRAM_LIMIT,
        r"self\._stream\.wait_stream\(.*",
        "pass",
        f"{TEST_VRAM_LIMIT}::test_on_a_gpu_weights_may_leave_while_the_next_are_fetched",
    ),
    Mutant(
        "weights used before they are there",
        VRAM_LIMIT,
        r"\S+\.wait_event\(done\)",
        "pass",
        f"{TEST_VRAM_LIMIT}::test_on_a_gpu_weights_may_leave_while_the_next_are_fetched",
    ),
    Mutant(
        "weights that leave while they are fetched",
        VRAM_LIMIT,
        r"self\._await\(leaf\)  # its.*",
        "leaf.ahead = None",
        f"{TEST_VRAM_LIMIT}::test_on_a_gpu_weights_may_leave_while_the_next_are_fetched",
    ),
    Mutant(
        "a message sent before its copies are done",
        TRANSPORT,
        r"self\.synchronize\(\)  # copies.*",
        "pass",
        TEST_GLOO,
    ),
    Mutant(
        "a message handed on before it is there",
        TRANSPORT,
        r"self\._incoming\.synchronize\(\)",
        "pass",
        TEST_GLOO,
    ),
    Mutant(
        "a micro-batch sent before it is computed",
        "cluster/ranks/ring.py",
        r"accelerator\.synchronize_stream\(self\._device\)",
        "pass",
        "tests/cluster/ranks/test_ring.py::test_two_ranks_of_one_gpu_compute_what_one_would",
    ),
    Mutant(
        "a forward that does not wait for its inputs",
        ENGINE,
        r"accelerator\.queue_after\(.*",
        "pass",
        f"{TEST_GPU}[sd15]",
    ),
    Mutant(
        "a prediction without record_stream",
        ENGINE,
        r"tree_map_only\(torch\.Tensor, accelerator\.use_here, output\)",
        "pass",
        f"{TEST_REQUESTS}::test_what_a_request_is_at_work_on_is_not_used_again_by_anothers_forward",
    ),
    Mutant(
        "requests on the stream that computes",
        "deployments/stages/denoise.py",
        r"self\._stream = .*",
        "self._stream = None",
        f"{TEST_REQUESTS}::test_what_a_request_waits_for_is_its_own[flux]",
    ),
    Mutant(
        "a replica that stays without its GPU",
        "deployments/memory/residency.py",
        r"return accelerator\.is_lost\(.*",
        "return False",
        "tests/deployments/replica/test_lifecycle.py",
    ),
    Mutant(
        "a share without a cap",
        "deployments/memory/share.py",
        r"accelerator\.limit_bytes\(.*",
        "pass",
        "tests/deployments/memory/test_share.py::test_who_takes_more_than_its_share_fails_alone",
    ),
    Mutant(
        "embeddings left on the host",
        "deployments/stages/tensors.py",
        r"one\.to\(META if one\.is_meta else device, ",
        "one.to(",
        f"{TEST_GPU}[flux]",
    ),
    Mutant(
        "latents left on the host",
        "deployments/stages/decode.py",
        r"to_device\(\(call\.args, dict\(call\.kwargs\)\), self\._device, self\._dtype\)",
        "call.args, dict(call.kwargs)",
        f"{TEST_GPU}[flux]",
    ),
    Mutant(
        "what goes to another stage read before its copy is done",
        "deployments/stages/tensors.py",
        r"tensor\.cpu\(\)\.contiguous\(\)",
        'tensor.to("cpu", non_blocking=True)',
        f"{TEST_GPU}[flux]",
    ),
)

"""The engine of one Transformer replica: requests' threads on one side, the denoiser on the other."""

import logging
import threading
from typing import Any

import torch

from deployments.config import TransformerConfig
from deployments.engine.merge import Inputs, Merger, num_samples, num_tokens
from deployments.engine.shard import Shard
from deployments.engine.step_queue import MicroBatch, Seat, StepQueue

log = logging.getLogger("ray.serve")


class EngineClosed(Exception):
    """The engine was shut down."""


class Engine:
    """Pulls micro-batches from the step queue and runs them, in a compute thread of its own."""

    def __init__(self, shard: Shard, config: TransformerConfig) -> None:
        self._shard = shard
        self._merger = Merger(type(shard.model).__name__)
        config_of_model: Any = shard.model.config
        self._patch_size = config_of_model.get("patch_size", 1)
        self.queue = StepQueue(
            num_shards=1,
            max_batch_size=config.max_batch_size,
            batch_wait_s=config.batch_wait_ms / 1e3,
            max_batch_tokens=config.max_batch_tokens,
        )
        threading.Thread(target=self._compute, name="compute", daemon=True).start()

    def forward(self, seat: Seat, inputs: Inputs) -> torch.Tensor:
        """One forward of the denoiser, merged with others'; called by the request's thread, which waits."""
        result: torch.Tensor = self.queue.forward(
            seat,
            inputs,
            signature=self._merger.signature(inputs),
            tokens=num_tokens(inputs, self._patch_size),
        )
        return result

    def close(self) -> None:
        """Ends the compute thread; open forwards raise EngineClosed."""
        self.queue.close(EngineClosed("the replica is shutting down"))

    def _compute(self) -> None:
        while True:
            try:
                batch = self.queue.take()
            except EngineClosed:
                return
            try:
                self.queue.finish(batch.id, self._run(batch))
            except Exception as error:  # it is the requests' own: they get it, the engine goes on
                self.queue.fail(batch.id, error)

    def _run(self, batch: MicroBatch) -> Any:
        output: Any = self._shard.run(self._merger.merge(batch.payloads))
        return output.split([num_samples(inputs) for inputs in batch.payloads])

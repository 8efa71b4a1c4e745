"""Embeddings of prompts seen lately."""

from collections import OrderedDict
from typing import TYPE_CHECKING

from deployments.request import Prompt

if TYPE_CHECKING:
    from deployments.families.family import Embeds


class EmbeddingCache:
    """Least recently used first out, bounded by the tensors' bytes. Not thread-safe: for one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Prompt, Embeds] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, prompt: Prompt) -> "Embeds | None":
        embeds = self._entries.get(prompt)
        if embeds is not None:
            self._entries.move_to_end(prompt)
        return embeds

    def put(self, prompt: Prompt, embeds: "Embeds") -> None:
        """Keep embeds, at the expense of the oldest. What is larger than the whole cache is not kept."""
        if prompt in self._entries or num_bytes(embeds) > self._max_bytes:
            return
        self._entries[prompt] = embeds
        self.num_bytes += num_bytes(embeds)
        while self.num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= num_bytes(oldest)


def num_bytes(embeds: "Embeds") -> int:
    """Of all its tensors."""
    return sum(value.nbytes for value in embeds.values() if value is not None)

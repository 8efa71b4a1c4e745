"""Embeddings are kept by their bytes, the least recently used first out."""

import torch

from deployments.embedding_cache import EmbeddingCache
from deployments.families.family import Embeds
from deployments.request import Prompt

ENTRY_BYTES = 400


def prompt(text: str) -> Prompt:
    return Prompt(text, None, is_guided=False)


def embeds(num_bytes: int = ENTRY_BYTES) -> Embeds:
    """A quarter of the bytes is a mask's; an encoder without a pooled output gives None."""
    floats = torch.zeros(1, num_bytes * 3 // 16)
    return {"prompt_embeds": floats, "mask": torch.zeros(num_bytes // 4, dtype=torch.bool), "pooled": None}


def kept(cache: EmbeddingCache, texts: str) -> str:
    return "".join(text for text in texts if cache.get(prompt(text)) is not None)


def test_what_was_put_is_got_back() -> None:
    cache, one = EmbeddingCache(ENTRY_BYTES), embeds()
    cache.put(prompt("a"), one)
    assert cache.get(prompt("a")) is one
    assert cache.get(prompt("b")) is None


def test_all_of_the_prompt_is_the_key() -> None:
    cache = EmbeddingCache(10 * ENTRY_BYTES)
    cache.put(Prompt("a", "b", is_guided=True), embeds())
    assert cache.get(Prompt("a", "c", is_guided=True)) is None
    assert cache.get(Prompt("a", None, is_guided=True)) is None
    assert cache.get(Prompt("a", "b", is_guided=False)) is None
    assert cache.get(Prompt("a", "b", is_guided=True)) is not None


def test_every_tensor_counts_with_its_bytes() -> None:
    cache = EmbeddingCache(10 * ENTRY_BYTES)
    cache.put(prompt("a"), embeds())
    cache.put(prompt("b"), embeds(2 * ENTRY_BYTES))
    assert (len(cache), cache.num_bytes) == (2, 3 * ENTRY_BYTES)


def test_the_oldest_goes_first() -> None:
    cache = EmbeddingCache(2 * ENTRY_BYTES)
    for text in "abc":
        cache.put(prompt(text), embeds())
    assert kept(cache, "abc") == "bc"
    assert cache.num_bytes == 2 * ENTRY_BYTES


def test_what_was_read_lately_stays() -> None:
    cache = EmbeddingCache(2 * ENTRY_BYTES)
    cache.put(prompt("a"), embeds())
    cache.put(prompt("b"), embeds())
    cache.get(prompt("a"))
    cache.put(prompt("c"), embeds())
    assert kept(cache, "abc") == "ac"


def test_a_large_entry_displaces_as_many_as_it_needs_room_for() -> None:
    cache = EmbeddingCache(4 * ENTRY_BYTES)
    for text in "abcd":
        cache.put(prompt(text), embeds())
    cache.put(prompt("e"), embeds(3 * ENTRY_BYTES))
    assert kept(cache, "abcde") == "de"
    assert cache.num_bytes == 4 * ENTRY_BYTES


def test_what_is_larger_than_the_cache_is_not_kept_and_displaces_nothing() -> None:
    cache = EmbeddingCache(ENTRY_BYTES)
    cache.put(prompt("a"), embeds())
    cache.put(prompt("b"), embeds(2 * ENTRY_BYTES))
    assert kept(cache, "ab") == "a"


def test_a_prompt_put_twice_counts_once() -> None:
    cache = EmbeddingCache(2 * ENTRY_BYTES)
    cache.put(prompt("a"), embeds())
    cache.put(prompt("a"), embeds())
    assert (len(cache), cache.num_bytes) == (1, ENTRY_BYTES)


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = EmbeddingCache(0)
    cache.put(prompt("a"), embeds())
    assert len(cache) == 0

"""Embeddings are kept by their bytes, the least recently used first out."""

from typing import Any

import torch

from deployments.embedding_cache import EmbeddingCache
from deployments.request import num_bytes

ENTRY_BYTES = 400


def put(cache: EmbeddingCache, key: str, size: int = ENTRY_BYTES) -> Any:
    """A quarter of the bytes is a mask's; an encoder without a pooled output gives None."""
    value = (torch.zeros(1, size * 3 // 16), [torch.zeros(size // 4, dtype=torch.bool), None])
    cache.put(key, value, num_bytes(value))
    return value


def kept(cache: EmbeddingCache, keys: str) -> str:
    return "".join(key for key in keys if cache.get(key) is not None)


def test_what_was_put_is_got_back() -> None:
    cache = EmbeddingCache(ENTRY_BYTES)
    one = put(cache, "a")
    assert cache.get("a") is one
    assert cache.get("b") is None


def test_every_tensor_counts_with_its_bytes() -> None:
    cache = EmbeddingCache(10 * ENTRY_BYTES)
    put(cache, "a")
    put(cache, "b", 2 * ENTRY_BYTES)
    assert (len(cache), cache.num_bytes) == (2, 3 * ENTRY_BYTES)


def test_the_oldest_goes_first() -> None:
    cache = EmbeddingCache(2 * ENTRY_BYTES)
    for text in "abc":
        put(cache, text)
    assert kept(cache, "abc") == "bc"
    assert cache.num_bytes == 2 * ENTRY_BYTES


def test_what_was_read_lately_stays() -> None:
    cache = EmbeddingCache(2 * ENTRY_BYTES)
    put(cache, "a")
    put(cache, "b")
    cache.get("a")
    put(cache, "c")
    assert kept(cache, "abc") == "ac"


def test_a_large_entry_displaces_as_many_as_it_needs_room_for() -> None:
    cache = EmbeddingCache(4 * ENTRY_BYTES)
    for text in "abcd":
        put(cache, text)
    put(cache, "e", 3 * ENTRY_BYTES)
    assert kept(cache, "abcde") == "de"
    assert cache.num_bytes == 4 * ENTRY_BYTES


def test_what_is_larger_than_the_cache_is_not_kept_and_displaces_nothing() -> None:
    cache = EmbeddingCache(ENTRY_BYTES)
    put(cache, "a")
    put(cache, "b", 2 * ENTRY_BYTES)
    assert kept(cache, "ab") == "a"


def test_a_prompt_put_twice_counts_once() -> None:
    cache = EmbeddingCache(2 * ENTRY_BYTES)
    put(cache, "a")
    put(cache, "a")
    assert (len(cache), cache.num_bytes) == (1, ENTRY_BYTES)


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = EmbeddingCache(0)
    put(cache, "a")
    assert len(cache) == 0

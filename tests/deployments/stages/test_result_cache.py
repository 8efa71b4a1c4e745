"""The cache of embeddings is limited in bytes, and drops the least recently used first."""

from typing import Any

import torch

from deployments.answers import num_bytes
from deployments.stages.result_cache import ResultCache

ENTRY_BYTES = 400


def put(cache: ResultCache, key: str, size: int = ENTRY_BYTES) -> Any:
    """Puts an entry of this size, a quarter of it a mask; None stands for an encoder without pooled output."""
    value = (torch.zeros(1, size * 3 // 16), [torch.zeros(size // 4, dtype=torch.bool), None])
    cache.put(key, value, num_bytes(value))
    return value


def kept(cache: ResultCache, keys: str) -> str:
    return "".join(key for key in keys if cache.get(key) is not None)


def test_what_was_put_is_got_back() -> None:
    cache = ResultCache(ENTRY_BYTES)
    one = put(cache, "a")
    assert cache.get("a") is one
    assert cache.get("b") is None


def test_every_tensor_counts_with_its_bytes() -> None:
    cache = ResultCache(10 * ENTRY_BYTES)
    put(cache, "a")
    put(cache, "b", 2 * ENTRY_BYTES)
    assert (len(cache), cache.num_bytes) == (2, 3 * ENTRY_BYTES)


def test_the_oldest_goes_first() -> None:
    cache = ResultCache(2 * ENTRY_BYTES)
    for text in "abc":
        put(cache, text)
    assert kept(cache, "abc") == "bc"
    assert cache.num_bytes == 2 * ENTRY_BYTES


def test_what_was_read_lately_stays() -> None:
    cache = ResultCache(2 * ENTRY_BYTES)
    put(cache, "a")
    put(cache, "b")
    cache.get("a")
    put(cache, "c")
    assert kept(cache, "abc") == "ac"


def test_a_large_entry_displaces_as_many_as_it_needs_room_for() -> None:
    cache = ResultCache(4 * ENTRY_BYTES)
    for text in "abcd":
        put(cache, text)
    put(cache, "e", 3 * ENTRY_BYTES)
    assert kept(cache, "abcde") == "de"
    assert cache.num_bytes == 4 * ENTRY_BYTES


def test_what_is_larger_than_the_cache_is_not_kept_and_displaces_nothing() -> None:
    cache = ResultCache(ENTRY_BYTES)
    put(cache, "a")
    put(cache, "b", 2 * ENTRY_BYTES)
    assert kept(cache, "ab") == "a"


def test_a_prompt_put_twice_counts_once() -> None:
    cache = ResultCache(2 * ENTRY_BYTES)
    put(cache, "a")
    put(cache, "a")
    assert (len(cache), cache.num_bytes) == (1, ENTRY_BYTES)


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = ResultCache(0)
    put(cache, "a")
    assert len(cache) == 0

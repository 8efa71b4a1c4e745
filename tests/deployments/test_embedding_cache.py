"""Embeddings are kept by bytes, the least recently used first out."""

import torch

from deployments.embedding_cache import EmbeddingCache
from deployments.request import Prompt

KIB = {"prompt_embeds": torch.zeros(256)}


def prompt(text: str) -> Prompt:
    return Prompt(text, None, is_guided=False)


def test_what_was_put_is_found_under_all_that_determines_it() -> None:
    cache = EmbeddingCache(4096)
    cache.put(prompt("a"), KIB)
    assert cache.get(prompt("a")) is KIB
    assert cache.get(Prompt("a", "bad", True)) is None
    assert cache.get(Prompt("a", None, True)) is None


def test_the_least_recently_used_goes_first() -> None:
    cache = EmbeddingCache(2 * 1024)
    cache.put(prompt("a"), KIB)
    cache.put(prompt("b"), KIB)
    cache.get(prompt("a"))
    cache.put(prompt("c"), KIB)
    assert cache.get(prompt("b")) is None
    assert cache.get(prompt("a")) is KIB
    assert cache.num_bytes == 2 * 1024


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = EmbeddingCache(1023)
    cache.put(prompt("a"), KIB)
    assert len(cache) == cache.num_bytes == 0


def test_putting_twice_counts_once() -> None:
    cache = EmbeddingCache(4096)
    cache.put(prompt("a"), KIB)
    cache.put(prompt("a"), KIB)
    assert cache.num_bytes == 1024

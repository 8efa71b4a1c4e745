"""Tests of what `relay bench soak` counts, and a short run."""

import asyncio
import mmap
import os
import threading
from typing import Any

import pytest

from serve_app.bench.holdings import Holding, Sample, growth, hold, slope
from serve_app.bench.soak import soak


def test_the_slope_is_that_of_the_line() -> None:
    assert slope([(0.0, 1.0), (10.0, 3.0), (20.0, 5.0)]) == pytest.approx(0.2)
    assert slope([(5.0, 7.0)]) == 0.0


def test_memory_that_a_process_takes_is_seen() -> None:
    before = hold(os.getpid()).memory_mib
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE) as taken:  # the heap might reuse memory that it holds
        taken.write(os.urandom(64 << 20))
        assert hold(os.getpid()).memory_mib >= before + 60


def test_a_thread_and_a_file_that_stay_are_seen() -> None:
    before, is_over = hold(os.getpid()), threading.Event()
    thread = threading.Thread(target=is_over.wait)
    thread.start()
    with open(os.devnull):
        after = hold(os.getpid())
    is_over.set()
    thread.join()
    assert (after.num_threads, after.num_files) == (before.num_threads + 1, before.num_files + 1)


def test_growth_is_told_for_a_thousand_requests() -> None:
    def of(mib: float) -> dict[str, Holding]:
        return {"VAE": Holding(mib, 9, 20)}

    [row] = growth([Sample(100, of(50.0)), Sample(300, of(52.0))], (of(50.0), {"VAE": Holding(52.0, 11, 21)}))
    assert row["mib_per_1000"] == pytest.approx(10.0)
    assert (row["threads_after"], row["files_after"]) == (11, 21)


def test_mixed_load_leaves_no_object_and_no_open_file(flux_app: Any) -> None:
    url, _, app = flux_app.url.rpartition("/")
    rows, outcomes = asyncio.run(soak(f"{url}/{app}", app, seconds=10.0, seed=1))
    assert not outcomes.counts["wrong"]
    assert outcomes.counts.total() > 10
    assert {row["process"] for row in rows} >= {"encoder", "rank 0", "VAE", "ingress"}
    assert all(row["objects_after"] <= row["objects"] for row in rows)
    assert all(int(row["files_after"]) <= int(row["files"]) + 2 for row in rows), rows

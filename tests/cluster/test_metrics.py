"""Tests of a process's metrics, without Ray to export them."""

import contextlib
import re
import threading

import pytest

from cluster.metrics import COUNTERS, GAUGES, HISTOGRAMS, StageMetrics, export_regularly


def test_names_tell_their_units_as_prometheus_wants_them() -> None:
    assert all(name.endswith("_total") for name in COUNTERS)
    assert not any(name.endswith("_total") for name in GAUGES | HISTOGRAMS)
    for name, description in {**COUNTERS, **GAUGES, **{name: of[0] for name, of in HISTOGRAMS.items()}}.items():
        assert re.fullmatch(r"relay(_[a-z]+)+", name)
        if re.match(r"(Time|From)\b", description):
            assert "_seconds" in name
        if re.match(r"(Bytes|Weights|Embeddings|Most)\b", description):
            assert "_bytes" in name


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_buckets_rise(name: str) -> None:
    _, buckets = HISTOGRAMS[name]
    assert sorted(set(buckets)) == buckets


def test_a_request_is_in_flight_until_it_ends_however_it_ends() -> None:
    metrics = StageMetrics(stage="test", rank=0, model="m")
    with metrics.request():
        with contextlib.suppress(ValueError), metrics.request():
            assert metrics.num_in_flight == 2
            raise ValueError
        assert metrics.num_in_flight == 1
    assert (metrics.num_requests, metrics.num_in_flight) == (2, 0)


def test_an_export_that_fails_is_tried_again() -> None:
    tries, is_done = iter([True, False]), threading.Event()

    def export() -> None:
        if next(tries, False):
            raise ConnectionError("a rank does not answer")
        is_done.set()

    export_regularly(export, period_s=0.001)
    assert is_done.wait(5)

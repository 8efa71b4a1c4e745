"""Tests of when a figure of the gate fails, and of the kept history of its runs."""

import math
from pathlib import Path

import pytest

from serve_app.bench.gate import EXACT, LIMITS, Measurement, measure_until_good
from serve_app.bench.gate_history import GateHistory, GateRun, fingerprint_here, read_history, write_history
from serve_app.bench.gate_rule import NUM_RUNS, Limit, better_of, find_fault

SPEEDUP = Limit("higher", worst=1.5, relative=0.1, absolute=0.3)
COST = Limit("lower", worst=1.5, relative=0.1, absolute=0.05)
NO_RUNS: dict[str, list[float]] = {name: [] for name in LIMITS}


def test_a_figure_that_is_absent_fails() -> None:
    assert find_fault(None, SPEEDUP, [2.0]) == "was not measured"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_fails_either_way(value: float) -> None:
    assert find_fault(value, SPEEDUP, []) == find_fault(value, COST, []) == f"is {value}"


@pytest.mark.parametrize(
    ("value", "limit", "fault"),
    [(1.49, SPEEDUP, "is 1.49, but must be at least 1.5"), (1.51, COST, "is 1.51, but must be at most 1.5")],
)
def test_a_figure_beyond_its_static_limit_fails_without_any_earlier_run(
    value: float, limit: Limit, fault: str
) -> None:
    assert find_fault(value, limit, []) == fault


@pytest.mark.parametrize(("value", "limit"), [(1.5, SPEEDUP), (9.0, SPEEDUP), (1.5, COST), (0.1, COST)])
def test_a_figure_within_its_static_limit_passes_without_any_earlier_run(value: float, limit: Limit) -> None:
    assert find_fault(value, limit, []) is None


@pytest.mark.parametrize(
    ("value", "is_regression"),
    [
        (3.75, False),  # 0.25 or 6 % less: within both limits
        (2.9, True),  # 1.1 or 28 % less: beyond both limits
        (3.65, False),  # 0.35 or 9 % less: beyond the absolute limit only
        (3.5, True),
        (5.0, False),
    ],
)
def test_only_what_passes_both_the_share_and_the_amount_is_a_regression(value: float, is_regression: bool) -> None:
    assert (find_fault(value, SPEEDUP, [4.0]) is not None) == is_regression


def test_what_got_dearer_is_a_regression_where_lower_is_better() -> None:
    assert "worse by more than" in str(find_fault(1.2, COST, [1.0]))
    assert find_fault(1.04, COST, [0.9]) is not None
    assert find_fault(0.5, COST, [1.0]) is None


def test_the_median_of_the_last_runs_counts_and_one_freak_does_not() -> None:
    assert find_fault(2.0, SPEEDUP, [2.0, 2.1, 9.0]) is None
    older = [9.0] * 10
    assert find_fault(2.0, SPEEDUP, older + [2.0] * NUM_RUNS) is None
    assert find_fault(2.0, SPEEDUP, [2.0] * 10 + [9.0] * NUM_RUNS) is not None


def test_the_better_of_two_is_never_the_one_that_is_no_number() -> None:
    assert better_of(2.0, 3.0, SPEEDUP) == 3.0
    assert better_of(2.0, 3.0, COST) == 2.0
    assert better_of(math.nan, 1.0, SPEEDUP) == better_of(1.0, None, SPEEDUP) == 1.0
    assert better_of(None, None, SPEEDUP) is None


def test_what_fails_is_measured_again_and_the_best_counts() -> None:
    values = iter([0.1, 0.9, 0.2])
    measurement = Measurement(("two_shards_efficiency",), lambda: {"two_shards_efficiency": next(values)})
    assert measure_until_good(measurement, NO_RUNS) == {"two_shards_efficiency": 0.9}
    assert list(values) == [0.2]


def test_what_is_exact_is_not_forgiven_when_measured_again() -> None:
    values = iter([1.5, 1.0, 1.0])
    measurement = Measurement(("ring_bytes_over_payload",), lambda: {"ring_bytes_over_payload": next(values)})
    measured = measure_until_good(measurement, NO_RUNS)
    assert measured == {"ring_bytes_over_payload": 1.5}
    assert find_fault(measured["ring_bytes_over_payload"], LIMITS["ring_bytes_over_payload"], []) is not None


def test_a_measurement_that_cannot_be_made_leaves_its_figures_absent() -> None:
    def measure() -> dict[str, float]:
        raise OSError("no room")

    assert measure_until_good(Measurement(("engine_over_plain",), measure), NO_RUNS) == {}


def test_what_is_exact_is_a_figure_of_the_gate() -> None:
    assert set(LIMITS) >= EXACT


def test_runs_are_kept_by_machine_and_versions_and_the_oldest_of_them_go(tmp_path: Path) -> None:
    other = GateRun(date="2026-01-01", fingerprint={"processor": "another"}, figures={"a": 7.0})
    history = GateHistory(runs=(other,))
    for number in range(NUM_RUNS + 2):
        history = history.with_run({"a": float(number)})
    file = tmp_path / "gate.json"
    write_history(history, file)
    read = read_history(file)
    assert read.earlier("a", fingerprint_here()) == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert read.earlier("a", {"processor": "another"}) == [7.0]
    assert read.earlier("b", fingerprint_here()) == []


def test_without_a_file_there_are_no_earlier_runs(tmp_path: Path) -> None:
    assert read_history(tmp_path / "none.json") == GateHistory()


def test_the_kept_runs_have_figures_of_the_gate_alone_within_the_static_limits() -> None:
    for run in read_history(Path("docs/benchmarks/gate.json")).runs:
        assert set(run.figures) == set(LIMITS)
        assert [find_fault(value, LIMITS[name], []) for name, value in run.figures.items()] == [None] * len(LIMITS)

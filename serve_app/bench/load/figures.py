"""Statistics of a run's outcomes: rates, percentiles, goodput and stage times."""

import math
import statistics
from collections.abc import Mapping, Sequence

from serve_app.bench.load.endpoint import Outcome
from serve_app.bench.report import Row

REST = "rest"
PERCENTILES = (50, 95, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the smallest value that `percent` percent of the values do not exceed; NaN if there are none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def duration_s(outcomes: Sequence[Outcome]) -> float:
    return max(each.done_s for each in outcomes) - min(each.due_s for each in outcomes)


def meets(outcome: Outcome, slo_s: Mapping[str, float]) -> bool:
    """Whether the request was answered within its SLO. slo_s: seconds by kind of request."""
    return outcome.is_answered and outcome.latency_s <= slo_s[outcome.ask.kind]


def summarize(load: str, outcomes: Sequence[Outcome], slo_s: Mapping[str, float]) -> Row:
    """Returns the row of one load. Shares are of all requests, including refused ones.

    slo_s: seconds by kind of request; empty: the row has no goodput.
    """
    answered = [each for each in outcomes if each.is_answered]
    refused = [each for each in outcomes if each.is_refused]
    took_s = duration_s(outcomes)
    row: dict[str, str | int | float] = {
        "load": load,
        "requests": len(outcomes),
        "answered": len(answered),
        "refused": len(refused),
        "failed": len(outcomes) - len(answered) - len(refused),
        "requests_per_s": len(answered) / took_s,
        "pictures_per_s": sum(each.ask.n for each in answered) / took_s,
    }
    if any(each.num_rejections for each in outcomes):
        row["refusals_waited_out"] = sum(each.num_rejections for each in outcomes)
    latencies = [each.latency_s for each in answered]
    row |= {f"p{percent}_s": percentile(latencies, percent) for percent in PERCENTILES}
    if slo_s:
        met = sum(meets(each, slo_s) for each in outcomes)
        row |= {"slo_met": met / len(outcomes), "goodput_per_s": met / took_s}
    return row | {"send_lag_p99_ms": percentile([each.lag_s * 1e3 for each in outcomes], 99)}


def stage_means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Returns the mean milliseconds of each stage and of the rest; empty if the server does not report them."""
    told = [each for each in outcomes if each.timings_ms]
    if not told:
        return {}
    names = dict.fromkeys(name for each in told for name in each.timings_ms)
    means = {name: statistics.mean(each.timings_ms.get(name, 0.0) for each in told) for name in names}
    return means | {REST: statistics.mean(each.rest_ms for each in told)}


def summarize_kinds(
    load: str, outcomes: Sequence[Outcome], solo_s: Mapping[str, float], slo_s: Mapping[str, float]
) -> list[Row]:
    """Returns a row for each kind of request: its latency alone, and under this load."""
    rows: list[Row] = []
    for kind, alone_s in solo_s.items():
        own = [each for each in outcomes if each.ask.kind == kind]
        latencies = [each.latency_s for each in own if each.is_answered]
        row: dict[str, str | int | float] = {"load": load, "kind": kind, "requests": len(own), "solo_s": alone_s}
        row |= {f"p{percent}_s": percentile(latencies, percent) for percent in PERCENTILES}
        if slo_s and own:
            row |= {"slo_s": slo_s[kind], "slo_met": sum(meets(each, slo_s) for each in own) / len(own)}
        if own:
            rows.append(row)
    return rows

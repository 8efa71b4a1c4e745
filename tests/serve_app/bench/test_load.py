"""Tests of `relay bench serve` against a server other than Latent Relay, and of its parts."""

import asyncio
import json
import random
import statistics
import xml.etree.ElementTree
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve_app.bench.load.curves import draw_curves
from serve_app.bench.load.endpoint import Outcome, Server
from serve_app.bench.load.figures import percentile, stage_means, summarize, summarize_kinds
from serve_app.bench.load.loads import plan_loads, read_counts, read_goodput
from serve_app.bench.load.loop import ClientLost, drive, drive_apart
from serve_app.bench.load.workload import (
    Ask,
    WorkloadFault,
    invent_prompts,
    plan_asks,
    read_mix,
    read_trace,
    with_arrivals,
)
from serve_app.cli import cli
from serve_app.config.app import ConfigError
from tests.foreign_server import ForeignServer, foreign_server

pytestmark = pytest.mark.slow

ASK = Ask(prompt="a fox")


def driven(server: ForeignServer, asks: Sequence[Ask], max_concurrency: int | None, **how: Any) -> list[Outcome]:
    outcomes: list[Outcome] = []
    told = Server(server.url, "foreign", **how)
    asyncio.run(drive(told, asks, max_concurrency, outcomes.append))
    return outcomes


def outcome(latency_s: float, *, lag_s: float = 0.0, ask: Ask = ASK, **what: Any) -> Outcome:
    return Outcome(ask, due_s=1.0, sent_s=1.0 + lag_s, done_s=1.0 + latency_s, **{"status": 200} | what)


def test_a_plan_is_the_same_for_the_same_seed_and_has_the_mixs_shares() -> None:
    sizes, steps = [("64x64", 3.0), ("128x128", 1.0)], [(4, 1.0), (8, 1.0)]
    plan = [plan_asks(400, sizes, steps, n=1, prompts=(), seed=seed) for seed in (5, 5, 6)]
    assert plan[0] == plan[1] != plan[2]
    assert 0.7 < statistics.mean(ask.size == "64x64" for ask in plan[0]) < 0.8
    assert {ask.steps for ask in plan[0]} == {4, 8}


def test_prompts_that_are_not_given_are_all_new() -> None:
    prompts = list(islice(invent_prompts(random.Random(0)), 500))
    assert len(set(prompts)) == 500


def test_prompts_that_are_given_are_asked_in_turn() -> None:
    asks = plan_asks(3, [(None, 1.0)], [(None, 1.0)], n=1, prompts=["a", "b"], seed=0)
    assert [ask.prompt for ask in asks] == ["a", "b", "a"]


def test_arrivals_have_the_rate_and_burstiness_that_is_asked_for() -> None:
    asks = [ASK] * 4000
    for burstiness in (0.25, 1.0, 4.0):
        times = [ask.at_s or 0.0 for ask in with_arrivals(asks, 10.0, burstiness, seed=1)]
        gaps = [after - before for before, after in pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.1)
        assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.1)


def test_a_trace_is_read_in_order_of_time(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"at_s": 2, "prompt": "b", "n": 2}\n\n{"at_s": 0.5, "prompt": "a", "size": "64x64", "steps": 4}\n'
    )
    first, second = read_trace(file)
    assert (first.at_s, first.prompt, first.kind) == (0.5, "a", "64x64, 4 steps")
    assert (second.at_s, second.prompt, second.kind) == (2, "b", "default size, n 2")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"at_s": 1, "prompt": "a", "colour": 3}', "line 2: colour: Extra"),
        ('{"at_s": -1, "prompt": "a"}', "line 2: at_s: Input should be greater"),
        ('{"prompt": "a"}', "line 2: at_s is missing"),
        ("{", "line 2: the line: Invalid JSON"),
    ],
)
def test_a_line_that_is_none_is_refused_with_its_number(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{{"at_s": 0, "prompt": "a"}}\n{line}\n')
    with pytest.raises(WorkloadFault, match=told):
        read_trace(file)


@pytest.mark.parametrize("text", ["64x64:0", "64x64:many", ":2", ""])
def test_a_mix_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(WorkloadFault, match="--size"):
        read_mix(text, "--size")


def test_a_mixs_weights_are_1_where_they_are_left_out() -> None:
    assert read_mix("64x64:3, 128x128", "--size") == [("64x64", 3.0), ("128x128", 1.0)]


def test_options_that_make_no_sense_are_refused_with_their_name(tmp_path: Path) -> None:
    with pytest.raises(WorkloadFault, match=r"--max-concurrency '1\.5'"):
        read_counts("1.5", "--max-concurrency")
    with pytest.raises(WorkloadFault, match="--goodput 'ttft:3'"):
        read_goodput("ttft:3")
    with pytest.raises(WorkloadFault, match="at most one --max-concurrency"):
        plan_loads(lambda _: [ASK], max_concurrency=[1, 2], request_rate=[1.0], burstiness=1.0, trace=None, seed=0)


def test_a_percentile_is_a_value_that_so_many_do_not_exceed() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert [percentile(values, p) for p in (50, 95, 99, 100)] == [50.0, 95.0, 99.0, 100.0]
    assert percentile([3.0], 99) == 3.0
    assert percentile([], 50) != percentile([], 50)


def test_refusals_and_failures_are_counted_apart_and_are_no_goodput() -> None:
    outcomes = [
        outcome(1.0),
        outcome(4.0),
        outcome(0.01, status=429, error="429: too many"),
        outcome(0.01, status=503, error="503: full"),
        outcome(9.0, status=0, error="ReadTimeout()"),
    ]
    row = summarize("a load", outcomes, {ASK.kind: 2.0})
    assert {name: row[name] for name in ("requests", "answered", "refused", "failed")} == {
        "requests": 5,
        "answered": 2,
        "refused": 2,
        "failed": 1,
    }
    assert row["slo_met"] == 1 / 5
    assert row["goodput_per_s"] == pytest.approx(1 / 9)
    assert row["requests_per_s"] == pytest.approx(2 / 9)
    assert row["p50_s"] == 1.0
    assert row["p99_s"] == 4.0


def test_each_kind_is_held_to_its_own_slo() -> None:
    large = Ask(prompt="a fox", size="512x512")
    outcomes = [outcome(3.0), outcome(3.0, ask=large)]
    solo_s = {ASK.kind: 1.0, large.kind: 2.0}
    rows = summarize_kinds("a load", outcomes, solo_s, {kind: 2 * alone_s for kind, alone_s in solo_s.items()})
    assert [row["slo_met"] for row in rows] == [0.0, 1.0]


def test_the_rest_is_what_the_stages_do_not_explain() -> None:
    """Counted from when the request was sent: no stage caused the delay of a late client."""
    told = outcome(1.5, lag_s=0.5, timings_ms={"encode": 100.0, "denoise": 700.0})
    assert stage_means([told, outcome(9.0)]) == pytest.approx({"encode": 100.0, "denoise": 700.0, "rest": 200.0})
    assert stage_means([outcome(9.0)]) == {}


def test_a_closed_loop_has_as_many_under_way_as_clients() -> None:
    with foreign_server(num_to_hold=3) as server:
        outcomes = driven(server, [ASK] * 12, 3)
    assert server.most_at_once == 3
    assert [each.status for each in outcomes] == [200] * 12


def test_an_open_loop_sends_whatever_is_due_though_nothing_is_answered() -> None:
    with foreign_server(num_to_hold=20) as server:
        driven(server, [ASK.model_copy(update={"at_s": 0.01 * i}) for i in range(20)], None)
    assert server.most_at_once == 20


def test_the_latency_of_an_open_loop_counts_from_when_a_request_was_due() -> None:
    """Three requests of 0.2 s each are due at once and sent one after another."""
    with foreign_server(service_s=0.2) as server:
        outcomes = driven(server, [ASK.model_copy(update={"at_s": 0.0})] * 3, 1)
    assert server.most_at_once == 1
    assert [each.latency_s >= 0.2 * (i + 1) for i, each in enumerate(outcomes)] == [True] * 3
    assert outcomes[2].lag_s >= 0.4


def test_another_server_is_asked_in_openais_fields_alone() -> None:
    with foreign_server(service_s=0) as server:
        driven(server, [Ask(prompt="a", size="512x512"), Ask(prompt="b", n=2)], 1, api_key="secret")
    assert server.bodies == [
        {"model": "foreign", "prompt": "a", "size": "512x512"},
        {"model": "foreign", "prompt": "b", "n": 2},
    ]
    assert server.headers[0]["authorization"] == "Bearer secret"


def test_what_openai_has_no_field_for_is_sent_if_asked_for() -> None:
    with foreign_server(service_s=0) as server:
        driven(server, [Ask(prompt="a", steps=4)], 1, extra_body={"seed": 3})
    assert server.bodies == [{"model": "foreign", "prompt": "a", "num_inference_steps": 4, "seed": 3}]


def test_a_refusal_is_an_outcome() -> None:
    with foreign_server(num_to_refuse=1) as server:
        refused, answered = driven(server, [ASK] * 2, 1)
    assert refused.is_refused
    assert refused.error == "429: too many"
    assert answered.is_answered
    assert len(server.bodies) == 2


def test_a_refusal_is_waited_out_if_asked_for() -> None:
    with foreign_server(num_to_refuse=2, service_s=0) as server:
        [answered] = driven(server, [ASK], 1, retries_refused=True)
    assert answered.is_answered
    assert answered.num_rejections == 2
    assert answered.latency_s >= 0.4  # twice the Retry-After of 0.2 s
    assert summarize("a load", [answered], {})["refusals_waited_out"] == 2


def test_a_server_that_is_gone_is_a_failure() -> None:
    with foreign_server() as server:
        pass
    [failed] = driven(server, [ASK], 1)
    assert (failed.status, failed.is_refused, failed.is_answered) == (0, False, False)
    assert "ConnectError" in failed.error


def test_an_answer_of_fewer_pictures_than_asked_for_is_a_failure() -> None:
    with foreign_server(service_s=0) as server:
        server.answer = lambda body, headers: (200, {"data": [{"b64_json": "x"}]})  # type: ignore[method-assign]
        [failed] = driven(server, [Ask(prompt="a", n=2)], 1)
    assert failed.error == "asked for 2 images, got 1"


def test_a_video_is_a_job_that_is_waited_for() -> None:
    with foreign_server() as server:
        [answered] = driven(server, [Ask(prompt="waves", size="64x64")], 1, endpoint="videos")
    assert answered.error == ""
    assert server.bodies == [{"model": "foreign", "prompt": "waves", "size": "64x64"}]


def test_processes_share_the_requests_and_the_concurrency() -> None:
    told: list[Outcome] = []
    asks = [Ask(prompt=f"prompt {i}") for i in range(9)]
    with foreign_server(service_s=0.2) as server:
        outcomes = drive_apart(Server(server.url, None), asks, 3, told.append, num_processes=2)
    assert outcomes == told
    assert sorted(body["prompt"] for body in server.bodies) == sorted(ask.prompt for ask in asks)
    assert server.most_at_once <= 3


def test_the_loss_of_a_process_of_clients_is_told() -> None:
    """The process ends because the image to send does not exist."""
    with pytest.raises(ClientLost):
        drive_apart(Server("no url at all", None, image=Path("/nowhere")), [ASK], 1, lambda _: None)


def test_the_picture_has_a_line_and_a_bar_of_every_load() -> None:
    svg = draw_curves(
        {"1 at once": [1.0, 2.0], "<2/s>": [], "4 at once": [3.0]},
        {"1 at once": {"encode": 10.0, "rest": -1.0}, "<2/s>": {}, "4 at once": {"encode": 20.0, "rest": 5.0}},
    )
    root = xml.etree.ElementTree.fromstring(svg)
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert names.count("polyline") == 3
    texts = {element.text for element in root.iter()}
    assert {"1 at once", "<2/s>", "4 at once", "encode", "rest"} <= texts


def test_the_command_measures_alone_then_every_load_and_writes_both_files(tmp_path: Path) -> None:
    rows_file, svg_file = tmp_path / "rows.json", tmp_path / "loads.svg"
    with foreign_server(service_s=0.02) as server:
        arguments = ["bench", "serve", "--base-url", f"{server.url}/v1/", "--num-prompts", "5", "--num-solo", "1"]
        arguments += [
            "--size",
            "64x64,128x128",
            "--max-concurrency",
            "2",
            "--request-rate",
            "50,100",
            "--seed",
            "1",
        ]
        arguments += ["--json", str(rows_file), "--svg", str(svg_file), "--save-detailed"]
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    document = json.loads(rows_file.read_text())
    assert [row["load"] for row in document["rows"]] == ["50/s", "100/s"]
    assert [row["answered"] for row in document["rows"]] == [5, 5]
    assert {row["kind"] for row in document["kinds"]} == {"64x64", "128x128"}
    assert document["workload"]["request_rate"] == "50,100"
    assert document["workload"]["model"] == "foreign"
    assert len(document["requests"]["50/s"]) == 5
    assert len(server.bodies) == 2 * 2 + 10  # each kind alone: once to warm up, once measured
    assert svg_file.read_text().startswith("<svg")


def test_the_command_tells_that_nobody_is_there() -> None:
    with pytest.raises(ConfigError, match=r"--base-url http://127\.0\.0\.1:9 does not answer"):
        CliRunner().invoke(cli, ["bench", "serve", "--base-url", "http://127.0.0.1:9"], catch_exceptions=False)

"""README and docs/ are correct: links work, commands parse, and configs, bodies and Python code are valid."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer.main
import yaml
from starlette.routing import Route

from cluster.config import find_mistakes
from deployments.checkpoints.geometry import with_geometry
from deployments.config.model import ModelConfig
from serve_app.auth.listening import find_listening_fault
from serve_app.cli import cli
from serve_app.config.app import AppConfig
from serve_app.config.limits import LimitsConfig
from serve_app.config.serve_file import load_app_config, read_serve_file
from serve_app.http.fields import parse_body
from serve_app.http.openai_requests import EditBody, GenerationBody, ImageBody, VideoBody
from serve_app.models.served_models import Models
from serve_app.relay import Relay
from serve_app.routes import build_api
from tests.documents import (
    PAGES,
    ROOT,
    Block,
    call_fields_of,
    find_anchors,
    find_blocks,
    find_commands,
    find_inline_code,
    find_links,
    form_fields_of,
    name_of,
    option_of,
)

README = ROOT / "README.md"
RELAY = Path(sys.executable).parent / "relay"
MAKEFILE = (ROOT / "Makefile").read_text()
MODEL = {"name": "flux-dev", "checkpoint": "black-forest-labs/FLUX.1-dev"}
"""The model for YAML blocks about other keys, which leave it out."""
NOT_INSTALLED = re.compile(r"needs \w+: pip install 'latent-relay\[\w+\]'$")
"""The error of a config that needs an optional package that is not installed."""
SERVE_KEYS = {"tracing_config", "logging_config", "http_options", "proxy_location"}
BODIES: dict[str, type[GenerationBody]] = {
    "/v1/images/generations": ImageBody,
    "/v1/images/edits": EditBody,
    "/v1/videos": VideoBody,
    "/v1/videos/sync": VideoBody,
}
CALLS: dict[str, type[GenerationBody]] = {
    "images.generate": ImageBody,
    "images.edit": EditBody,
    "videos.create": VideoBody,
    "videos.create_and_poll": VideoBody,
}
SOURCES = {
    str(path.relative_to(ROOT))
    for folder in ("serve_app", "deployments", "cluster", "tests", "configs", "docs", "examples")
    for path in (ROOT / folder).rglob("*")
}


def blocks(*languages: str) -> Any:
    return pytest.mark.parametrize("block", find_blocks(*languages), ids=str)


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in find_links(page):
        parts = urlsplit(link)
        if parts.scheme or link.startswith("mailto:"):
            continue
        target = page.parent / parts.path if parts.path else page
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in find_anchors(target), link


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = {README}, [README]
    while waiting:
        page = waiting.pop()
        linked = {(page.parent / urlsplit(link).path).resolve() for link in find_links(page)}
        found = {target for target in linked if target.suffix == ".md" and target.exists()} - reached
        reached |= found
        waiting += found
    assert {page for page in PAGES if page.parent.name == "docs"} <= reached


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=name_of)
def test_every_page_begins_with_the_question_that_it_answers(page: Path) -> None:
    title, _, rest = page.read_text().partition("\n\n")
    assert title.startswith("# ")
    assert re.match(r"This page answers: [^?]{,200}\?", rest), rest[:100]


@pytest.mark.parametrize(
    "alert", yaml.safe_load((ROOT / "cluster/launch/monitoring/alerts.yml").read_text())["groups"]
)
def test_every_runbook_of_an_alert_is_there(alert: dict[str, Any]) -> None:
    for rule in alert["rules"]:
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert anchor in find_anchors(ROOT / path)


@each_page
def test_every_file_that_is_named_is_there(page: Path) -> None:
    """Files are named by their path, or by the end of it."""
    for code in find_inline_code(page):
        if re.fullmatch(r"[\w/.-]+/[\w.-]+\.(py|yaml|yml|sh|conf)", code) and not code.startswith("/"):
            assert any(path == code or path.endswith(f"/{code}") for path in SOURCES), code


def relay(words: list[str]) -> tuple[Any, list[str]] | None:
    """Returns the command of `relay` that the words call, and its arguments."""
    if "relay" not in words or words[0] in {"curl", "export", "grep"}:
        return None
    command: Any = typer.main.get_command(cli)
    words = words[words.index("relay") + 1 :]
    while getattr(command, "commands", None) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"relay has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@blocks("sh", "")
def test_every_relay_command_parses(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in a folder that contains the images and videos that the commands name."""
    monkeypatch.chdir(tmp_path)
    for words in find_commands(block):
        for word in words:
            if re.fullmatch(r"\w+\.(png|jpg|webp|mp4|jsonl|txt)", word):
                (tmp_path / word).touch()
        if (found := relay(words)) is not None and not getattr(found[0], "commands", None):
            command, arguments = found
            command.make_context(command.name, arguments)


@each_page
def test_every_relay_command_in_a_sentence_has_its_options(page: Path) -> None:
    for code in find_inline_code(page):
        words = code.split()
        if words[0] == "relay" and len(words) > 1 and (found := relay([w for w in words if w != "…"])) is not None:
            command, arguments = found
            if getattr(command, "commands", None):
                continue
            known = {option for param in command.params for option in param.opts} | {"--help"}
            asked = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            assert asked <= known, code


@each_page
def test_every_make_command_is_in_the_makefile(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    commands = [words for block in find_blocks("sh") if block.page == page for words in find_commands(block)]
    commands += [code.split() for code in find_inline_code(page)]
    for words in commands:
        if len(words) > 1 and words[0] == "make":
            assert words[1] in targets
            for assignment in words[2:]:
                assert f"$({assignment.partition('=')[0]})" in MAKEFILE, assignment


@blocks("yaml")
def test_every_config_is_valid(block: Block, tmp_path: Path) -> None:
    """A block is complete, or lacks a model and the enclosing keys, which are added."""
    (tmp_path / "block.yaml").write_text(block.text)
    config = read_serve_file(tmp_path / "block.yaml")
    if "applications" in config:
        load_app_config(tmp_path / "block.yaml")
    elif not config.keys() <= SERVE_KEYS:
        args = config.get("args", config)
        model = {} if "models" in args else {"model": MODEL | args.get("model", {})}
        mistakes = find_mistakes(AppConfig, args | model)
        assert [line for line in mistakes if not NOT_INSTALLED.search(line)] == []


def test_every_config_of_ours_may_be_served_without_keys() -> None:
    for path in ROOT.glob("configs/*.yaml"):
        host = read_serve_file(path)["http_options"]["host"]
        assert find_listening_fault(host, [load_app_config(path).access]) is None, path


@blocks("json")
def test_every_body_in_json_is_valid(block: Block) -> None:
    body = json.loads(block.text)
    if "prompt" in body:
        parse_body(ImageBody, body, is_json=True)


@blocks("sh")
def test_every_body_of_curl_is_valid(block: Block) -> None:
    for words in find_commands(block):
        if not words or words[0] != "curl":
            continue
        [url] = [word for word in words if word.startswith("http")]
        path = re.sub(r".*?(?=/v1/|$)", "", url, count=1)
        fields = dict(form_fields_of(words))
        if (data := option_of(words, "-d")) is not None:
            parse_body(BODIES[path], json.loads(data), is_json=True)
        elif fields:
            parse_body(BODIES[path], fields)


@blocks("python")
def test_every_python_block_compiles_and_asks_for_what_there_is(block: Block) -> None:
    """Each literal field of a call of OpenAI's client is a field of the API."""
    for call in ast.walk(ast.parse(block.text, str(block))):
        if isinstance(call, ast.Call) and (kind := CALLS.get(".".join(ast.unparse(call.func).split(".")[-2:]))):
            parse_body(kind, call_fields_of(call))


def test_every_path_is_served() -> None:
    model = with_geometry(ModelConfig(name="m", checkpoint="tiny://flux", family="flux"))
    routes = build_api(Models([Relay(model, LimitsConfig(), None, None, None)])).routes
    for page in PAGES:
        for code in find_inline_code(page):
            if (asked := re.fullmatch(r"(GET|POST|DELETE) (?:http://[\w.:]+)?(/\S*)", code)) is None:
                continue
            method, path = asked[1], asked[2].replace("{id}", "video_1")
            if path.startswith("/-/"):  # Serve's own
                continue
            served = [each.methods for each in routes if isinstance(each, Route) and each.path_regex.match(path)]
            assert any(method in (methods or ()) for methods in served), code


def test_the_plot_of_merging_shows_what_was_measured() -> None:
    """Each point's title has its value, and its height is proportional to it."""
    rows = json.loads((ROOT / "docs/benchmarks/batching.json").read_text())["rows"]
    measured = {(row["model"], row["merging"], row["concurrency"]): row["requests_per_s"] for row in rows}
    svg = (ROOT / "docs/benchmarks/batching.svg").read_text()
    points = re.findall(r'cy="([\d.]+)" r="3.5"><title>(\w+), ([\w ]+), (\d): ([\d.]+)</title>', svg)
    assert {(model, merging, int(clients)) for _, model, merging, clients, _ in points} == measured.keys()
    tops = {"tiny": 5.0, "100M": 0.6}
    for height, model, merging, clients, value in points:
        rate = measured[model, merging, int(clients)]
        assert float(value) == pytest.approx(rate, abs=0.005)
        assert float(height) == pytest.approx(252 - 190 * rate / tops[model], abs=0.06)


@pytest.mark.thorough
def test_the_plan_that_is_shown_is_the_one_that_is_printed(tmp_path: Path) -> None:
    """Checks the transcript of docs/planner.md, the config below it, and the image."""
    text = (ROOT / "docs/planner.md").read_text()
    [transcript] = [block for block in find_blocks("") if block.text.startswith("$ relay plan")]
    command, _, shown = transcript.text.partition("\n")
    words = [word.replace("tests/data", str(ROOT / "tests/data")) for word in command.split()[2:]]
    run = subprocess.run([RELAY, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line.rstrip() for line in run.stdout.splitlines()] == [line.rstrip() for line in shown.splitlines()]
    args = read_serve_file(tmp_path / "flux.yaml")["applications"][0]["args"]
    below = yaml.safe_load(next(block for block in find_blocks("yaml") if block.page == transcript.page).text)
    assert below == {key: args[key] for key in below}
    assert args.keys() - below.keys() == {"model"}
    assert "](plan_flux_dev_2x16.svg)" in text
    assert (tmp_path / "flux.svg").read_text() == (ROOT / "docs/plan_flux_dev_2x16.svg").read_text()


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples"])
def test_the_readme_leads_to_it(name: str) -> None:
    assert f"]({name})" in README.read_text()

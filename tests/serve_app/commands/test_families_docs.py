"""Tests that docs/families.md is up to date and lists every pipeline."""

import re
from pathlib import Path

import pytest

from deployments.families.calls import find_pipelines
from serve_app.commands.families_docs import render_families_docs

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def test_the_page_is_what_the_command_prints() -> None:
    assert PAGE.read_text() == render_families_docs(), "run `relay families > docs/families.md`"


def test_every_pipeline_that_draws_is_there_once() -> None:
    staged, others = PAGE.read_text().split("## Not served, or not tested")
    reasons = re.findall(r"^\| (\w+Pipeline) \| .+ \|$", others, re.MULTILINE)
    number = re.search(r"Staged: (\d+) pipeline classes", staged)
    assert number is not None
    assert len(set(reasons)) == len(reasons)
    assert len(reasons) + int(number[1]) == len(find_pipelines())

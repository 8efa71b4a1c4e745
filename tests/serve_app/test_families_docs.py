"""The table of pipelines: as the models themselves tell it, and nobody left out."""

import re
from pathlib import Path

from deployments.families.calls import find_pipelines
from serve_app.families_docs import render_families_docs

PAGE = Path(__file__).parent.parent.parent / "docs" / "families.md"


def test_the_page_is_what_the_command_prints() -> None:
    assert PAGE.read_text() == render_families_docs(), "run `relay families > docs/families.md`"


def test_every_pipeline_that_draws_is_there_once() -> None:
    staged, others = PAGE.read_text().split("## Not, or not shown")
    reasons = re.findall(r"^\| (\w+Pipeline) \| .+ \|$", others, re.MULTILINE)
    number = re.search(r"Staged: (\d+) pipeline classes", staged)
    assert number is not None
    assert len(set(reasons)) == len(reasons)
    assert len(reasons) + int(number[1]) == len(find_pipelines())

"""A stand-in server for each test."""

from collections.abc import Iterator

import pytest

from tests.serve_app.page.stand_in import StandIn


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server

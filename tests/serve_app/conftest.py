"""One Chromium for all tests of the page, and a new tab for each."""

from collections.abc import Iterator

import pytest
from selenium import webdriver

from tests.serve_app.page.browser import Page, chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: webdriver.Chrome) -> Iterator[Page]:
    """A new tab. Fails the test if the page logs to the console; network errors, such as of a refused request, are
    ignored."""
    [first] = browser.window_handles
    browser.switch_to.new_window("tab")
    browser.get_log("browser")
    yield Page(browser)
    complaints = [entry for entry in browser.get_log("browser") if entry["source"] != "network"]
    browser.close()
    browser.switch_to.window(first)
    assert complaints == []

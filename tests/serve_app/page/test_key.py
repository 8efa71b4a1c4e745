"""Tests of the page of a server that requires an API key."""

from collections.abc import Callable

import pytest
from selenium.webdriver.common.keys import Keys

from tests.keyed_app import KeyedApp
from tests.serve_app.page.browser import Page
from tests.serve_app.page.stand_in import StandIn

pytestmark = pytest.mark.slow
KEY = "sk-relay-0123"


@pytest.fixture
def locked(server: StandIn) -> StandIn:
    server.key = KEY
    return server


def until_asked(page: Page) -> Callable[[], object]:
    return lambda: page.shown("#key")


def test_a_key_is_asked_for_and_sent_and_shown_nowhere(page: Page, locked: StandIn) -> None:
    page.see(f"{locked.url}/")
    page.wait(until_asked(page))
    assert page.one("#key-wrong").text == ""
    page.type("#key", f" {KEY} " + Keys.ENTER)
    page.wait(lambda: page.one("#served").text)
    page.draw("a cat")
    assert locked.asked[-1].authorization == f"Bearer {KEY}"
    assert '-H "Authorization: Bearer $RELAY_API_KEY"' in page.one("#curl").text
    assert KEY not in page.driver.page_source
    assert page.run("return [document.cookie, localStorage.length]") == ["", 0]


def test_a_wrong_key_is_told_and_another_can_be_given(page: Page, locked: StandIn) -> None:
    page.see(f"{locked.url}/")
    page.wait(until_asked(page))
    page.type("#key", "wrong" + Keys.ENTER)
    page.wait(lambda: page.shown("#key-wrong") and page.one("#key-wrong").text)
    assert page.one("#key-wrong").text == "this key is not known here"
    page.type("#key", KEY + Keys.ENTER)
    page.wait(lambda: page.one("#served").text)


def test_a_key_is_kept_over_a_reload_and_can_be_forgotten(page: Page, locked: StandIn) -> None:
    page.see(f"{locked.url}/")
    page.wait(until_asked(page))
    page.type("#key", KEY + Keys.ENTER)
    page.wait(lambda: page.one("#served").text)
    page.driver.refresh()
    page.wait(lambda: page.one("#served").text)
    page.one("#change-key").click()
    page.one("#key-dialog [type=button]").click()
    assert not page.one("#change-key").is_displayed()
    page.type("#prompt", "a cat" + Keys.ENTER)
    page.wait(until_asked(page))


def test_whoever_gives_no_key_is_told_and_asked_again(page: Page, locked: StandIn) -> None:
    page.see(f"{locked.url}/")
    page.wait(until_asked(page))
    page.one("#key").send_keys(Keys.ESCAPE)
    page.wait(lambda: page.one("#alert").is_displayed())
    assert page.one("#alert").text == "no key"
    page.one("#go").click()
    page.wait(until_asked(page))


def test_the_keys_of_a_real_app_open_its_page(page: Page, keyed_app: KeyedApp) -> None:
    page.see(f"{keyed_app.app.url}/")
    for secret in ("relay-wrong", keyed_app.secrets["shop"]):
        page.wait(lambda: page.shown("#key") and not page.one("#key").get_attribute("value"))
        page.type("#key", secret + Keys.ENTER)
    page.wait(lambda: page.one("#served").text)
    page.draw("a red circle", seed=7, num_inference_steps=4)
    assert "seed 7" in page.one("#facts").text
    assert keyed_app.secrets["shop"] not in page.one("body").text
    page.run("sessionStorage.clear()")

"""Tests of how the page shows video jobs, which are answered in OpenAI's form."""

import pytest
from selenium.webdriver.common.keys import Keys

from serve_app.http.openai_answers import Drawn, Forwards
from tests.serve_app.page.browser import Page
from tests.serve_app.page.stand_in import TIMINGS, StandIn, card, rejection

pytestmark = pytest.mark.slow
JOB = "video_0"


@pytest.fixture
def studio(server: StandIn) -> StandIn:
    """A server with video jobs."""
    server.cards, server.jobs = [card("wan", "wan")], {}
    return server


def begin(page: Page, studio: StandIn) -> None:
    page.open(f"{studio.url}/")
    page.type("#prompt", "waves" + Keys.ENTER)
    page.wait(lambda: studio.jobs)


def tell(studio: StandIn, **news: object) -> None:
    assert studio.jobs is not None
    studio.jobs[JOB] |= news


def share(page: Page) -> str | None:
    return page.one(".bar").get_attribute("aria-valuenow")


def test_a_job_moves_the_bar_and_ends_as_a_video(page: Page, studio: StandIn) -> None:
    begin(page, studio)
    page.wait(lambda: page.one("#step").text == "Waiting in the queue")
    for progress in (20, 60):
        tell(studio, status="in_progress", progress=progress)
        page.wait(lambda progress=progress: share(page) == str(progress))
    page.wait(lambda: "left" in page.one("#left").text)
    drawn = Drawn(seed=3, timings_ms=TIMINGS, forwards=Forwards(computed=4, asked=8), warnings=["it was cut"])
    told = drawn.model_dump()
    told["timings_ms"]["wake"] = 1500.0
    tell(studio, status="completed", progress=100, seed=3, drawn=told)
    page.wait(lambda: page.one("#about").is_displayed())
    assert page.run("return document.querySelector('#view video').videoWidth") == 64
    assert "seed 3" in page.one("#facts").text
    assert "4 of 8 forwards computed" in page.one("#facts").text
    assert page.one("#legend").text.startswith("wake 1.50 s")
    assert "denoise 30 ms" in page.one("#legend").text
    assert page.one("#warnings").text == "it was cut"
    assert studio.asked[-1].fields == {"prompt": "waves"}


def test_cancel_deletes_the_job(page: Page, studio: StandIn) -> None:
    begin(page, studio)
    page.one("#prompt").send_keys(Keys.ESCAPE)
    page.wait(lambda: studio.deleted == [JOB])
    page.wait(lambda: page.one("#go").is_displayed())


def test_why_a_job_failed_is_told(page: Page, studio: StandIn) -> None:
    begin(page, studio)
    tell(studio, status="failed", error={"code": "out_of_memory", "message": "a stage took too much"})
    page.wait(lambda: page.one("#alert").is_displayed())
    assert page.one("#alert").text == "a stage took too much"


def test_a_page_that_is_loaded_again_takes_up_its_job(page: Page, studio: StandIn) -> None:
    begin(page, studio)
    page.driver.refresh()
    page.wait(lambda: page.one("#cancel").is_displayed())
    assert page.one("#prompt").get_property("value") == "waves"
    tell(studio, status="completed", progress=100, seed=3)
    page.wait(lambda: page.one("#about").is_displayed())
    assert (len(studio.asked), studio.deleted) == (1, [])
    page.driver.refresh()
    page.wait(lambda: page.one("#served").text)
    assert page.one("#go").is_displayed()


def test_a_job_waits_for_a_server_that_is_away(page: Page, studio: StandIn) -> None:
    begin(page, studio)
    studio.job_status = 503
    page.wait(lambda: "does not answer" in page.one("#step").text)
    tell(studio, status="completed", progress=100, seed=3)
    studio.job_status = 200
    page.wait(lambda: page.one("#about").is_displayed())


def test_a_job_that_is_refused_is_told_beside_its_field(page: Page, studio: StandIn) -> None:
    studio.refused = (400, rejection("size must be larger", "size"))
    page.open(f"{studio.url}/")
    page.type("#prompt", "waves" + Keys.ENTER)
    page.wait(lambda: page.all("#size-wrong"))

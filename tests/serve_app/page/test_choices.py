"""Tests of the choices that the page offers, given the model cards, and of what it sends."""

import json
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.serve_app.page.browser import Page
from tests.serve_app.page.stand_in import StandIn, card, rejection
from tests.serve_app.pictures import file, noise

pytestmark = pytest.mark.slow
ADAPTERS = [
    {"name": "watercolour", "about": "paints wet in wet", "scale": 0.8},
    {"name": "pixel", "about": "", "scale": 1.0},
]
SCHEDULERS = ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
MARKUP = "<img src=x onerror='window.hurt=1'><script>window.hurt=1</script>"


def test_models_are_a_choice_and_adapters_none_of_them(page: Page, server: StandIn) -> None:
    server.cards = [card(adapters=ADAPTERS), card("flux-dev:watercolour", parent="flux-dev"), card("wan", "wan")]
    page.open(f"{server.url}/")
    assert [option.text for option in page.select("#model").options] == ["flux-dev", "wan"]
    page.select("#model").select_by_value("wan")
    assert page.one("#num_frames").is_displayed()
    assert not page.one("#n").is_displayed()
    page.select("#model").select_by_value("flux-dev")
    page.draw("a cat")
    assert server.asked[-1].fields["model"] == "flux-dev"
    assert page.one("#facts").text.startswith("flux-dev ")


def test_the_chosen_model_is_in_the_address(page: Page, server: StandIn) -> None:
    server.cards = [card(), card("a/b c", "sd15")]
    page.open(f"{server.url}/")
    page.select("#model").select_by_value("a/b c")
    page.driver.refresh()
    page.wait(lambda: page.one("#served").text)
    assert page.one("#model").get_property("value") == "a/b c"


def test_one_model_is_no_choice_and_never_named(page: Page, server: StandIn) -> None:
    page.open(f"{server.url}/")
    for name in ("#model", "#adapters", "#scheduler"):
        assert not page.one(name).is_displayed()
    page.draw("a cat")
    assert server.asked[-1].fields == {
        "prompt": "a cat", "stream": True, "partial_images": 3, "progress": True,
    }  # fmt: skip


def test_an_adapter_has_a_slider_and_is_sent_told_and_used_again(page: Page, server: StandIn) -> None:
    server.cards = [card(adapters=ADAPTERS)]
    page.open(f"{server.url}/")
    page.unfold("#adapters")
    assert "paints wet in wet" in page.one("#lora").text
    assert page.shown("#lora [type=range]") == []
    page.one("#lora [type=checkbox]").click()
    page.one("#lora [type=range]").send_keys(Keys.ARROW_RIGHT)
    page.draw("a cat")
    assert server.asked[-1].fields["lora"] == [{"name": "watercolour", "scale": 0.85}]
    assert "watercolour 0.85" in page.one("#facts").text
    assert '"lora":[{"name":"watercolour","scale":0.85}]' in page.one("#curl").text
    page.one("#lora [type=checkbox]").click()
    page.draw("a dog")
    assert "lora" not in server.asked[-1].fields
    page.all("#made button")[-1].click()
    page.one("#reuse").click()
    assert page.one("#lora [type=number]").get_property("value") == "0.85"
    assert [box.is_selected() for box in page.all("#lora [type=checkbox]")] == [True, False]


def test_an_adapter_that_came_meanwhile_is_offered_to_whoever_looks_again(page: Page, server: StandIn) -> None:
    server.cards = [card(adapters=ADAPTERS[:1])]
    page.open(f"{server.url}/")
    page.unfold("#adapters")
    page.one("#lora [type=checkbox]").click()
    page.type("#lora [type=number]", "0.3")
    server.cards = [card(adapters=ADAPTERS)]
    page.run("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait(lambda: len(page.all("#lora li")) == 2)
    page.draw("a cat")
    assert server.asked[-1].fields["lora"] == [{"name": "watercolour", "scale": 0.3}]


def test_beside_a_picture_adapters_are_json_in_the_form(page: Page, server: StandIn) -> None:
    server.cards = [card(adapters=ADAPTERS)]
    page.open(f"{server.url}/")
    page.unfold("#adapters")
    page.all("#lora [type=checkbox]")[1].click()
    page.hand_over("drop", file(noise()), name="cat.png", media_type="image/png")
    page.draw("a cat")
    assert json.loads(server.asked[-1].fields["lora"]) == [{"name": "pixel", "scale": 1}]


def test_what_is_wrong_with_an_adapter_is_told_beside_it(page: Page, server: StandIn) -> None:
    server.cards = [card(adapters=ADAPTERS)]
    server.refused = (400, rejection("watercolour does not fit", "lora.0.name"))
    page.open(f"{server.url}/")
    page.type("#prompt", "a cat" + Keys.ENTER)
    page.wait(lambda: page.all("#lora-wrong"))
    assert page.one("#lora-wrong").text == "watercolour does not fit"
    page.one("#lora [type=checkbox]").click()
    assert page.all("#lora-wrong") == []


def test_weights_in_the_prompt_may_be_turned_off_where_the_model_reads_them(page: Page, server: StandIn) -> None:
    page.open(f"{server.url}/")
    assert not page.one("#prompt_weighting").is_displayed()
    server.cards = [card(prompt_weighting=True)]
    page.open(f"{server.url}/")
    page.draw("a (cat)1.3")
    assert "prompt_weighting" not in server.asked[-1].fields
    page.select("#prompt_weighting").select_by_value("false")
    page.draw("a (cat)1.3")
    assert server.asked[-1].fields["prompt_weighting"] is False
    assert "prompt without weights" in page.one("#facts").text
    page.select("#prompt_weighting").select_by_value("")
    page.one("#reuse").click()
    assert page.one("#prompt_weighting").get_property("value") == "false"


def test_a_scheduler_is_sent_unless_it_is_the_models_own(page: Page, server: StandIn) -> None:
    server.cards = [card(schedulers=SCHEDULERS)]
    page.open(f"{server.url}/")
    assert page.select("#scheduler").options[0].text == "FlowMatchEulerDiscrete (the model's own)"
    page.draw("a cat")
    assert "scheduler" not in server.asked[-1].fields
    page.select("#scheduler").select_by_visible_text("EulerDiscrete")
    page.draw("a cat")
    assert server.asked[-1].fields["scheduler"] == "EulerDiscreteScheduler"
    assert "EulerDiscrete" in page.one("#facts").text


@pytest.mark.parametrize("schedulers", [[], SCHEDULERS[:1]])
def test_one_scheduler_is_no_choice(page: Page, server: StandIn, schedulers: list[str]) -> None:
    server.cards = [card(schedulers=schedulers)]
    page.open(f"{server.url}/")
    assert not page.one("#scheduler").is_displayed()


def test_warnings_are_told(page: Page, server: StandIn) -> None:
    server.warnings = ["the prompt was cut after “cat”"]
    page.open(f"{server.url}/")
    page.draw("a cat")
    assert page.one("#warnings").text == server.warnings[0]
    server.warnings = []
    page.draw("a dog")
    assert not page.one("#warnings").is_displayed()


def test_texts_of_the_server_never_become_markup(page: Page, server: StandIn) -> None:
    adapter = {"name": MARKUP, "about": MARKUP, "scale": 1}
    server.cards = [
        card(about=MARKUP, examples=[MARKUP], adapters=[adapter], schedulers=[MARKUP, "b"]),
        card(MARKUP),
    ]
    server.warnings = [MARKUP]
    page.open(f"{server.url}/")
    assert MARKUP in page.one("#knows").text
    page.unfold("#adapters")
    page.one("#lora [type=checkbox]").click()
    page.draw(MARKUP)
    assert MARKUP in page.one("#warnings").text
    server.refused = (500, rejection(MARKUP))
    page.type("#prompt", MARKUP + Keys.ENTER)
    page.wait(lambda: page.one("#alert").is_displayed())
    assert page.one("#alert").text == MARKUP
    assert page.all("[onerror], main script") == []
    assert page.run("return window.hurt") is None


def test_a_request_under_way_is_sent_once(page: Page, server: StandIn) -> None:
    server.takes_s = 0.5
    page.open(f"{server.url}/")
    page.type("#prompt", "a cat" + 3 * Keys.ENTER)
    page.run("document.getElementById('form').requestSubmit()")
    page.wait(lambda: page.one("#about").is_displayed())
    assert len(server.asked) == 1


def test_whoever_leaves_and_comes_back_can_go_on(page: Page, server: StandIn) -> None:
    server.takes_s = 60
    page.open(f"{server.url}/")
    page.type("#prompt", "a cat" + Keys.ENTER)
    page.wait(lambda: server.asked)
    page.driver.get(f"{server.url}/docs")
    page.driver.back()
    page.wait(lambda: page.one("#served").text and page.one("#go").is_displayed())
    server.takes_s = 0
    page.draw("a dog")
    assert page.one("#caption").text == "a dog"


def test_a_server_that_was_away_is_asked_again(page: Page, server: StandIn) -> None:
    server.cards = []
    page.see(f"{server.url}/")
    page.wait(lambda: page.one("#alert").is_displayed())
    server.cards = [card()]
    page.one("#go").click()
    page.wait(lambda: page.one("#served").text)
    assert not page.one("#alert").is_displayed()


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_nothing_scrolls_sideways(page: Page, server: StandIn, width: int) -> None:
    long = {"name": "w" * 90, "about": "a" * 200, "scale": 1}
    server.cards = [card("m" * 90, adapters=[long], schedulers=SCHEDULERS, about="k" * 200), card("wan", "wan")]
    server.warnings = ["n" * 200]
    page.open(f"{server.url}/", width=width)
    for part in ("#files", "#adapters", "#settings"):
        page.unfold(part)
    page.one("#lora [type=checkbox]").click()
    page.draw("a" * 200)
    root = page.run(
        "const {scrollWidth, clientWidth} = document.documentElement; return [scrollWidth, clientWidth]"
    )
    assert root[0] == root[1]
    assert wider_than_their_place(page) == []


def test_every_control_has_a_name(page: Page, server: StandIn) -> None:
    server.cards = [card(adapters=ADAPTERS, schedulers=SCHEDULERS), card("wan", "wan")]
    page.open(f"{server.url}/")
    page.hand_over("drop", file(noise()), name="cat.png", media_type="image/png")
    for part in ("#adapters", "#settings"):
        page.unfold(part)
    page.one("#lora [type=checkbox]").click()
    page.draw("a cat")
    controls = page.shown("button, a, input, select, textarea, [tabindex]")
    assert len(controls) > 25
    assert [each.get_attribute("outerHTML") for each in controls if not each.accessible_name] == []
    page.one("#paint").click()
    find = "#brush button, #brush input, #brush canvas"
    page.wait(lambda: len(page.shown(find)) >= 6)
    tools = page.shown(find)
    assert [each.get_attribute("outerHTML") for each in tools if not each.accessible_name] == []


def wider_than_their_place(page: Page) -> Any:
    return page.run(
        "return [...document.querySelectorAll('main *')].filter((one) => one.getBoundingClientRect().right > "
        "innerWidth + 1 && !one.closest('.unseen')).map((one) => one.outerHTML.slice(0, 80))"
    )

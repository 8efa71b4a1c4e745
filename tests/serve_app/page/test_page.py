"""Tests of the page at `/` in a real Chromium; they are skipped if it is not installed.

`PAGE_SCREENSHOT=docs/page.png PAGE_URL=http://127.0.0.1:8000/ pytest -k screenshot tests/serve_app/page`
takes the README's screenshot of a running server.
"""

import base64
import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.pictures import video
from tests.serve_app.page.browser import PATIENCE_S, Page, curl_body, curl_form, rgb
from tests.serve_app.pictures import file, half_mask, noise

pytestmark = pytest.mark.slow
NOTE_PROGRESS = """
window.shares = [];
new MutationObserver(() => window.shares.push(document.querySelector(".bar").getAttribute("aria-valuenow")))
  .observe(document.querySelector(".bar"), {attributes: true, attributeFilter: ["aria-valuenow"]});
"""


def test_enter_draws_with_progress_and_stage_times_and_curl_draws_the_same(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/")
    page.run(NOTE_PROGRESS)
    page.draw("a cat's red circle", seed=7, num_inference_steps=20)
    shares = [int(share) for share in page.run("return shares") if share is not None]
    assert len(set(shares)) >= 3
    assert shares == sorted(shares)
    for stage in ("encode", "queue", "denoise", "decode"):
        assert f"{stage} " in page.one("#legend").text
    assert "seed 7" in page.one("#facts").text
    url, body = curl_body(page.one("#curl").text)
    assert url == f"{flux_app.url}/v1/images/generations"
    assert body == {"prompt": "a cat's red circle", "seed": 7, "num_inference_steps": 20}
    [again] = httpx.post(url, json=body, timeout=PATIENCE_S).json()["data"]
    assert page.pixels() == rgb(base64.b64decode(again["b64_json"]))


def test_a_page_that_is_left_frees_the_seat(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/")
    page.type("#num_inference_steps", "50")
    page.type("#size", "512x512")
    page.type("#prompt", "a long wait" + Keys.ENTER)
    flux_app.wait_for_seats(1)
    page.driver.get("about:blank")
    flux_app.wait_for_seats(0)


def test_a_lower_quality_is_a_choice_that_is_told_and_sent(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/")
    page.run('document.getElementById("settings").open = true; document.getElementById("quality").value = "low"')
    page.draw("a fast cat", seed=7, num_inference_steps=20)
    assert "of 20 forwards computed" in page.one("#facts").text
    url, body = curl_body(page.one("#curl").text)
    assert body["quality"] == "low"
    [again] = httpx.post(url, json=body, timeout=PATIENCE_S).json()["data"]
    assert page.pixels() == rgb(base64.b64decode(again["b64_json"]))


def test_several_pictures_are_kept_and_their_settings_can_be_used_again(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/")
    page.draw("first", seed=40, n=2)
    assert len(page.all("#view img")) == 2
    page.type("#n", "1")
    page.draw("second")
    assert len(page.all("#made img")) == 3
    page.all("#made button")[-1].click()
    assert page.one("#caption").text == "first"
    page.one("#reuse").click()
    assert page.one("#prompt").get_property("value") == "first"
    seed = page.one("#seed-used").text
    assert seed in ("40", "41")  # whichever was done first
    assert page.one("#seed").get_property("value") == seed
    assert page.one("#download").get_attribute("download") == f"first-{seed}.png"


def test_a_wrong_size_is_told_beside_its_field_and_typing_clears_it(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/")
    page.type("#size", "100x100")
    page.type("#prompt", "a circle" + Keys.ENTER)
    page.wait(lambda: page.all("#size-wrong"))
    assert "nearest: 96x96" in page.one("#size-wrong").text
    assert page.run("return arguments[0].previousElementSibling.id", page.one("#size-wrong")) == "size"
    assert page.one("#size").get_attribute("aria-invalid") == "true"
    assert page.driver.switch_to.active_element == page.one("#size")
    page.one("#size").send_keys(Keys.BACKSPACE)
    assert page.all("#size-wrong") == []


def test_escape_cancels_and_frees_the_seat(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/")
    page.type("#num_inference_steps", "50")
    page.type("#size", "512x512")
    page.type("#prompt", "a long wait" + Keys.ENTER)
    flux_app.wait_for_seats(1)
    page.one("#prompt").send_keys(Keys.ESCAPE)
    page.wait(lambda: page.one("#go").is_displayed())
    flux_app.wait_for_seats(0)
    assert page.all("#made img") == []


def test_a_video_model_asks_for_frames_and_shows_a_video(page: Page, wan_app: Any) -> None:
    page.open(f"{wan_app.url}/")
    assert not page.one("#n").is_displayed()
    page.draw("waves", num_frames=9, seed=3)
    page.wait(lambda: page.run("return document.querySelector('#view video').readyState") >= 2)
    assert page.run("return document.querySelector('#view video').videoWidth") == 64
    assert "9 frames" in page.one("#facts").text
    assert "seed 3" in page.one("#facts").text
    assert "denoise " in page.one("#legend").text
    url, body = curl_body(page.one("#curl").text)
    assert url == f"{wan_app.url}/v1/videos/sync"
    assert body == {"prompt": "waves", "seed": 3, "num_frames": 9}


def test_a_picture_that_goes_in_is_drawn_anew_and_curl_draws_the_same(
    page: Page, flux_app: Any, tmp_path: Path
) -> None:
    cat, mask = tmp_path / 'a "cat", anew.png', tmp_path / "mask.png"
    cat.write_bytes(file(noise()))
    mask.write_bytes(file(half_mask()))
    page.open(f"{flux_app.url}/")
    page.unfold("#files")
    assert not page.one("#strength").is_displayed()
    page.choose_file("image", cat)
    page.choose_file("mask", mask)
    page.draw("a cat's hat", seed=7, strength=0.5)
    assert f"from {cat.name}, mask.png" in page.one("#facts").text
    assert "prepare " in page.one("#legend").text
    url, fields, files = curl_form(page.one("#curl").text, tmp_path)
    assert url == f"{flux_app.url}/v1/images/edits"
    assert (fields, sorted(files)) == (
        {"prompt": "a cat's hat", "seed": "7", "strength": "0.5"},
        ["image", "mask"],
    )
    [again] = httpx.post(url, data=fields, files=files, timeout=PATIENCE_S).json()["data"]
    assert page.pixels() == rgb(base64.b64decode(again["b64_json"]))
    for field in ("mask", "image"):
        page.one(f"#{field}-tiles .remove").click()
    page.one("#reuse").click()
    assert [len(page.all(f"#{field}-tiles li")) for field in ("image", "mask")] == [1, 1]


def test_a_painted_mask_is_drawn_in_and_what_came_of_it_can_be_begun_with(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/")
    page.hand_over("drop", file(noise()), name="cat.png", media_type="image/png")
    page.one("#paint").click()
    page.one("#brush-canvas").send_keys(Keys.SPACE)
    page.one("#brush-done").click()
    page.wait(lambda: page.all("#mask-tiles li"))
    page.draw("a hat", seed=7)
    assert "from cat.png, mask.png" in page.one("#facts").text
    page.one("#begin-with").click()
    assert page.one("#image-tiles li").get_attribute("title") == "a-hat-7.png"
    assert not page.one("#mask-tiles").is_displayed()  # the mask was painted on another image


def test_a_picture_that_cannot_be_read_is_told_beside_it(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/")
    page.hand_over("drop", b"GIF89a", name="cat.png", media_type="image/png")
    page.type("#prompt", "a hat" + Keys.ENTER)
    page.wait(lambda: page.all("#image-wrong"))
    assert "it is a GIF" in page.one("#image-wrong").text
    page.hand_over("drop", file(noise()), name="cat.png", media_type="image/png")
    assert page.all("#image-wrong") == []


def test_a_video_that_goes_in_is_drawn_anew(page: Page, wan_app: Any, tmp_path: Path) -> None:
    waves = tmp_path / "waves.mp4"
    waves.write_bytes(video(6, (64, 48)))
    page.open(f"{wan_app.url}/")
    page.unfold("#files")
    assert [zone.find_element("css selector", "input").get_attribute("id") for zone in page.shown(".zone")] == [
        "input_reference"
    ]
    assert page.one("#input_reference").get_attribute("accept") == "video/mp4,video/webm"
    page.choose_file("input_reference", waves)
    page.draw("waves of paper", seed=3)
    assert re.match(r"64 \S 48 ", page.one("#facts").text)
    assert "from waves.mp4" in page.one("#facts").text


def test_what_the_model_knows_is_told_and_an_example_can_be_clicked(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/")
    assert page.one("#knows").text == "Knows nothing."
    page.all("#examples button")[1].click()
    page.one("#prompt").send_keys(Keys.ENTER)
    page.wait(lambda: page.one("#about").is_displayed())
    assert page.one("#caption").text == "a dog"


def test_cancel_is_on_the_screen_of_a_phone_that_shows_the_picture(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/", width=390, height=740)
    page.one("#settings summary").click()
    page.type("#num_inference_steps", "50")
    page.type("#size", "512x512")
    page.type("#prompt", "a long wait" + Keys.ENTER)
    page.wait(lambda: page.one("#cancel").is_displayed())
    box = page.run("return document.querySelector('#cancel').getBoundingClientRect().toJSON()")
    assert 0 <= box["top"] < box["bottom"] <= 740
    page.one("#cancel").click()
    page.wait(lambda: page.one("#go").is_displayed())


def test_a_finger_hits_every_control(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/", width=390, height=740)
    page.draw("a cat")
    page.unfold("#files")
    controls = page.shown("button, a, summary, input:not(.unseen), textarea, .drop")
    sizes = {control.get_attribute("outerHTML")[:60]: control.size for control in controls}
    assert len(sizes) > 8
    assert {name: size for name, size in sizes.items() if min(size.values()) < 40} == {}


def test_facts_tell_the_guidance_that_acts(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/")
    page.draw("a cat")
    assert "guidance 3.5" in page.one("#facts").text
    page.draw("a cat", true_cfg_scale=2)
    assert "true CFG 2" in page.one("#facts").text
    assert "guidance 3.5" not in page.one("#facts").text


def test_a_phone_never_scrolls_sideways(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/", width=360, height=740)
    page.draw("a" * 200)
    page.one("#settings summary").click()
    assert page.run("return document.documentElement.scrollWidth") == 360


def test_dark_and_light_follow_the_system_and_can_be_read(page: Page, flux_app: Any) -> None:
    for scheme in ("light", "dark"):
        page.open(f"{flux_app.url}/", scheme=scheme)
        text, ground = (
            page.run(f"return getComputedStyle(document.body).{k}") for k in ("color", "backgroundColor")
        )
        assert contrast(text, ground) >= 7
        assert (luminance(ground) < 0.5) == (scheme == "dark")


@pytest.mark.parametrize("path", ["/", "/docs", "/page/main.js", "/page/style.css"])
def test_the_page_needs_nothing_from_elsewhere(flux_app: Any, path: str) -> None:
    answer = flux_app.client.get(path)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = flux_app.client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_page_is_found_without_the_slash_at_its_end(page: Page, flux_app: Any) -> None:
    page.open(flux_app.url)
    assert page.one("#served").text == "tiny-flux · flux"


def test_status_opens_over_the_page(page: Page, flux_app: Any) -> None:
    page.open(f"{flux_app.url}/")
    page.one("#status").click()
    page.wait(lambda: '"num_in_progress"' in page.one("dialog[open] pre").text)
    page.one("dialog[open] button").click()
    assert page.all("dialog[open]") == []


def test_the_api_is_described_at_docs(page: Page, flux_app: Any) -> None:
    page.see(f"{flux_app.url}/docs")
    page.wait(lambda: "POST /v1/images/generations" in page.one("#paths").text)


def test_the_model_card_tells_defaults_and_limits(flux_app: Any) -> None:
    card = flux_app.client.get("/v1/models").json()["data"][0]
    assert card["guidance"] == "true_cfg_scale"
    assert card["defaults"]["size"] == "64x64"
    assert card["defaults"]["num_frames"] is None
    assert card["limits"]["size_multiple"] == 16
    assert card["limits"]["max_num_inference_steps"] == 50


@pytest.mark.skipif("PAGE_SCREENSHOT" not in os.environ, reason="PAGE_SCREENSHOT names no file")
def test_screenshot(page: Page) -> None:
    page.open(os.environ["PAGE_URL"], height=1080)
    page.draw("a blue square at the bottom, on a pink background", seed=6)
    page.draw("a yellow triangle at the top, on a gray background", seed=11)
    page.draw("a red circle on the left, on a white background", seed=3)
    page.one("#begin-with").click()
    page.one("#paint").click()
    canvas = page.one("#brush-canvas")
    hand = ActionChains(page.driver).move_to_element_with_offset(canvas, canvas.size["width"] // 4, -40)
    hand.click_and_hold().move_by_offset(0, 90).release().perform()
    page.one("#brush-done").click()
    page.draw("a red circle on the left and a blue square on the right, on a white background", strength=1)
    page.run("scrollTo(0, 0)")
    taken = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    Path(os.environ["PAGE_SCREENSHOT"]).write_bytes(base64.b64decode(taken["data"]))


def luminance(colour: str) -> float:
    """Returns the relative luminance of a CSS `rgb(r, g, b)`, 0 to 1. Formula: WCAG 2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Returns the contrast ratio, 1 to 21. Formula: WCAG 2."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)

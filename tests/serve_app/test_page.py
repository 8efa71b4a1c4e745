"""The page at `/`, driven in a real Chromium; without one these tests are skipped.

`PAGE_SCREENSHOT=docs/page.png PAGE_URL=http://127.0.0.1:8000/ pytest -k screenshot tests/serve_app/test_page.py`
takes the README's picture of a running server.
"""

import base64
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.keyed_app import KeyedApp
from tests.pictures import video
from tests.serve_app.pictures import file, half_mask, noise

pytestmark = pytest.mark.slow
PATIENCE_S = 60.0
NOTE_PROGRESS = """
window.shares = [];
new MutationObserver(() => window.shares.push(document.querySelector(".bar").getAttribute("aria-valuenow")))
  .observe(document.querySelector(".bar"), {attributes: true, attributeFilter: ["aria-valuenow"]});
"""
READ_PICTURE = """
const image = document.querySelector("#view img");
const canvas = document.createElement("canvas");
[canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
canvas.getContext("2d").drawImage(image, 0, 0);
return canvas.toDataURL("image/png");
"""


class Page:
    """What a person sees and does."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """At a size in CSS pixels and in a colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        self.driver.get(url)
        self.wait(lambda: self.one("#model").text)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[[], Any]) -> None:
        WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.05).until(lambda _: condition())

    def draw(self, prompt: str, **settings: Any) -> None:
        """Types, presses Enter, and waits for the last picture."""
        for field, value in settings.items():
            self.type(f"#{field}", str(value))
        self.type("#prompt", prompt + Keys.ENTER)
        self.wait(lambda: self.one("#go").is_displayed() and self.one("#about").is_displayed())

    def type(self, selector: str, text: str) -> None:
        self.one(selector).clear()
        self.one(selector).send_keys(text)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def pixels(self) -> bytes:
        """RGB of the picture on view."""
        url = self.run(READ_PICTURE)
        return rgb(base64.b64decode(url.partition(",")[2]))


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def page(browser: webdriver.Chrome) -> Iterator[Page]:
    """Fails a test whose page complains in the console; a refused request is the network's complaint."""
    browser.get_log("browser")
    yield Page(browser)
    assert [entry for entry in browser.get_log("browser") if entry["source"] != "network"] == []


def curl_body(command: str) -> tuple[str, dict[str, Any]]:
    """(url, body) of a curl command, read as a shell would."""
    words = shlex.split(command.replace("\\\n", ""))
    return words[words.index("-s") + 1], json.loads(words[words.index("-d") + 1])


def curl_form(command: str, folder: Path) -> tuple[str, dict[str, str], dict[str, bytes]]:
    """(url, fields, files) of a curl command with a form, whose files lie in this folder."""
    words = shlex.split(command.replace("\\\n", ""))
    pairs = list(pairwise(words))
    fields = dict(form.split("=", 1) for option, form in pairs if option == "--form-string")
    files = {}
    for name, at in (form.split("=", 1) for option, form in pairs if option == "-F"):
        files[name] = (folder / re.sub(r"\\(.)", r"\1", at[2:-1])).read_bytes()
    return words[words.index("-s") + 1], fields, files


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
    page.one("#files summary").click()
    assert not page.one("#strength").is_displayed()
    page.one("#image").send_keys(str(cat))
    page.one("#mask").send_keys(str(mask))
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
    page.one("#no-files").click()
    page.one("#reuse").click()
    assert [page.run(f"return document.querySelector('#{id}').files.length") for id in ("image", "mask")] == [1, 1]


def test_a_mask_without_a_picture_is_told_beside_the_picture(page: Page, flux_app: Any, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    mask.write_bytes(file(half_mask()))
    page.open(f"{flux_app.url}/")
    page.one("#files summary").click()
    page.one("#mask").send_keys(str(mask))
    page.type("#prompt", "a hat" + Keys.ENTER)
    page.wait(lambda: page.all("#image-wrong"))
    assert "image is missing" in page.one("#image-wrong").text
    page.one("#no-files").click()
    assert page.all("#image-wrong") == []
    assert not page.one("#no-files").is_displayed()


def test_a_video_that_goes_in_is_drawn_anew(page: Page, wan_app: Any, tmp_path: Path) -> None:
    waves = tmp_path / "waves.mp4"
    waves.write_bytes(video(6, (64, 48)))
    page.open(f"{wan_app.url}/")
    page.one("#files summary").click()
    offered = [field.get_attribute("id") for field in page.all("#files input") if field.is_displayed()]
    assert offered == ["input_reference"]
    assert page.one("#input_reference").get_attribute("accept") == "video/mp4,video/webm"
    page.one("#input_reference").send_keys(str(waves))
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
    controls = page.all("button, a, summary, input, textarea")
    sizes = {
        control.get_attribute("outerHTML")[:60]: control.size for control in controls if control.is_displayed()
    }
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


def test_the_page_needs_nothing_from_elsewhere(flux_app: Any) -> None:
    answer = flux_app.client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


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
    page.draw("a blue square at the bottom, on a pink background", seed=3)
    page.draw("a yellow triangle at the top, on a gray background", seed=5)
    page.draw("a red circle on the left, on a white background", seed=7)
    taken = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    Path(os.environ["PAGE_SCREENSHOT"]).write_bytes(base64.b64decode(taken["data"]))


def rgb(picture: bytes) -> bytes:
    return Image.open(io.BytesIO(picture)).convert("RGB").tobytes()


def luminance(colour: str) -> float:
    """Of a CSS `rgb(r, g, b)`. Formula: WCAG 2, relative luminance."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """1 to 21. Formula: WCAG 2, contrast ratio."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_page_that_lacks_a_key_asks_for_one_and_keeps_it(page: Page, keyed_app: KeyedApp) -> None:
    page.driver.get(f"{keyed_app.app.url}/")
    for secret in ("relay-wrong", keyed_app.secrets["shop"]):
        page.wait(lambda: page.one("#key-dialog").is_displayed())
        page.type("#key", secret + Keys.ENTER)
    page.wait(lambda: page.one("#model").text)
    page.draw("a red circle", seed=7, num_inference_steps=4)
    assert "seed 7" in page.one("#facts").text
    assert "Bearer $RELAY_API_KEY" in page.one("#curl").text
    assert keyed_app.secrets["shop"] not in page.one("body").text
    page.open(f"{keyed_app.app.url}/")
    assert not page.one("#key-dialog").is_displayed()
    page.run("sessionStorage.clear()")

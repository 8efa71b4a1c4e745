"""Drives the page in a real Chromium, as a user would."""

import base64
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

PATIENCE_S = 60.0
READ_PICTURE = """
const image = document.querySelector("#view img");
const canvas = document.createElement("canvas");
[canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
canvas.getContext("2d").drawImage(image, 0, 0);
return canvas.toDataURL("image/png");
"""
HAND_OVER = """
const [to, kind, name, type, base64, done] = arguments;
const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name, {type}));
const options = {bubbles: true, cancelable: true, composed: true};
const event = kind === "paste"
  ? new ClipboardEvent("paste", {...options, clipboardData: transfer})
  : new DragEvent("drop", {...options, dataTransfer: transfer});
return !to.dispatchEvent(event);
"""


class Page:
    """The page in one tab of the browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Opens the URL, and waits until the page shows the served model.

        width, height: CSS pixels.
        scheme: preferred colour scheme.
        """
        self.see(url, width=width, height=height, scheme=scheme)
        self.wait(lambda: self.one("#served").text)

    def see(self, url: str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Opens the URL like `open`, but does not wait: the page may not get that far."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        self.driver.get(url)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def shown(self, selector: str) -> list[WebElement]:
        return [each for each in self.all(selector) if each.is_displayed()]

    def select(self, selector: str) -> Select:
        return Select(self.one(selector))

    def wait(self, condition: Callable[[], Any]) -> None:
        """Waits until the condition holds. If the page replaces an element meanwhile, it is evaluated again."""
        patient = WebDriverWait(
            self.driver, PATIENCE_S, poll_frequency=0.05, ignored_exceptions=[StaleElementReferenceException]
        )
        patient.until(lambda _: condition())

    def draw(self, prompt: str, **settings: Any) -> None:
        """Fills in the form, presses Enter and waits for the last image."""
        for field, value in settings.items():
            self.type(f"#{field}", str(value))
        self.type("#prompt", prompt + Keys.ENTER)
        self.wait(lambda: self.one("#go").is_displayed() and self.one("#about").is_displayed())

    def type(self, selector: str, text: str) -> None:
        self.one(selector).clear()
        self.one(selector).send_keys(text)

    def unfold(self, selector: str) -> None:
        if not self.one(selector).get_property("open"):
            self.one(f"{selector} summary").click()

    def choose_file(self, field: str, path: Path) -> None:
        self.one(f"#{field}").send_keys(str(path))

    def hand_over(self, kind: str, data: bytes, *, name: str, media_type: str, to: str = "body") -> bool:
        """Gives the page a file by "paste" or "drop", and returns whether the page handled it."""
        encoded = base64.b64encode(data).decode()
        return bool(self.run(HAND_OVER, self.one(to), kind, name, media_type, encoded))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def pixels(self) -> bytes:
        """Returns the RGB bytes of the displayed image."""
        url = self.run(READ_PICTURE)
        return rgb(base64.b64decode(url.partition(",")[2]))


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Yields a driver of Chromium. Skips the test if Chromium is not installed."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def rgb(picture: bytes) -> bytes:
    return Image.open(io.BytesIO(picture)).convert("RGB").tobytes()


def curl_body(command: str) -> tuple[str, dict[str, Any]]:
    """Returns the URL and the JSON body of a curl command, parsed as by a shell."""
    words = shlex.split(command.replace("\\\n", ""))
    return words[words.index("-s") + 1], json.loads(words[words.index("-d") + 1])


def curl_form(command: str, folder: Path) -> tuple[str, dict[str, str], dict[str, bytes]]:
    """Returns the URL, fields and files of a curl command with a form. folder: where the files are."""
    words = shlex.split(command.replace("\\\n", ""))
    pairs = list(pairwise(words))
    fields = dict(form.split("=", 1) for option, form in pairs if option == "--form-string")
    files = {}
    for name, at in (form.split("=", 1) for option, form in pairs if option == "-F"):
        files[name] = (folder / re.sub(r"\\(.)", r"\1", at[2:-1])).read_bytes()
    return words[words.index("-s") + 1], fields, files

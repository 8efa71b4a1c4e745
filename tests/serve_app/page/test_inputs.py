"""Tests of input images: dropped, pasted, chosen and painted on."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.serve_app.page.browser import Page
from tests.serve_app.page.stand_in import StandIn, card
from tests.serve_app.pictures import file, noise

pytestmark = pytest.mark.slow
PICTURE = file(noise(size=(640, 360)))
COUNT_URLS = """
window.live = new Set();
const [create, revoke] = [URL.createObjectURL, URL.revokeObjectURL];
URL.createObjectURL = (it) => { const url = create(it); live.add(url); return url; };
URL.revokeObjectURL = (url) => { live.delete(url); revoke(url); };
"""


def begin_with(
    page: Page, kind: str = "drop", data: bytes = PICTURE, name: str = "cat.png", to: str = "body"
) -> None:
    assert page.hand_over(kind, data, name=name, media_type="image/png", to=to)


def titles(page: Page, field: str) -> list[str | None]:
    return [tile.get_attribute("title") for tile in page.all(f"#{field}-tiles li")]


def paint(page: Page, *, from_share: float = -0.5, to_share: float = 0.0) -> None:
    """Paints a horizontal stroke through the middle. Its ends: -1 is the left edge, 1 the right edge."""
    canvas = page.one("#brush-canvas")
    page.wait(canvas.is_displayed)
    half = canvas.size["width"] / 2
    hand = ActionChains(page.driver, duration=50).move_to_element_with_offset(canvas, int(from_share * half), 0)
    hand.click_and_hold().move_by_offset(int((to_share - from_share) * half), 0).release().perform()


def drawn_anew(data: bytes) -> np.ndarray:
    """Returns for each pixel whether it is to be drawn again."""
    mask = Image.open(io.BytesIO(data))
    assert mask.mode == "RGBA"
    return np.asarray(mask)[..., 3] < 128


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_picture_dropped_or_pasted_anywhere_goes_in(page: Page, server: StandIn, kind: str) -> None:
    page.open(f"{server.url}/")
    begin_with(page, kind)
    page.wait(lambda: re.search(r"640 \S 360", page.one("#image-tiles").text))
    page.draw("a hat")
    assert (server.asked[-1].path, server.asked[-1].files) == ("/v1/images/edits", {"image": PICTURE})
    page.one(".remove").click()
    page.draw("a hat")
    assert (server.asked[-1].path, server.asked[-1].files) == ("/v1/images/generations", {})


def test_a_picture_dropped_on_a_field_goes_there(page: Page, server: StandIn) -> None:
    page.open(f"{server.url}/")
    begin_with(page)
    begin_with(page, name="mask.png", to="label.drop[for=mask]")
    assert (titles(page, "image"), titles(page, "mask")) == (["cat.png"], ["mask.png"])


def test_several_go_in_where_the_model_takes_them(page: Page, server: StandIn, tmp_path: Path) -> None:
    several = card()
    several["calls"]["edit"]["max_images"] = 3
    server.cards = [several, card("one")]
    page.open(f"{server.url}/")
    begin_with(page, name="a.png")
    (tmp_path / "b.png").write_bytes(PICTURE)
    page.choose_file("image", tmp_path / "b.png")
    assert titles(page, "image") == ["a.png", "b.png"]
    page.draw("both")
    assert sorted(server.asked[-1].files) == ["image[]"]


def test_a_model_that_takes_none_takes_none_and_the_page_stays(page: Page, server: StandIn) -> None:
    none = card()
    none["calls"] = {"generate": none["calls"]["generate"]}
    server.cards = [none]
    page.open(f"{server.url}/")
    begin_with(page)
    assert not page.one("#files").is_displayed()
    assert page.one("#news").text == "This model takes no such file."
    page.draw("a hat")
    assert server.asked[-1].files == {}


def test_a_text_that_is_pasted_goes_into_the_prompt(page: Page, server: StandIn) -> None:
    page.open(f"{server.url}/")
    is_taken = page.run(
        "const clipboardData = new DataTransfer(); clipboardData.setData('text/plain', 'a cat');"
        "return !document.getElementById('prompt').dispatchEvent("
        "new ClipboardEvent('paste', {clipboardData, bubbles: true, cancelable: true}))"
    )
    assert not is_taken


def test_a_painted_mask_is_transparent_where_painted_and_as_large_as_the_picture(
    page: Page, server: StandIn
) -> None:
    page.open(f"{server.url}/")
    begin_with(page)
    page.one("#paint").click()
    paint(page)
    page.one("#brush-done").click()
    page.wait(lambda: titles(page, "mask"))
    page.draw("a hat")
    anew = drawn_anew(server.asked[-1].files["mask"])
    assert anew.shape == (360, 640)
    assert anew[180, 170:320].all()  # from a quarter to the middle
    assert not anew[:, 400:].any()
    assert not anew[:100].any()


def test_a_mask_is_as_large_as_its_picture_is_shown(page: Page, server: StandIn) -> None:
    page.open(f"{server.url}/")
    exif = Image.Exif()
    exif[Base.Orientation] = 6  # turned by 90 degrees
    data = file(noise(size=(640, 360)), "JPEG", exif=exif)
    assert page.hand_over("drop", data, name="cat.jpg", media_type="image/jpeg")
    page.one("#paint").click()
    page.one("#brush-canvas").send_keys(Keys.SPACE)
    page.one("#brush-done").click()
    page.wait(lambda: titles(page, "mask"))
    page.draw("a hat")
    assert drawn_anew(server.asked[-1].files["mask"]).shape == (640, 360)


def test_a_picture_that_cannot_be_painted_on_is_told(page: Page, server: StandIn) -> None:
    page.open(f"{server.url}/")
    begin_with(page, data=b"no image")
    page.one("#paint").click()
    page.wait(lambda: page.shown(".toast"))
    assert page.one("#news").text.startswith("This browser cannot paint on that image")


def test_the_eraser_takes_back_and_so_does_undo(page: Page, server: StandIn) -> None:
    page.open(f"{server.url}/")
    begin_with(page)
    page.one("#paint").click()
    paint(page)
    page.one("#brush-erase").find_element(By.XPATH, "..").click()
    paint(page, from_share=-0.25, to_share=0.5)
    page.one("#brush-canvas").send_keys(Keys.SPACE)  # where the pointer was last
    page.one("#brush-undo").click()
    page.one("#brush-done").click()
    page.wait(lambda: titles(page, "mask"))
    page.draw("a hat")
    anew = drawn_anew(server.asked[-1].files["mask"])
    assert anew[180, 165]
    assert not anew[180, 240:].any()


def test_a_mask_can_be_painted_further_cleared_and_left_as_it_was(page: Page, server: StandIn) -> None:
    page.open(f"{server.url}/")
    begin_with(page)
    page.one("#paint").click()
    paint(page)
    page.one("#brush-done").click()
    page.wait(lambda: titles(page, "mask"))
    page.one("#paint").click()
    paint(page, from_share=0.4, to_share=0.6)
    page.one("#brush-canvas").send_keys(Keys.ESCAPE)
    page.draw("as it was")
    assert not drawn_anew(server.asked[-1].files["mask"])[:, 400:].any()
    page.one("#paint").click()
    paint(page, from_share=0.4, to_share=0.6)
    page.one("#brush-done").click()
    page.draw("further")
    anew = drawn_anew(server.asked[-1].files["mask"])
    assert anew[180, 250]
    assert anew[180, 480]
    page.one("#paint").click()
    page.one("#brush-clear").click()
    page.one("#brush-done").click()
    page.wait(lambda: not titles(page, "mask"))


def test_the_brush_is_moved_by_keys(page: Page, server: StandIn) -> None:
    page.open(f"{server.url}/")
    begin_with(page)
    page.one("#paint").click()
    page.one("#brush-canvas").send_keys(Keys.ARROW_RIGHT * 5, Keys.SPACE)
    page.one("#brush-done").click()
    page.wait(lambda: titles(page, "mask"))
    page.draw("a hat")
    anew = drawn_anew(server.asked[-1].files["mask"])
    assert anew[180, 448]  # 5 steps of a third of the brush, whose size is 12 % of the width
    assert not anew[180, 320]


def test_another_picture_drops_the_mask_that_was_painted_on_the_first(page: Page, server: StandIn) -> None:
    page.open(f"{server.url}/")
    begin_with(page)
    page.one("#paint").click()
    paint(page)
    page.one("#brush-done").click()
    page.wait(lambda: titles(page, "mask"))
    begin_with(page, name="dog.png")
    assert (titles(page, "image"), titles(page, "mask")) == (["dog.png"], [])


@pytest.mark.parametrize("width", [360, 1280])
def test_all_of_the_brush_is_on_the_screen(page: Page, server: StandIn, width: int) -> None:
    page.open(f"{server.url}/", width=width, height=640)
    begin_with(page, data=file(noise(size=(300, 900))))
    page.one("#paint").click()
    page.wait(lambda: page.one("#brush-canvas").size["height"] > 100)
    for part in ("#brush-canvas", "#brush-done", "#brush-cancel", "#brush-size"):
        box = page.run(f"return document.querySelector('{part}').getBoundingClientRect().toJSON()")
        assert 0 <= box["left"] < box["right"] <= width
        assert 0 <= box["top"] < box["bottom"] <= 640
    page.one("#brush-cancel").click()


def test_urls_of_files_are_freed(page: Page, server: StandIn) -> None:
    page.open(f"{server.url}/")
    page.run(COUNT_URLS)
    begin_with(page)
    begin_with(page, name="dog.png")
    page.one("#paint").click()
    paint(page)
    page.one("#brush-done").click()
    page.wait(lambda: titles(page, "mask"))
    assert page.run("return live.size") == 2
    page.one("#mask-tiles .remove").click()
    assert page.run("return live.size") == 1
    page.one("#image-tiles .remove").click()
    assert page.run("return live.size") == 0

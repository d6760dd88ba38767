"""The gallery: one file that needs no other, hostile names, and pages that fit a phone (chromium)."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.explanation import gallery
from vitrail.explanation.colors import colorize, strength
from vitrail.explanation.gallery import make_gallery, write_gallery
from vitrail.explanation.result import Explanation, Unreadable
from vitrail.prediction import Score

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "<img src=x onerror=alert(1)>\"'&\x1b\u202e"


def explanation(path: str | None = "photos/a.jpg", size: tuple[int, int] = (60, 90)) -> Explanation:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    top = (Score("cat", 0.75), Score("dog", 0.25))
    return Explanation(
        path, "relevance", "cat", False, 0.75, top, values, (32, 32), (0.0, 15.0, 60.0, 75.0), size, picture
    )


class Page(HTMLParser):
    """Tags and attributes, and the text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside not in ("style", "script"):
            self.text += data


def test_the_page_needs_no_other_file() -> None:
    html = make_gallery([explanation(), replace(explanation(), reference="A, https://arxiv.org/abs/1")], "vit")
    page = Page(html)
    sources = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert len(sources) == 6
    assert all(value and value.startswith("data:image/") for value in sources)
    assert not re.search(r"url\(|@import", html)
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "object", "base"} == set()


def test_hostile_names_are_text() -> None:
    found = replace(explanation(HOSTILE), target=HOSTILE, top=(Score(HOSTILE, 0.5),), method=HOSTILE, reference=HOSTILE)
    page = Page(make_gallery([found, Unreadable(HOSTILE, HOSTILE)], HOSTILE))
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert not [source for tag, attributes in page.tags if tag == "img" and (source := attributes["src"]) == "x"]
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_what_a_card_says() -> None:
    text = Page(make_gallery([explanation()], "vit")).text
    assert "photos/a.jpg" in text
    assert "75.0 %" in text
    assert "not class-specific" not in text
    plain = Page(make_gallery([replace(explanation(), class_specific=False, method="rollout")], "vit")).text
    assert "rollout is not class-specific" in plain
    pair = Page(make_gallery([replace(explanation(), is_pair=True, target="cat:dog", score=-1.5)], "vit")).text
    assert "-1.50" in pair
    none = Page(make_gallery([replace(explanation(None), target=None, score=None, top=())], "vit")).text
    assert "image in memory" in none


def test_many_images_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MAX_IMAGES", 3)
    monkeypatch.setattr(gallery, "_SIDES", ((1, 400, 200), (3, 100, 50)))
    large = explanation(size=(500, 800))
    html = make_gallery([large] * 5, "vit", left_out=2)
    page = Page(html)
    assert html.count("<article") == 3
    assert "7 images" in page.text
    assert "4 more" in page.text
    assert len(html) / 3 < len(make_gallery([large], "vit")) / 3


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    first, second = (write_gallery(tmp_path, [explanation()], "vit") for _ in range(2))
    assert (first.name, second.name) == ("gallery.html", "gallery-2.html")


def test_colours() -> None:
    values = np.array([[0, 1, 2], [4, 8, -8]], np.float32)
    shares = strength(values, signed=True)
    assert (shares.min(), shares[0, 0], shares.max()) == (-1, 0, 1)
    shares = strength(values + 100, signed=False)
    assert (shares.min(), shares.max()) == (0, 1)
    sparse = np.zeros((30, 30), np.float32)
    sparse[0, 0] = 5
    assert strength(sparse, signed=False)[0, 0] == 1
    for signed in (True, False):
        assert np.array_equal(strength(np.zeros((2, 2), np.float32), signed), np.zeros((2, 2)))
    sequence = colorize(np.linspace(0, 1, 50, dtype=np.float32)[None], signed=False)[0]
    light = sequence @ np.array([0.2126, 0.7152, 0.0722])
    assert np.all(np.diff(light) > 0)
    both = colorize(np.array([[-1, 0, 1]], np.float32), signed=True)[0].astype(int)
    assert both[0, 2] > both[0, 0]  # blue
    assert both[2, 0] > both[2, 2]  # orange
    assert np.ptp(both[1]) < 10  # grey


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(width: int, tmp_path: Path) -> None:
    """No horizontal scrolling, nothing is requested, and the sliders change the overlays."""
    playwright = pytest.importorskip("playwright.sync_api")
    tall = explanation("photos/" + "long" * 40 + ".jpg", size=(400, 100))
    path = write_gallery(tmp_path, [explanation(), tall], "vit")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        page = browser.new_page(viewport={"width": width, "height": 800})
        requests: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        opacity = "[...document.querySelectorAll('.heat')].map((image) => getComputedStyle(image).opacity)"
        assert page.evaluate(opacity) == ["0.7", "0.7"]
        page.locator(".card input").first.fill("0.2")
        assert page.evaluate(opacity) == ["0.2", "0.7"]
        page.locator(".all input").fill("0.4")
        assert page.evaluate(opacity) == ["0.4", "0.4"]
        browser.close()
    assert [url for url in requests if not url.startswith(("data:", path.as_uri()))] == []
    assert errors == []


def test_a_map_of_evidence_against_the_target_says_so() -> None:
    usual = explanation()
    against = replace(usual, values=-usual.values, signed=True)
    assert not usual.is_against
    assert against.is_against
    assert not replace(against, values=against.values + 0.5).is_against
    assert not replace(against, values=0 * against.values).is_against
    assert not replace(against, is_pair=True).is_against
    assert [each.to_dict()["is_against"] for each in (usual, against)] == [False, True]
    assert any("against cat" in line for line in against.caption())
    assert not any("against" in line for line in usual.caption())
    page = make_gallery([usual, against], "vit")
    assert "why “cat”" in page
    assert "why not “cat”" in page
    assert page.count("Method: <b>relevance</b>") == 1
    assert page.count('class="scale"') == 2  # weak to strong, and against to for the target
    assert make_gallery([usual], "vit").count('class="scale"') == 1

"""The page in a browser: Debian's chromium, driven by playwright."""

import base64
import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.running import Running, encoded, running, small_classifier

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
    # Its connection to the browser is closed after the test.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
CLASSIFIER = small_classifier()
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TIMEOUT = 15_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(CLASSIFIER) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, service: Running) -> Iterator[Any]:
    """The page, ready. After the test: no message on the console, no request to another site."""
    yield from open_page(browser, service, (1280, 900))


def open_page(browser: Any, service: Running, size: tuple[int, int]) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    url, messages, foreign = f"http://127.0.0.1:{service.port}", [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((url, "blob:")) else foreign.append(request.url))
    page.goto(url)
    page.wait_for_selector("#facts tr", state="attached")
    yield page
    context.close()
    # A status of an expected error is not one of the page's.
    assert [text for text in messages if "status of 422" not in text] == []
    assert foreign == []


def predicted(data: bytes) -> str:
    (found,) = CLASSIFIER.engine().stream([data])
    return CLASSIFIER.class_names[int(found.outputs[0].argmax())]


def drop(page: Any, files: list[tuple[str, bytes]], event: str = "drop") -> None:
    """Drop or paste files, as the browser does when a person does so."""
    page.evaluate(
        """([files, event]) => {
            const data = new DataTransfer();
            for (const [name, text] of files) {
                const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
                data.items.add(new File([bytes], name, { type: "image/png" }));
            }
            const made = event === "paste"
                ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
                : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
            document.body.dispatchEvent(made);
        }""",
        [[[name, base64.b64encode(data).decode()] for name, data in files], event],
    )


def wait_for_label(page: Any, label: str) -> None:
    playwright.expect(page.locator("#label")).to_have_text(label, timeout=TIMEOUT)


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_drop_and_paste(page: Any, event: str) -> None:
    data = encoded(1, (300, 200))
    drop(page, [("a.png", data)], event)
    wait_for_label(page, predicted(data))
    page.wait_for_selector("#heat:not([hidden])")
    assert page.locator("#top li").count() == len(CLASSIFIER.class_names)
    assert page.locator("#image").evaluate("(canvas) => [canvas.width, canvas.height]") == [300, 200]
    assert page.locator("#heat").evaluate("(canvas) => [canvas.width, canvas.height]") == [300, 200]
    page.locator("#opacity").fill("20")
    assert page.locator("#heat").evaluate("(canvas) => canvas.style.opacity") == "0.2"


def test_names_are_text(page: Any) -> None:
    """A class named <b>bird</b> is shown as it is called."""
    drop(page, [("<img src=x>.png", encoded(2))])
    page.wait_for_selector("#result:not([hidden])")
    assert "<b>bird</b>" in page.locator("#top").inner_text()
    assert page.locator("#top b").count() == 0
    assert page.locator("#file-name").inner_text() == "<img src=x>.png"


def test_several_files_and_their_table(page: Any, tmp_path: Path) -> None:
    files = [(f"{number}.png", encoded(number)) for number in range(9)] + [("=broken.png", b"no image")]
    drop(page, files)
    playwright.expect(page.locator("#status")).to_have_text("10 images, 1 could not be read", timeout=TIMEOUT)
    labels = page.locator("#rows td:nth-child(2)").all_inner_texts()
    for (_, data), label in zip(files[:-1], labels[:-1], strict=True):
        assert label.removesuffix(" (unsure)") == predicted(data)
    assert "not an image" in labels[-1]
    with page.expect_download() as waiting:
        page.locator("#csv").click()
    waiting.value.save_as(tmp_path / "found.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "found.csv").read_text())))
    assert [row["label"] for row in rows[:-1]] == [predicted(data) for _, data in files[:-1]]
    assert rows[-1]["image"] == "'=broken.png"  # no formula for a spreadsheet
    page.locator("#rows button").nth(4).click()
    wait_for_label(page, predicted(files[4][1]))


def test_a_broken_file(page: Any) -> None:
    drop(page, [("broken.png", encoded(1)[:50])])
    page.wait_for_selector("#problem:not([hidden])")
    assert "broken.png" in page.locator("#problem").inner_text()
    assert page.locator("#result").is_hidden()
    drop(page, [("good.png", encoded(1))])
    wait_for_label(page, predicted(encoded(1)))
    assert page.locator("#problem").is_hidden()


def test_the_keyboard(page: Any, tmp_path: Path) -> None:
    """From the top of the page: choose a file, then reach every control."""
    path = tmp_path / "a.png"
    path.write_bytes(encoded(3))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose"
    with page.expect_file_chooser() as waiting:
        page.keyboard.press("Enter")
    waiting.value.set_files(path)
    wait_for_label(page, predicted(encoded(3)))
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["camera", "method", "opacity", "copy-curl", "copy-python", "SUMMARY"]
    assert page.locator("[role=status]").inner_text().startswith(predicted(encoded(3)))


def test_a_method_and_none(page: Any) -> None:
    drop(page, [("a.png", encoded(5))])
    page.wait_for_selector("#heat:not([hidden])")
    page.locator("#method").select_option("attention")
    playwright.expect(page.locator("#explain-note")).to_contain_text("every class", timeout=TIMEOUT)
    page.locator("#method").select_option("none")
    assert page.locator("#heat").is_hidden()


def test_a_phone(browser: Any, service: Running) -> None:
    for page in open_page(browser, service, (320, 640)):
        drop(page, [("a-very-long-name-of-a-photograph-" * 4 + ".png", encoded(6, (900, 700)))])
        page.wait_for_selector("#heat:not([hidden])")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_a_photo_of_20_megabytes(page: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    path = tmp_path / "large.jpg"
    Image.fromarray(noise).save(path, quality=98)
    assert path.stat().st_size > 15e6
    page.set_input_files("#files", path)
    wait_for_label(page, predicted(path.read_bytes()))
    page.wait_for_selector("#heat:not([hidden])")
    assert page.locator("#image").evaluate("(canvas) => Math.max(canvas.width, canvas.height)") <= 1600


def test_snippets_work(page: Any, service: Running, tmp_path: Path) -> None:
    """The copied Python program, run."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    drop(page, [("it's.png", encoded(7))])
    wait_for_label(page, predicted(encoded(7)))
    (tmp_path / "it's.png").write_bytes(encoded(7))
    for button, command in (("#copy-python", [sys.executable, "-c"]), ("#copy-curl", ["bash", "-c"])):
        page.locator(button).click()
        text = page.evaluate("navigator.clipboard.readText()")
        done = subprocess.run([*command, text], capture_output=True, text=True, cwd=tmp_path, check=True)
        label = f'"label":"{predicted(encoded(7))}"' if button == "#copy-curl" else repr(predicted(encoded(7)))
        assert label in done.stdout


def test_a_token(browser: Any) -> None:
    with running(CLASSIFIER, token="secret") as service:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{service.port}")
        page.locator("#token").fill("secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#facts tr", state="attached")
        drop(page, [("a.png", encoded(1))])
        wait_for_label(page, predicted(encoded(1)))
        page.close()

"""POST /predict and /predict/batch: the answers of `vitrail predict`, and an error for what cannot be answered."""

import base64
import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.running import NAMES, Running, encoded, form, running, small_classifier
from vitrail.explanation.explain import explain

CLASSIFIER = small_classifier()


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(CLASSIFIER, max_files=40) as found:
        yield found


def check(body: dict[str, object], data: bytes, path: Path) -> None:
    """The body is what `Classifier.predict` says of the same file."""
    path.write_bytes(data)
    (expected,) = CLASSIFIER.predict(path)
    assert body["label"] == expected.label
    assert body["score"] == pytest.approx(expected.score, abs=1e-5)
    assert [each["label"] for each in body["top"]] == [each.label for each in expected.top]  # type: ignore[attr-defined]
    assert body["unsure"] == (expected.score is not None and expected.score < 0.5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_an_image_has_the_answer_of_predict(service: Running, tmp_path: Path, kind: str) -> None:
    data = encoded(1, kind=kind)
    answer = service.predict(data, kind=f"image/{kind.lower()}")
    assert answer.status == 200
    check(answer.body, data, tmp_path / "image")


def test_turned_images_are_upright(service: Running, tmp_path: Path) -> None:
    stream = io.BytesIO()
    image = Image.open(io.BytesIO(encoded(2, (60, 30))))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(stream, "JPEG", exif=exif)
    check(service.predict(stream.getvalue(), kind="image/jpeg").body, stream.getvalue(), tmp_path / "turned.jpg")


def test_a_form_with_one_file(service: Running, tmp_path: Path) -> None:
    body, kind = form([("a.png", encoded(3))], "file")
    check(service.predict(body, kind=kind).body, encoded(3), tmp_path / "a.png")


def test_top(service: Running) -> None:
    assert len(service.predict(encoded(), "/predict?top=2").body["top"]) == 2
    assert len(service.predict(encoded(), "/predict?top=1000").body["top"]) == len(NAMES)
    for value in ("0", "-1", "x", "1e9"):
        answer = service.predict(encoded(), f"/predict?top={value}")
        assert answer.status == 422
        assert "top" in answer.body["error"]


def test_one_bad_among_32_concurrent_requests(service: Running, tmp_path: Path) -> None:
    images = [encoded(seed) for seed in range(32)]
    images[17] = images[17][:60]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(service.predict, images))
    assert [answer.status for answer in answers] == [200] * 17 + [422] + [200] * 14
    assert "image" in answers[17].body["error"]
    for answer, data in zip(answers, images, strict=True):
        if answer.status == 200:
            check(answer.body, data, tmp_path / "image.png")


def test_concurrent_requests_are_computed_in_batches() -> None:
    with running(CLASSIFIER) as service:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(service.predict, [encoded(seed) for seed in range(64)]))
        text = service.request("GET", "/metrics").content.decode()
    counts = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert counts["vitrail_batch_images_sum"] == 64
    assert counts["vitrail_batch_images_count"] < 64
    assert counts['vitrail_requests_total{route="/predict",status="200"}'] == 64


def test_a_batch_request(service: Running, tmp_path: Path) -> None:
    images = [("a.png", encoded(4)), ("b.png", b"no image"), ("c <d>.png", encoded(5))]
    body, kind = form(images)
    answer = service.predict(body, "/predict/batch", kind)
    assert answer.status == 200
    items = answer.body["images"]
    assert [item["name"] for item in items] == ["a.png", "b.png", "c <d>.png"]
    check(items[0]["prediction"], images[0][1], tmp_path / "a.png")
    assert "not an image" in items[1]["error"]
    assert "prediction" not in items[1]
    check(items[2]["prediction"], images[2][1], tmp_path / "c.png")


def test_a_form_with_too_many_files(service: Running) -> None:
    body, kind = form([(f"{number}.png", b"x") for number in range(41)])
    answer = service.predict(body, "/predict/batch", kind)
    assert answer.status == 413
    assert "40" in answer.body["error"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "fact"),
    [
        (b"", "image/png", 400, "no content"),
        (b"{}", "application/json", 415, "application/json"),
        (b"GIF89a", "image/gif", 422, "image"),
        (b"<svg/>", "image/svg+xml", 422, "image"),
        (b"--x\r\n", "multipart/form-data", 400, "boundary"),
        (b"--x\r\n", "multipart/form-data; boundary=x", 400, "form"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400, "form"),
        (form([("a.png", b"1")], "file")[0][:-10], "multipart/form-data; boundary=limit", 400, "truncated"),
        (form([])[0], "multipart/form-data; boundary=limit", 400, "form"),
        (form([("a.png", b"1")], "image")[0], "multipart/form-data; boundary=limit", 400, "'image'"),
    ],
)
def test_what_cannot_be_answered(service: Running, body: bytes, kind: str, status: int, fact: str) -> None:
    answer = service.predict(body, kind=kind)
    assert (answer.status, fact in answer.body["error"]) == (status, True), answer.content


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    stream = io.BytesIO()
    Image.new("L", (3000, 2000)).save(stream, "PNG")
    with running(CLASSIFIER, max_pixels=5_000_000) as service:
        answer = service.predict(stream.getvalue())
        assert answer.status == 422
        assert "6,000,000 pixels" in answer.body["error"]


def test_a_full_queue_answers_429() -> None:
    """A model that is slow: the images that find no place are refused at once, and the others are answered."""
    slow = small_classifier()
    engine = slow.engine()
    compute = engine.runtime.logits

    def wait_and_compute(images: np.ndarray) -> np.ndarray:
        time.sleep(0.3)
        return compute(images)

    engine.runtime.logits = wait_and_compute  # type: ignore[method-assign]
    slow.engine = lambda **_: engine  # type: ignore[method-assign]
    with running(slow, max_queue=4, max_batch=2) as service:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(service.predict, [encoded(seed) for seed in range(12)]))
        statuses = [answer.status for answer in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 4
        refused = next(answer for answer in answers if answer.status == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert service.predict(encoded()).status == 200


def test_an_output_that_is_not_finite_is_an_error_of_its_image_alone(tmp_path: Path) -> None:
    """In batches with others, which have their own answers."""
    classifier = small_classifier()
    engine = classifier.engine()
    compute = engine.runtime.logits

    def compute_or_nan(images: np.ndarray) -> np.ndarray:
        time.sleep(0.1)  # so that others wait, and form a batch
        return np.where((images == 255).all(axis=(1, 2, 3))[:, None], np.nan, compute(images)).astype(np.float32)

    engine.runtime.logits = compute_or_nan  # type: ignore[method-assign]
    classifier.engine = lambda **_: engine  # type: ignore[method-assign]
    white = io.BytesIO()
    Image.new("RGB", (40, 40), "white").save(white, "PNG")
    data = [white.getvalue() if number % 3 == 0 else encoded(number) for number in range(12)]
    with running(classifier, max_batch=4) as service, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(service.predict, data))
    for number, answer in enumerate(answers):
        assert answer.status == (422 if number % 3 == 0 else 200)
        if number % 3 == 0:
            assert "finite" in answer.body["error"]
        else:
            (expected,) = small_classifier().predict(Image.open(io.BytesIO(data[number])))
            assert (answer.body["label"], answer.body["score"]) == (
                expected.label,
                pytest.approx(expected.score, abs=1e-5),
            )


@pytest.mark.parametrize("method", ["relevance", "rollout"])
def test_explain(service: Running, method: str) -> None:
    data = encoded(6, (80, 50))
    found = service.predict(data, f"/predict?explain={method}").body["heatmap"]
    expected = explain(CLASSIFIER, data, method)
    assert (found["width"], found["height"], found["method"]) == (80, 50, method)
    assert found["class_specific"] == expected.class_specific
    assert found["target"] == expected.target
    picture = Image.open(io.BytesIO(base64.b64decode(found["png"])))
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected.heat((50, 80))))


def test_an_unknown_method_is_refused(service: Running) -> None:
    answer = service.predict(encoded(), "/predict?explain=lime")
    assert answer.status == 422
    assert "relevance" in answer.body["error"]

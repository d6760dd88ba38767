"""The web folder: its graphs and configs, and the page in a browser with the network off."""

import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from deploy.digit_models import digits_vit
from vitrail.classifier import Classifier
from vitrail.deploy.graph import write_onnx
from vitrail.deploy.web import runtime_files
from vitrail.deploy.web.folder import write_web
from vitrail.errors import ExportError, RunError
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ModelConfig, ResNetConfig, SwinConfig, ViTConfig

onnxruntime = pytest.importorskip("onnxruntime")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Of whoever runs the tests: no test downloads 33 MB.
CACHED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrail/web"
ARCHIVE = CACHED / f"onnxruntime-web-{runtime_files.VERSION}.tgz"
NAMES = ("cat", "dog", "<i>fox</i>", "Füchse", "e")

CONFIGS: dict[str, ModelConfig] = {
    "vit": ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=len(NAMES)),
    "deit": ViTConfig(
        img_size=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=len(NAMES),
        dist_token=True, dist_head=True,
    ),
    "swin": SwinConfig(
        img_size=(32, 32), patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4,
        num_classes=len(NAMES),
    ),
    "resnet": ResNetConfig(
        img_size=(32, 32), block="basic", layers=(1, 1), channels=(8, 16), num_classes=len(NAMES)
    ),
}  # fmt: skip


def classifier(kind: str = "vit", channels: int = 3, **preprocess: object) -> Classifier:
    torch.manual_seed(5)
    config = CONFIGS[kind].__class__(**{**CONFIGS[kind].__dict__, "in_chans": channels})
    model = build_model(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if len(weight) == len(NAMES) and weight.ndim == 2:
                weight.mul_(40)  # of the heads: else every class has the same probability
    settings = Preprocess(size=(32, 32), **preprocess).with_channels(channels)  # type: ignore[arg-type]
    return Classifier(model, settings, NAMES)


def make_archive(path: Path, names: tuple[str, ...] = runtime_files.FILES) -> None:
    """An archive as that of onnxruntime-web, with other content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache/web" / ARCHIVE.name
    make_archive(path)
    return path


def web_folder(clf: Classifier, tmp_path: Path, name: str = "fox") -> Path:
    export, folder = tmp_path / "export", tmp_path / name
    export.mkdir()
    folder.mkdir()
    write_onnx(clf, export)
    write_web(clf, export, folder, name)
    return folder


def photographs(count: int) -> list[Image.Image]:
    """Cut-outs of real photographs, of several sizes."""
    from skimage import data

    draw = np.random.default_rng(0)
    sources = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "coffee", "chelsea")]
    found = []
    for number in range(count):
        source = sources[number % len(sources)]
        width, height = (int(x) for x in draw.integers(60, 250, 2))
        left, top = (int(draw.integers(0, side - cut)) for side, cut in zip(source.size, (width, height), strict=True))
        found.append(source.crop((left, top, left + width, top + height)))
    return found


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_graphs_give_the_classifier_s_answer(archive: Path, tmp_path: Path, kind: str, channels: int) -> None:
    clf = classifier(kind, channels)
    folder = web_folder(clf, tmp_path)
    image = photographs(1)[0]
    expected = clf.predict(image, top=len(NAMES))[0]
    pixels = np.asarray(image if channels == 3 else image.convert("L")).reshape(image.height, image.width, -1)
    session = onnxruntime.InferenceSession(str(folder / "onnx/image.onnx"))
    probabilities = session.run(["probabilities"], {"image": pixels})[0][0]
    for score in expected.top:
        assert probabilities[NAMES.index(score.label)] == pytest.approx(score.score, abs=0.01)
    # What transformers.js gives to the model: normalised colours of the resized image.
    small = Image.fromarray(Preprocess(size=(32, 32)).crop(image))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = np.array(processor["image_mean"]), np.array(processor["image_std"])
    values = ((np.asarray(small) / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    session = onnxruntime.InferenceSession(str(folder / "onnx/model.onnx"))
    logits = session.run(["logits"], {"pixel_values": values})[0]
    ours = clf.engine().runtime.logits(clf.preprocess.crop(small)[None])
    np.testing.assert_allclose(
        logits, ours, atol=2e-2 * np.abs(ours).max() if channels == 1 else 1e-4 * np.abs(ours).max()
    )


@pytest.mark.slow
def test_the_configs_are_those_of_transformers(archive: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for kind, expected in (
        ("vit", "ViTConfig"),
        ("deit", "DeiTConfig"),
        ("swin", "SwinConfig"),
        ("resnet", "ResNetConfig"),
    ):
        (tmp_path / kind).mkdir()
        folder = web_folder(classifier(kind, interpolation="bilinear", crop_pct=0.8), tmp_path / kind)
        config = transformers.AutoConfig.from_pretrained(folder)
        assert type(config).__name__ == expected
        assert tuple(config.id2label[index] for index in range(len(NAMES))) == NAMES
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        assert (settings["size"], settings["resample"]) == ({"shortest_edge": 40}, 2)


def test_the_page_asks_nothing_of_another_site(archive: Path, tmp_path: Path) -> None:
    folder = web_folder(classifier(), tmp_path)
    for name in ("index.html", "page.css", "page.js", "images.js", "model.json"):
        assert "//" not in (folder / name).read_text().replace("// ", "")


def test_an_archive_without_the_files_is_refused(archive: Path, tmp_path: Path) -> None:
    make_archive(archive, runtime_files.FILES[:1])
    with pytest.raises(ExportError, match="ort-wasm"):
        web_folder(classifier(), tmp_path)


@pytest.fixture
def cached_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ARCHIVE.is_file():
        pytest.skip(f"needs {ARCHIVE.name} in the cache: `vitrail export --target web` downloads it")
    monkeypatch.setenv("VITRAIL_CACHE", str(CACHED.parent))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A web server for the folder of the test."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("cached_runtime")
def test_fifty_photographs_in_a_browser_with_the_network_off(tmp_path: Path, site: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    clf = classifier()
    web_folder(clf, tmp_path)
    paths = []
    for number, image in enumerate(photographs(50)):
        paths.append(tmp_path / f"{number}.{'png' if number % 2 else 'jpg'}")
        image.save(paths[-1])
    expected = clf.predict(paths)
    foreign, messages = [], []
    with playwright.sync_playwright() as driver:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        local = (site, "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(local) else foreign.append(request.url))
        page.goto(f"{site}/fox/")
        page.locator("#status", has_text="Ready").wait_for(timeout=60_000)
        page.context.set_offline(True)
        for path, prediction in zip(paths, expected, strict=True):
            page.set_input_files("#files", path)
            page.locator("#file-name", has_text=path.name).wait_for(timeout=30_000)
            assert page.locator("#label").inner_text() == prediction.label
            shown = float(page.locator("#top li:first-child .n").inner_text().split()[0])
            assert shown == pytest.approx(100 * (prediction.score or 0), abs=1.1)
        (tmp_path / "broken.png").write_bytes(b"no image")
        page.set_input_files("#files", tmp_path / "broken.png")
        page.locator("#problem", has_text="broken.png").wait_for(timeout=30_000)
        browser.close()
    assert messages == []
    assert foreign == []


TRANSFORMERS_JS = """
import {{ env, pipeline }} from "@huggingface/transformers";
env.localModelPath = {folder};
env.allowRemoteModels = false;
const classify = await pipeline("image-classification", "fox", {{ dtype: "fp32" }});
for (const path of {paths}) console.log(JSON.stringify((await classify(path))[0].label));
"""


@pytest.mark.slow
@pytest.mark.usefixtures("cached_runtime")
def test_transformers_js_under_node(tmp_path: Path) -> None:
    """It loads the folder and agrees on nearly all photographs: it resizes with other arithmetic."""
    modules = os.environ.get("VITRAIL_TRANSFORMERS_JS")
    if modules is None or shutil.which("node") is None:
        pytest.skip("needs node, and VITRAIL_TRANSFORMERS_JS: a folder with node_modules/@huggingface/transformers")
    clf = classifier()
    web_folder(clf, tmp_path)
    paths = []
    for number, image in enumerate(photographs(50)):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    program = Path(modules, f"vitrail-{os.getpid()}.mjs")
    program.write_text(
        TRANSFORMERS_JS.format(folder=json.dumps(str(tmp_path)), paths=json.dumps([str(path) for path in paths]))
    )
    try:
        done = subprocess.run(["node", program], capture_output=True, text=True, check=True)
    finally:
        program.unlink()
    labels = [json.loads(line) for line in done.stdout.splitlines()]
    same = sum(label == found.label for label, found in zip(labels, clf.predict(paths), strict=True))
    print(f"transformers.js agrees on {same} of {len(paths)}")
    assert same >= 0.8 * len(paths)


def test_export_to_the_web(archive: Path, tmp_path: Path) -> None:
    """The gate checks the ONNX files; a web folder is replaced by a new one, and no other folder is."""
    out = tmp_path / "page"
    for _ in range(2):
        (row,) = vitrail.export(digits_vit(), out, target="web", check="digits").rows
        assert (row["target"], row["accepted"], row["agreement"]) == ("web", True, 100)
    assert json.loads((out / "model.json").read_text())["name"] == "page"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "page"]
    with pytest.raises(RunError, match="is not an export"):
        vitrail.export(digits_vit(), tmp_path / "cache", target="web", check="digits")

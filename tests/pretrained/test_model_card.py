"""The model card: valid for the hub's own reader, true to the model, silent about the machine, and its code runs."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.datasets import load_sample_image

from vitrail.classifier import Classifier, load
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import SwinConfig, ViTConfig
from vitrail.pretrained.model_card import without_paths

VIT = ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=3)
NAMES = ("cat", "dog", "owl")
FIGURES = {"split": "test", "top1": 93.25, "top5": 100.0, "loss": 0.21342, "images": 1234}


def save(folder: Path, config: ViTConfig = VIT, names: tuple[str, ...] = NAMES, **notes: Any) -> Path:
    torch.manual_seed(0)
    model = build_model(config)
    if config.num_classes:
        torch.nn.init.normal_(model.head.weight)
    size, channels = config.img_size, config.in_chans
    preprocess = Preprocess(size=size, mean=(0.5,) * channels, std=(0.3,) * channels, channels=channels)
    return Classifier(model, preprocess, names, notes=notes).save(folder)


def card(folder: Path) -> ModelCard:
    """As the hub's library reads it; what it reads and writes again is the same."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    read = ModelCard(text, ignore_metadata_errors=False)
    assert ModelCard(f"---\n{read.data.to_yaml()}\n---\n{read.text}").data.to_dict() == read.data.to_dict()
    assert read.data.to_dict() == yaml.safe_load(re.split(r"^---\n", text, flags=re.MULTILINE)[1])
    return read


def test_a_measured_model(tmp_path: Path) -> None:
    read = card(save(tmp_path / "m", data="digits", figures=FIGURES))
    assert read.data.tags == ["image-classification", "timm", "vitrail", "transformers"]
    assert (read.data.library_name, read.data.pipeline_tag) == ("timm", "image-classification")
    assert read.data.metrics == ["accuracy"]
    assert "license" not in read.data.to_dict(), "of a model from scratch its author decides"
    results = {result.metric_name: result for result in read.data.eval_results}
    assert (results["top-1"].metric_value, results["top-5"].metric_value) == (0.9325, 1.0)
    for result in results.values():
        assert (result.dataset_name, result.dataset_split, result.task_type) == (
            "digits",
            "test",
            "image-classification",
        )
    assert "On the `test` split of digits, 1,234 images." in read.text
    assert "| top-1, % | 93.25 |" in read.text
    assert "| loss | 0.2134 |" in read.text
    assert "cat (0), dog (1), owl (2)" in read.text
    params = sum(p.numel() for p in build_model(VIT).parameters())
    assert f"{params:,} parameters" in read.text
    assert "| mean | 0.5, 0.5, 0.5 |" in read.text


def test_a_model_without_figures_claims_none(tmp_path: Path) -> None:
    for number, figures in enumerate((None, {}, {"top1": 90.0}, {"split": "test", "top1": None})):
        read = card(save(tmp_path / str(number), figures=figures))
        assert "None were measured" in read.text
        assert not {"model-index", "metrics", "datasets"} & read.data.to_dict().keys()


def test_figures_on_the_split_that_chose_the_epoch_say_so(tmp_path: Path) -> None:
    read = card(save(tmp_path / "m", data="x", figures={**FIGURES, "split": "val"}))
    assert "On the `val` split" in read.text
    assert "slightly optimistic" in read.text
    assert "optimistic" not in card(save(tmp_path / "t", data="x", figures=FIGURES)).text


@pytest.mark.parametrize(
    ("notes", "expected", "words"),
    [
        ({}, {}, "no licence is stated"),
        (
            {"source": "vit.augreg (hf:timm/vit.augreg@abc)", "licence": "apache-2.0"},
            {"license": "apache-2.0", "base_model": "timm/vit.augreg"},
            "vit.augreg (hf:timm/vit.augreg@abc), whose licence is `apache-2.0`",
        ),
        (
            {"source": "hf:org/m@abc", "licence": "Their-Own-1.0"},
            {"license": "other", "license_name": "Their-Own-1.0", "base_model": "org/m"},
            "licence is `Their-Own-1.0`",
        ),
        (
            {"source": "https://me:secret@host/a.pth?key=secret#x", "licence": None},
            {"license": "other"},
            "https://host/a.pth, whose licence is not stated",
        ),
    ],
)
def test_the_licence_is_that_of_the_weights(
    notes: dict[str, Any], expected: dict[str, str], words: str, tmp_path: Path
) -> None:
    read = card(save(tmp_path / "m", **notes))
    found = read.data.to_dict()
    assert {key: found[key] for key in ("license", "license_name", "base_model") if key in found} == expected
    assert words in read.text
    assert "secret" not in str(read)


def test_named_datasets_are_linked_and_folders_are_not(tmp_path: Path) -> None:
    assert card(save(tmp_path / "a", data="cifar10")).data.datasets == ["uoft-cs/cifar10"]
    assert "datasets" not in card(save(tmp_path / "b", data="photos")).data.to_dict()


@pytest.mark.parametrize("root", ["/home/alice/photos", "C:\\Users\\alice\\photos", "~/alice/photos", "alice/photos"])
def test_no_path_of_the_machine_stands_in_it(root: str, tmp_path: Path) -> None:
    source = root + ("\\" if "\\" in root else "/") + "old.pth"
    read = card(save(tmp_path / "m", data=root, source=source, figures=FIGURES))
    assert "alice" not in str(read)
    assert str(tmp_path) not in str(read)
    assert "photos" in read.text
    assert "a local file or folder, old.pth" in read.text


def test_without_paths() -> None:
    notes = {
        "a": ["/x/y.txt", "x/y", "hf:a/b", "https://h/p", ("../z/w", 1)],
        "b": {"c": "~", "d": "\\\\host\\share\\f"},
    }
    assert without_paths(notes) == {
        "a": ["y.txt", "x/y", "hf:a/b", "https://h/p", ["w", 1]],
        "b": {"c": "~", "d": "f"},
    }


def test_names_of_strangers_are_only_text(tmp_path: Path) -> None:
    names = ("<script>alert(1)</script>", "a\n---\nlicense: mit", "[x](javascript:y) `z` | *w*")
    read = card(save(tmp_path / "m", names=names, data="<b>\n---", figures={**FIGURES, "split": "te`st"}))
    assert "<script>" not in read.text
    assert r"\[x\](javascript:y) \`z\` \| \*w\*" in read.text
    assert "license" not in read.data.to_dict()
    assert re.search(r"^license", read.text, re.MULTILINE) is None


def test_what_timm_has_not_is_not_said_to_be_timms(tmp_path: Path) -> None:
    read = card(save(tmp_path / "m", replace(VIT, stem="conv", in_chans=1)))
    assert read.data.library_name == "vitrail"
    assert read.data.tags == ["image-classification", "vitrail"]
    assert "import timm" not in read.text


@pytest.mark.parametrize(("size", "differs"), [((40, 24), True), ((32, 32), False)])
def test_a_swin_with_partial_windows_says_so_when_saved(size: tuple[int, int], differs: bool, tmp_path: Path) -> None:
    config = SwinConfig(
        img_size=size, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=3
    )
    model = build_model(config)
    classifier = Classifier(model, Preprocess(size=size, mean=(0.5,) * 3, std=(0.3,) * 3), NAMES)
    with (
        pytest.warns(UserWarning, match="40x24 .* timm.* height 32 or 48 .* width 16 or 32")
        if differs
        else nullcontext()
    ):
        classifier.save(tmp_path / "m")
    read = card(tmp_path / "m")
    assert ("height 32 or 48 and width 16 or 32" in read.text) == differs
    assert ("timm" in read.data.tags) != differs


def test_many_classes_and_none(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(250))
    text = card(save(tmp_path / "many", replace(VIT, num_classes=250), names)).text
    assert "class 99 (99)" in text
    assert "class 100" not in text
    assert "and 150 more, in `config.json`" in text
    read = card(save(tmp_path / "none", replace(VIT, num_classes=0), ()))
    assert read.data.pipeline_tag == "image-feature-extraction"
    assert "returns features" in read.text


def test_it_tells_the_licence_to_whoever_loads_the_weights(tmp_path: Path) -> None:
    from vitrail.pretrained.resolve import load_source

    assert load_source(save(tmp_path / "m", source="hf:a/b", licence="cc-by-nc-4.0")).licence == "cc-by-nc-4.0"


def run_code(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], only: tuple[str, ...]) -> dict[str, str]:
    """What the code in the card prints, by the library that it is for."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"With (\w+):\n\n```python\n(.*?)```", text, re.DOTALL)
    printed = {}
    for library, code in found:
        if library in only:
            exec(compile(code.replace("FOLDER", str(folder)), library, "exec"), {})
            printed[library] = capsys.readouterr().out
    assert printed.keys() == set(only)
    return printed


@pytest.mark.parametrize("channels", [3, 1])
def test_its_code_runs_and_agrees(
    channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(load_sample_image("china.jpg")).save("photo.jpg")
    folder = save(tmp_path / "m", replace(VIT, in_chans=channels))
    label = load(folder).predict("photo.jpg")[0].label
    printed = run_code(folder, tmp_path, capsys, ("vitrail", "timm"))
    assert f"label='{label}'" in printed["vitrail"]
    assert printed["timm"].startswith(f"{label} ")


def test_its_code_for_transformers_runs_and_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(load_sample_image("china.jpg")).save("photo.jpg")
    for channels in (3, 1):
        folder = save(tmp_path / str(channels), replace(VIT, in_chans=channels))
        label = load(folder).predict("photo.jpg")[0].label
        assert run_code(folder, tmp_path, capsys, ("transformers",))["transformers"] == f"{label}\n"


def test_code_of_a_model_without_a_head_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(load_sample_image("china.jpg")).save("photo.jpg")
    folder = save(tmp_path / "m", replace(VIT, num_classes=0), ())
    assert run_code(folder, tmp_path, capsys, ("vitrail", "timm")) == {
        "vitrail": "(1, 24)\n",
        "timm": "torch.Size([1, 24])\n",
    }

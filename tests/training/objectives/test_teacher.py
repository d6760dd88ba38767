"""Teachers of every kind: how they are opened, what they are shown, whose classes are whose."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from inference.onnx_file import onnx_file
from training import tiny
from vitrail.classifier import Classifier
from vitrail.errors import ConfigError, ModelError, VitrailError, WeightsError
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ResNetConfig
from vitrail.pretrained import external as guests
from vitrail.pretrained.create import create_model
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.objectives.teacher import (
    Adapt,
    TeacherLogits,
    config_name,
    match_classes,
    open_teacher,
)
from vitrail.utils.fingerprint import model_fingerprint

CPU = torch.device("cpu")
GREY = Preprocess(size=(8, 8), mean=(0.4,), std=(0.3,), channels=1)
COLOUR = Preprocess(size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def pixels(channels: int, size: int = 8) -> Tensor:
    """Images as they are read: uint8 B C H W."""
    draw = np.random.default_rng(3)
    return torch.from_numpy(draw.integers(0, 256, (4, channels, size, size)).astype(np.uint8))


def resnet(num_classes: int = 3, channels: int = 1) -> nn.Module:
    config = ResNetConfig(
        block="basic", layers=(1,), channels=(4,), small_stem=True, num_classes=num_classes, in_chans=channels
    )
    return build_model(config)


def view(images: Tensor) -> View:
    count = len(images)
    return View(images, torch.zeros(count, dtype=torch.int64), torch.arange(count), 0)


# ---- what it is shown


def test_only_the_normalisation_differs() -> None:
    images, mine = pixels(3), Preprocess(size=(8, 8))
    adapted = Adapt(COLOUR, mine, CPU)(COLOUR.normalize(images))
    torch.testing.assert_close(adapted, mine.normalize(images), rtol=0, atol=2e-6)


def test_nothing_differs_and_nothing_is_done() -> None:
    x = COLOUR.normalize(pixels(3))
    assert Adapt(COLOUR, COLOUR.replace(crop_pct=0.9), CPU)(x) is x


@pytest.mark.parametrize("same", [False, True])
def test_grey_becomes_colours(same: bool) -> None:
    images = pixels(1)
    theirs = COLOUR.replace(mean=GREY.mean * 3, std=GREY.std * 3) if same else COLOUR
    adapted = Adapt(GREY, theirs, CPU)(GREY.normalize(images))
    torch.testing.assert_close(adapted, theirs.normalize(images.repeat(1, 3, 1, 1)), rtol=0, atol=2e-6)


def test_colours_become_pillows_grey() -> None:
    images = pixels(3)
    adapted = Adapt(COLOUR, GREY, CPU)(COLOUR.normalize(images))
    pillow = [np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in images]
    expected = GREY.normalize(torch.from_numpy(np.stack(pillow))[:, None])
    assert adapted.shape == expected.shape
    assert (adapted - expected).abs().max() <= 0.51 / 255 / GREY.std[0]  # Pillow rounds to whole levels


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(12, 20), (5, 4)])
def test_another_size_is_pillows_up_to_rounding(how: str, size: tuple[int, int]) -> None:
    images = pixels(1, 16)
    student, teacher = GREY.replace(size=(16, 16)), COLOUR.replace(size=size, interpolation=how)
    adapted = Adapt(student, teacher, CPU)(student.normalize(images))
    resample = Image.Resampling[how.upper()]
    pillow = [
        np.asarray(Image.fromarray(image[0].numpy()).convert("F").resize(size[::-1], resample)) for image in images
    ]
    expected = teacher.normalize(torch.from_numpy(np.stack(pillow))[:, None].repeat(1, 3, 1, 1))
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-4)


def test_other_channels_are_refused() -> None:
    five = Preprocess(size=(8, 8), mean=(0.5,) * 5, std=(0.5,) * 5, channels=5)
    with pytest.raises(ModelError, match=r"5 channels .* 3"):
        Adapt(COLOUR, five, CPU)
    assert Adapt(five, five, CPU)(torch.ones(1, 5, 8, 8)).shape == (1, 5, 8, 8)


# ---- whose classes are whose


def test_classes_are_matched_by_name() -> None:
    known = ("ant", "bee", "cat", "dog")
    assert match_classes(known, 4, known, "t") == (None, "")
    assert match_classes(known, 4, ("dog", "cat", "bee", "ant"), "t") == ([3, 2, 1, 0], "")
    assert match_classes(known, 4, ("cat", "ant"), "t") == ([2, 0], "2 of its 4 classes are used")
    with pytest.raises(ModelError, match=r"'cats' \(did you mean 'cat'.*\) and 1 more"):
        match_classes(known, 4, ("cats", "ant", "dogs"), "t")


def test_classes_without_names_are_told() -> None:
    assert match_classes(None, 2, ("ant", "bee"), "t")[0] is None
    assert "data's order" in match_classes(None, 2, ("ant", "bee"), "t")[1]
    numbers = ("0", "1", "2")
    assert "data's order" in match_classes(numbers, 3, ("ant", "bee", "cat"), "t")[1]
    assert match_classes(numbers, 3, ("2", "0"), "t")[0] == [2, 0], "numbers are names where the data have them"
    for known, count in ((None, 3), (numbers, 3)):
        with pytest.raises(ModelError, match=r"3 classes .* 2"):
            match_classes(known, count, ("ant", "bee"), "t")


def test_answers_are_the_students_classes_in_its_order() -> None:
    model = resnet(4, 3).eval()
    teacher = open_teacher(Classifier(model, COLOUR, ("ant", "bee", "cat", "dog")))
    answers = TeacherLogits(teacher, COLOUR, ("dog", "bee"), CPU)
    answers.check()
    x = COLOUR.normalize(pixels(3))
    said = answers(view(x))
    with torch.no_grad():
        torch.testing.assert_close(said, model(x)[:, [3, 1]], rtol=0, atol=0)
    assert not said.requires_grad
    assert "2 of its 4 classes" in answers.notes


# ---- what is opened


def test_a_teacher_is_a_frozen_copy_in_eval_mode() -> None:
    model = resnet(3, 1).train()
    teacher = open_teacher(model)
    assert teacher.model is not model
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert teacher.preprocess is None
    x = torch.randn(2, 1, 8, 8)
    answers = TeacherLogits(teacher, GREY, ("one", "two", "three"), CPU)
    answers.check()
    torch.testing.assert_close(answers(view(x)), model.eval()(x), rtol=0, atol=0)


def test_a_fingerprint_changes_with_one_bit() -> None:
    model = resnet()
    before = model_fingerprint(model)
    assert model_fingerprint(open_teacher(model).model) == before
    name, tensor = next((n, t) for n, t in model.named_buffers() if "running_mean" in n)
    tensor.view(torch.int32)[0] += 1
    assert model_fingerprint(model) != before, name


def test_the_precision_is_the_teachers_and_not_the_students() -> None:
    teacher, x = open_teacher(resnet().to(torch.bfloat16).float()), torch.randn(2, 1, 8, 8)
    found = {}
    for amp in ("off", "bf16"):
        answers = TeacherLogits(teacher, GREY, ("one", "two", "three"), CPU, amp)
        answers.check()
        found[amp] = answers(view(x))
        with torch.autocast("cpu", torch.bfloat16):  # the student's
            assert torch.equal(answers(view(x)), found[amp])
        assert found[amp].dtype == torch.float32
    assert not torch.equal(found["off"], found["bf16"])


def test_a_saved_model_a_timm_model_and_a_catalog_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("one", "two", "three")
    Classifier(resnet(3, 1).eval(), GREY, names, architecture="resnet20_32").save(tmp_path / "m")
    teacher = open_teacher(config_name(tmp_path / "m"))
    assert teacher.class_names == names
    assert teacher.preprocess == GREY
    assert "input 8x8 grey" in teacher.description
    assert f"{sum(p.numel() for p in teacher.model.parameters()):,} parameters" in teacher.description

    made = timm.create_model("resnet10t", num_classes=3)
    teacher = open_teacher(made)
    assert teacher.preprocess == Preprocess.from_timm(made.pretrained_cfg)
    assert teacher.class_names is None

    monkeypatch.chdir(tmp_path)
    assert config_name("m") == str(tmp_path / "m")
    assert config_name("resnet18") == "resnet18"
    with pytest.raises(WeightsError, match=r"teacher .*resnet"):
        open_teacher("resnet99")


def test_models_of_timm_and_torchvision_beyond_the_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: original(name, pretrained=not pretrained))
    teacher = open_teacher("timm:resnet10t.c3_in1k")
    assert teacher.class_names is not None
    assert teacher.class_names[:2] == ("tench", "goldfish")
    assert teacher.preprocess is not None
    assert teacher.preprocess.size == (176, 176)
    assert guests.open_external_model("timm:resnet50.a1_in1k") is None, "it is in the catalog"
    assert guests.open_external_model("torchvision:vit_b_16") is None
    assert guests.open_external_model("resnet18") is None
    with pytest.raises(ModelError, match=r"regnety_16'.*regnety_160'"):
        open_teacher("timm:regnety_16")

    import torchvision

    get = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: get(name))
    teacher = open_teacher("torchvision:squeezenet1_1")
    assert teacher.preprocess == Preprocess(size=(224, 224), interpolation="bilinear", crop_pct=224 / 256)
    assert teacher.class_names is not None
    assert len(teacher.class_names) == 1000
    with pytest.raises(WeightsError, match=r"squeezenet1_1.*'X'.*IMAGENET1K_V1"):
        open_teacher("torchvision:squeezenet1_1.X")


def test_weights_that_cannot_be_had_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(name: str, pretrained: bool) -> Any:
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(WeightsError, match="no route to host") as error:
        open_teacher("timm:resnet10t")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "kind", "fact"),
    [
        (lambda: create_model("vit_nano_patch2_8", num_classes=0), ModelError, "head"),
        (lambda: "python:ResNet:0123", ConfigError, "teacher="),
        (lambda: "nowhere/run", WeightsError, "nowhere"),
        (lambda: "nowhere.onnx", ModelError, r"nowhere\.onnx"),
    ],
)
def test_what_is_no_teacher_is_refused(source: Callable[[], Any], kind: type[VitrailError], fact: str) -> None:
    with pytest.raises(kind, match=fact):
        open_teacher(source())


class Gives(nn.Module):
    """A module with any answer."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: (x, x), "tuple"),
        (lambda x: x, r"\(1, 1, 8, 8\)"),
        (lambda x: F.conv2d(x, torch.zeros(3, 3, 1, 1)), "1 channels of 8x8"),
        (lambda x: x.flatten(1)[:, :5], "5 classes .* 3"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(answer: Callable[[Tensor], Any], words: str) -> None:
    answers = TeacherLogits(open_teacher(Gives(answer)), GREY, ("one", "two", "three"), CPU)
    with pytest.raises(ModelError, match=words) as error:
        answers.check()
    assert "\n" not in str(error.value)


# ---- ONNX


@pytest.mark.parametrize("shape", [["n", 1, 8, 8], [3, 1, 8, 8]], ids=["any batch", "batches of 3"])
def test_an_onnx_file_teaches(shape: list[Any], tmp_path: Path) -> None:
    metadata = {"class_names": json.dumps(["b", "a", "c"]), "preprocess": json.dumps(GREY.to_dict())}
    weight = onnx_file(tmp_path / "t.onnx", shape, metadata)
    teacher = open_teacher(str(tmp_path / "t.onnx"))
    assert teacher.preprocess == GREY
    answers = TeacherLogits(teacher, COLOUR.replace(mean=(0.5,) * 3, std=(0.25,) * 3), ("a", "c"), CPU)
    answers.check()
    grey = pixels(1)
    x = (grey.float().repeat(1, 3, 1, 1) / 255 - 0.5) / 0.25
    expected = GREY.normalize(grey).flatten(1).numpy() @ weight[:, [1, 2]]
    np.testing.assert_allclose(answers(view(x)).numpy(), expected, rtol=1e-4, atol=1e-4)
    assert answers.notes == "; 2 of its 3 classes are used"


def test_an_onnx_file_that_says_nothing(tmp_path: Path) -> None:
    onnx_file(tmp_path / "t.onnx", ["n", 1, 8, 8])
    teacher = open_teacher(tmp_path / "t.onnx")
    assert teacher.class_names is None
    assert teacher.preprocess is not None
    assert teacher.preprocess.channels == 1
    assert teacher.preprocess.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    answers = TeacherLogits(teacher, GREY, ("one", "two", "three"), CPU)
    answers.check()
    assert "data's order" in answers.notes
    assert "ImageNet's mean" in answers.notes
    onnx_file(tmp_path / "any.onnx", ["n", 1, "h", "w"])
    assert open_teacher(tmp_path / "any.onnx").preprocess is None
    with pytest.raises(ModelError, match=r"3 classes .* 2"):
        TeacherLogits(teacher, GREY, ("one", "two"), CPU).check()


def test_tiny_data_have_the_classes_that_these_tests_name() -> None:
    assert tiny.dataset().class_names == ("one", "two", "three")

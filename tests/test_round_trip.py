"""Out and back: vitrail to timm to vitrail, and vitrail to transformers, with equal logits and equal preprocessing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)

from vitrail.classifier import Classifier, load
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig

NAMES = ("cat", "dog", "owl", "ünï", "a b", "x, y", "7")
VIT = ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=7)
CONFIGS: dict[str, ModelConfig] = {
    "vit": VIT,
    "vit, not square": replace(VIT, img_size=(24, 48)),
    "deit, distilled": replace(VIT, dist_token=True),
    "deit3": replace(VIT, no_embed_class=True, init_values=1e-6),
    "dinov2 with registers": replace(VIT, reg_tokens=4, no_embed_class=True, init_values=1e-5),
    "swin": SwinConfig(
        img_size=(64, 64), embed_dim=12, depths=(1, 2, 1), num_heads=(1, 2, 4), window_size=4, num_classes=7
    ),
    "resnet": ResNetConfig(img_size=(64, 64), layers=(1, 1, 1, 1), num_classes=7),
    "convnext": ConvNeXtConfig(img_size=(64, 64), depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=7),
}
SETTINGS = [
    Preprocess(size=(32, 32), crop_pct=0.9),
    Preprocess(size=(224, 224), crop_pct=0.875, interpolation="bilinear"),
    Preprocess(size=(64, 64), crop_mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3),
    Preprocess(size=(64, 64), crop_mode="border", crop_pct=0.95),
    Preprocess(size=(48, 96), crop_mode="center", crop_pct=0.9, interpolation="lanczos"),
    Preprocess(size=(96, 48), crop_mode="squash", interpolation="nearest"),
]


def make(config: ModelConfig, preprocess: Preprocess | None = None) -> Classifier:
    """No tensor at its initial value."""
    model = build_model(config).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 0.3) if tensor.ndim < 2 else nn.init.normal_(tensor, std=0.1)
    preprocess = preprocess or Preprocess(size=config.img_size, crop_pct=0.9, interpolation="bilinear")
    return Classifier(model, preprocess, NAMES)


@torch.inference_mode()
def logits(model: nn.Module, config: ModelConfig) -> Tensor:
    x = torch.randn(2, 3, *config.img_size, generator=torch.Generator().manual_seed(3))
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.abs().max() > 0
    assert not torch.equal(ours[0], ours[1])
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def photographs() -> Iterator[tuple[str, Image.Image]]:
    china = Image.fromarray(load_sample_image("china.jpg"))
    yield "china", china
    yield "coffee", Image.fromarray(np.ascontiguousarray(skimage.data.coffee()))
    yield "tall", Image.fromarray(np.ascontiguousarray(skimage.data.astronaut())).crop((200, 0, 301, 400))
    yield "wide", china.crop((0, 100, 640, 223))
    yield "tiny", china.resize((31, 23))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_vitrail_to_timm_to_vitrail(config: ModelConfig, tmp_path: Path) -> None:
    """Saved again by timm, as its push_to_hf_hub saves: nothing of ours is left in the folder."""
    classifier = make(config)
    classifier.save(tmp_path / "ours")
    other = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    args = {key: value for key, value in other.pretrained_cfg.items() if key == "label_names"}
    args["model_args"] = _json(tmp_path / "ours")["model_args"]  # timm does not remember what it was built with
    save_for_hf(other, tmp_path / "timm", model_config=args, safe_serialization=True)
    assert "vitrail" not in _json(tmp_path / "timm")
    back = load(tmp_path / "timm")
    expected = logits(classifier.model, config)
    assert_equal(expected, logits(other, config))
    assert_equal(expected, logits(back.model, config))
    assert back.class_names == NAMES
    assert back.preprocess == classifier.preprocess
    again = back.save(tmp_path / "again")
    assert_equal(expected, logits(load(again).model, config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_vitrail_to_transformers(config: ModelConfig, tmp_path: Path) -> None:
    classifier = make(config)
    folder = classifier.save(tmp_path / "m")
    expected = logits(classifier.model, config)
    for kind in (TimmWrapperForImageClassification, AutoModelForImageClassification):
        other = kind.from_pretrained(folder)
        assert isinstance(other, TimmWrapperForImageClassification)
        assert_equal(expected, logits(other, config))
        assert other.config.id2label == dict(enumerate(NAMES))
        assert other.config.label2id["owl"] == 2


@pytest.mark.parametrize("preprocess", SETTINGS, ids=lambda p: f"{p.crop_mode} {p.size[0]}x{p.size[1]}")
def test_transformers_processor_prepares_photographs_as_we_do(preprocess: Preprocess, tmp_path: Path) -> None:
    resnet = CONFIGS["resnet"]
    folder = make(replace(resnet, img_size=preprocess.size), preprocess).save(tmp_path / "m")
    std = torch.tensor(preprocess.std)[:, None, None]
    for kind in (AutoImageProcessor, TimmWrapperImageProcessor):
        processor = kind.from_pretrained(folder)
        assert isinstance(processor, TimmWrapperImageProcessor)
        for name, image in photographs():
            ours, theirs = preprocess(image), processor(image)["pixel_values"][0]
            assert ours.shape == theirs.shape
            assert ((ours - theirs) * std).abs().max() <= 1 / 255, name
            assert ((ours - theirs) * std).abs().mean() <= 1e-3, name


def test_from_photograph_to_label_all_three_agree(tmp_path: Path) -> None:
    config = CONFIGS["deit, distilled"]
    classifier = make(config)
    folder = classifier.save(tmp_path / "m")
    processor, other = (
        AutoImageProcessor.from_pretrained(folder),
        AutoModelForImageClassification.from_pretrained(folder),
    )
    for name, image in photographs():
        ours = {score.label: score.score for score in classifier.predict(image, top=7)[0].top}
        with torch.inference_mode():
            theirs = other(**processor(image)).logits.softmax(1)[0].tolist()
        assert ours == pytest.approx({other.config.id2label[k]: score for k, score in enumerate(theirs)}, rel=1e-3), (
            name
        )


def _json(folder: Path) -> dict:
    import json

    return json.loads((folder / "config.json").read_text(encoding="utf-8"))

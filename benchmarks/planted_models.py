"""The models that `benchmarks.explain` trains on images with planted evidence: a ViT, a Swin and a ResNet."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitrail
from benchmarks.planted_evidence import CLASSES, INPUT, planted_dataset
from vitrail.classifier import Classifier
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model
from vitrail.models.configs import ModelConfig, ResNetConfig, SwinConfig, ViTConfig

SIZE = (INPUT, INPUT)
MODELS: dict[str, ModelConfig] = {
    "vit": ViTConfig(img_size=SIZE, patch_size=12, embed_dim=128, depth=4, num_heads=4, num_classes=len(CLASSES)),
    "swin": SwinConfig(
        img_size=SIZE,
        patch_size=6,
        embed_dim=48,
        depths=(2, 2, 2),
        num_heads=(2, 4, 8),
        window_size=4,
        num_classes=len(CLASSES),
    ),
    "cnn": ResNetConfig(
        img_size=SIZE, block="basic", layers=(1, 1, 1), channels=(32, 64, 128), num_classes=len(CLASSES)
    ),
}
SETTINGS: dict[str, Any] = {
    "batch_size": 64,
    "lr": 1e-3,
    "warmup_epochs": 0.5,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "ema": 0.99,
    "label_smoothing": 0.0,
    "drop": 0.0,
    "drop_path": 0.0,
    # None of the recipe's augmentation: a flip changes the class, a crop cuts off the object, mixup plants two.
    "crop_scale": None,
    "flip": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "rand_augment": 0.0,
    "erase": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "cache": "off",
}
MORE_SETTINGS: dict[str, dict[str, Any]] = {"vit": {"pad_shift": 6, "edge": "reflect"}, "swin": {}, "cnn": {}}
TRAIN_IMAGES = {"vit": 64_000, "swin": 32_000, "cnn": 16_000}
EPOCHS = {"vit": 4, "swin": 3, "cnn": 2}


def train(kind: str, seed: int, folder: Path) -> Classifier:
    """The model of this kind and seed, which is trained, trained on or read."""
    out = folder / f"{kind}-{seed}"
    if not (out / "summary.json").is_file():
        model = new_model(MODELS[kind], seed)
        data = planted_dataset(TRAIN_IMAGES[kind], seed=10 * seed)
        if (out / "config.toml").is_file():
            vitrail.train(data, model=model, resume=out)
        else:
            vitrail.train(data, model=model, epochs=EPOCHS[kind], seed=seed, out=out, **SETTINGS, **MORE_SETTINGS[kind])
    return vitrail.load(out)


def new_model(config: ModelConfig, seed: int) -> ImageModel:
    """A network with random weights. Those of linear layers are drawn for their width: the usual standard deviation of
    0.02 is meant for widths of hundreds, and narrow networks start slowly with it."""
    torch.manual_seed(seed)
    model = build_model(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
    return model

"""A data set and a model so small that a whole run takes a moment."""

from typing import Any

import numpy as np
import torch

from vitrail.data.dataset import ArraySplit, Dataset, Sizes
from vitrail.models.catalog import VARIANTS, Variant
from vitrail.models.configs import ViTConfig
from vitrail.training.config.schema import make_config
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.session import Session
from vitrail.training.setup import prepare

# Everything whose randomness or state a resumed run must find again: batch norm, dropout, drop path.
CONFIG = ViTConfig(
    img_size=(8, 8),
    in_chans=1,
    num_classes=3,
    patch_size=2,
    embed_dim=16,
    depth=2,
    num_heads=2,
    mlp_ratio=2.0,
    stem="conv",
    drop_path_rate=0.1,
)
VARIANT = Variant("vit", "vit_test_patch2_8", CONFIG, 0, 0.0)


def add_variant(monkeypatch: Any) -> None:
    """Put the tiny model into the catalog."""
    monkeypatch.setitem(VARIANTS, VARIANT.name, VARIANT)


def images(count: int, seed: int) -> ArraySplit:
    """Noise; the class tells which quarter is bright, and how bright the whole is."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 60, (count, 8, 8)).astype(np.uint8)
    labels = np.arange(count) % 3
    for image, label in zip(pixels, labels, strict=True):
        top, left = divmod(int(label), 2)
        image += np.uint8(40 * label)
        image[4 * top : 4 * top + 4, 4 * left : 4 * left + 4] += 80
    return ArraySplit(pixels, labels, f"tiny/{seed}")


def dataset() -> Dataset:
    """50 training, 12 validation and 15 test images, 8x8, grey, of three classes."""
    splits = {"train": images(50, 0), "val": images(12, 1), "test": images(15, 2)}
    sizes = Sizes.of(np.tile(np.array([[8, 8]]), (77, 1)))
    return Dataset("tiny", ("one", "two", "three"), dict(splits), sizes, channels=1, mean=(0.4,), std=(0.3,))


# Plain settings, so that a test sees what it sets and nothing else. Five steps an epoch.
PLAIN = {
    "model": VARIANT.name,
    "epochs": 1,
    "batch_size": 10,
    "optimizer": "adamw",
    "lr": 1e-2,
    "warmup_epochs": 0,
    "weight_decay": 0.0,
    "clip_grad": None,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "pad_shift": 0,
    "rotate": 0.0,
    "shear": 0.0,
    "shift": 0.0,
    "zoom": (1.0, 1.0),
    "drop_path": 0.0,
    "device": "cpu",
}


def session(**given: Any) -> Session:
    """A session of the tiny model on the tiny data."""
    setup = prepare(dataset(), make_config({**PLAIN, **given}))
    return Session(setup, Reporter(False), torch.device("cpu"))


def learn(one: Session, epochs: int) -> list[float]:
    """The mean loss of each of so many epochs, without files and validation."""
    losses = []
    for epoch in range(epochs):
        for batch in one.loader.epoch(epoch):
            one.trainer.step(batch)
        losses.append(one.trainer.mean_loss())
        one.trainer.next_epoch()
    return losses


def trained(**given: Any) -> dict[str, torch.Tensor]:
    """The weights that are kept after one epoch, without files and validation."""
    one = session(**given)
    trainer = one.trainer
    while not trainer.schedule.finished(trainer.state.steps, 0.0):
        for batch in one.loader.epoch(trainer.state.epoch, trainer.state.step):
            trainer.step(batch)
            if trainer.schedule.finished(trainer.state.steps, 0.0):
                break
        trainer.next_epoch()
    return {name: value.clone() for name, value in trainer.eval_model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

"""A training step of a ViT at several widths, in float32 and in bfloat16: from which width on bfloat16 is faster.

Limits of `amp=auto` (vitrail/utils/device.py) can be chosen by it. Keep the machine otherwise idle.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import Comparison, interleave, publish
from vitrail.data.loader import Batch
from vitrail.models.build import build_model
from vitrail.models.configs import ViTConfig
from vitrail.training.config.schema import make_config
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.engine.schedule import Schedule
from vitrail.training.engine.trainer import Trainer
from vitrail.training.objectives.classification import Classify

WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768)
HEAD_DIM = 32


def step(model: ViTConfig, size: int, amp: str) -> Callable[[], Any]:
    """A call that trains on a batch of `size` random images."""
    images, rows = torch.randn(size, model.in_chans, *model.img_size), torch.arange(size)
    targets = rows % model.num_classes
    view, batch = View(images, targets, rows, 0), Batch(images, targets, rows)
    config = make_config({"data": "-", "model": "-", "amp": amp})
    trainer = Trainer(build_model(model), Classify(), lambda *_: view, Schedule(None, 0, 0, 1e9), config, images.device)
    return lambda: trainer.step(batch)


def compare(width: int, depth: int, size: int, rounds: int) -> Comparison:
    """The ratio is float32's time over bfloat16's."""
    model = ViTConfig(
        img_size=(224, 224), num_classes=100, patch_size=16, embed_dim=width, depth=depth, num_heads=width // HEAD_DIM
    )
    name = f"ViT of width {width}, depth {depth}, 224 pixels, batch {size}"
    return interleave(
        name, ("bfloat16", step(model, size, "bf16")), ("float32", step(model, size, "off")), rounds=rounds
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", default="amp_widths", help="name of the JSON file in benchmarks/results")
    arguments = parser.parse_args()
    results = [compare(w, arguments.depth, arguments.batch_size, arguments.rounds) for w in arguments.widths]
    publish(arguments.out, results)


if __name__ == "__main__":
    main()

"""Golden losses: a change that is not meant to change training must not change these.

Where one is meant to, write them anew with `python tests/training/test_golden.py NAME...` and say in the commit why;
without a name, those that are not there yet are written.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from vitrail.data.loader import TrainLoader
from vitrail.training.config.schema import make_config
from vitrail.training.engine.batch_augmenter import BatchAugmenter
from vitrail.training.engine.schedule import Schedule
from vitrail.training.engine.trainer import Trainer
from vitrail.training.objectives.classification import Classify
from vitrail.training.setup import prepare

FILE = Path(__file__).parents[1] / "golden" / "losses.json"
STEPS = 12
RUNS = {
    "chosen": {},
    "deit, mixed": {
        "model": "deit_tiny_distilled_patch16_224",
        "img_size": 32,
        "mixup": 0.8,
        "cutmix": 1.0,
        "lr": 1e-3,
    },
    "swin, erased": {"model": "swin_tiny_patch4_window7_224", "img_size": 32, "erase": 0.25, "layer_decay": 0.8},
    "resnet, cropped": {"model": "resnet18", "img_size": 32, "crop_scale": (0.5, 1.0), "drop": 0.1},
    # Whole recipes: shifts and mirror images; RandAugment, repeated views, mixing, erasing; layer decay; binary loss.
    "recipe tiny": {"recipe": "tiny", "model": "vit_nano_patch2_8"},
    "recipe small": {"recipe": "small", "model": "vit_tiny_patch16_224", "img_size": 32},
    "recipe deit": {"recipe": "deit", "model": "deit_tiny_distilled_patch16_224", "img_size": 32},
    "recipe finetune": {"recipe": "finetune", "model": "vit_tiny_patch16_224", "img_size": 32},
    "recipe resnet-a2": {"recipe": "resnet-a2", "model": "resnet18", "img_size": 32},
}


def losses(options: dict[str, object]) -> list[float]:
    """The mean training loss after each of the first steps on digits, batches of 16."""
    setup = prepare("digits", make_config({"batch_size": 16, "warmup_epochs": 0.0, "amp": "off", **options}))
    config, device = setup.config, torch.device("cpu")
    loader = TrainLoader(
        setup.dataset.split("train"),
        setup.preprocess,
        batch_size=config.schedule.batch_size,
        seed=config.seed,
        crop_scale=config.augment.crop_scale,
        crop_ratio=config.augment.crop_ratio,
        repeats=config.augment.repeats,
    )
    view = BatchAugmenter(config, setup.preprocess, 10, device)
    schedule = Schedule(STEPS, 4, 0.0, None)
    task = Classify(config.regularize.label_smoothing, config.regularize.loss, config.regularize.bce_threshold)
    trainer = Trainer(setup.model, task, view, schedule, config, device)
    curve = []
    for _, batch in zip(range(STEPS), loader.epoch(0), strict=False):
        trainer.step(batch)
        curve.append(trainer.mean_loss())
    return curve


@pytest.mark.parametrize("name", RUNS)
def test_the_losses_are_what_they_were(name: str) -> None:
    golden = json.loads(FILE.read_text())[name]
    assert len(golden) == STEPS
    # Another processor rounds otherwise, and steps add that up: a changed formula differs by far more.
    assert losses(RUNS[name]) == pytest.approx(golden, rel=2e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    stored = json.loads(FILE.read_text())
    for run in sys.argv[1:] or RUNS.keys() - stored.keys():
        stored[run] = losses(RUNS[run])
    FILE.write_text(json.dumps({run: stored[run] for run in RUNS}, indent=1) + "\n")

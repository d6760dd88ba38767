"""The published weights of the catalog's models, read from `published.csv`. Importing this imports no torch.

Names, tags, licences and preprocessing are those of timm 1.0.31 (`pretrained_cfg`) and torchvision 0.28 (`meta`), as
tested. `top1` is from timm's results-imagenet.csv if measured with the same preprocessing, or from torchvision.
"""

import csv
from pathlib import Path

from vitrail.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from vitrail.weights.record import WeightsRecord

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_STATISTICS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": (_HALF, _HALF), "clip": (_CLIP_MEAN, _CLIP_STD)}
_HUB = "hf:timm"  # short for "hf:timm/<model>.<tag>"


def _record(row: dict[str, str]) -> WeightsRecord:
    mean, std = _STATISTICS[row["statistics"]]
    size = int(row["size"])
    return WeightsRecord(
        model=row["model"],
        tag=row["tag"],
        source=f"{_HUB}/{row['model']}.{row['tag']}" if row["source"] == _HUB else row["source"],
        licence=row["licence"] or None,
        sha256=row["sha256"] or None,
        top1=float(row["top1"]) if row["top1"] else None,
        num_classes=int(row["classes"]),
        preprocess=Preprocess(
            size=(size, size),
            mean=mean,
            std=std,
            interpolation=row["interpolation"],
            crop_pct=float(row["crop_pct"]),
            crop_mode=row["crop_mode"],
        ),
        paper=row["paper"] or None,
    )


def _read() -> dict[str, tuple[WeightsRecord, ...]]:
    table: dict[str, tuple[WeightsRecord, ...]] = {}
    with Path(__file__).with_name("published.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            table[row["model"]] = (*table.get(row["model"], ()), _record(row))
    return table


PUBLISHED = _read()  # model name -> its weights, the default first

"""A comparison of two tiny models on tiny images, which takes a second or two."""

from pathlib import Path
from typing import Any

from training import tiny
from vitrail.comparison.run import compare
from vitrail.models.catalog import VARIANTS, Variant
from vitrail.models.configs import ResNetConfig

RESNET = ResNetConfig(block="basic", layers=(1, 1), channels=(8, 16), small_stem=True, img_size=(8, 8), num_classes=3)
CNN = Variant("resnet", "resnet_test_8", RESNET, 0, 0.0)
MODELS = (tiny.VARIANT.name, CNN.name)
SETTINGS: dict[str, Any] = {key: value for key, value in tiny.PLAIN.items() if key != "model"} | {"amp": "off"}


def add_variants(monkeypatch: Any) -> None:
    """Put the tiny ViT and the tiny ResNet into the catalog."""
    tiny.add_variant(monkeypatch)
    monkeypatch.setitem(VARIANTS, CNN.name, CNN)


def quick(monkeypatch: Any) -> None:
    """Few corruptions, few rounds: the probes take most of the time of a tiny comparison."""
    monkeypatch.setattr("vitrail.comparison.measurements.SEVERITIES", (3,))
    monkeypatch.setattr("vitrail.comparison.timings._ROUNDS", 3)
    monkeypatch.setattr("vitrail.comparison.timings._SCALE_ROUNDS", 2)


def run(out: Path, **options: Any) -> dict[str, Any]:
    """Two models, two shares, two seeds, one epoch each, unless `options` say otherwise."""
    given = {"models": MODELS, "seeds": 2, "shares": (50, 100), **SETTINGS, **options}
    return compare(tiny.dataset(), out=out, **given)

"""What is compared by default, and in which order."""

import numpy as np
import pytest

from vitrail.comparison.arms import part_of
from vitrail.comparison.plan import Contender, Plan, default_models, make_plan
from vitrail.data.catalog import open_dataset


def plan(count: int, seeds: int, shares: tuple[int, ...]) -> Plan:
    return Plan(tuple(Contender(name, name, None, name) for name in "abc"[:count]), shares, seeds, {})


def test_seeds_are_interleaved_and_each_model_comes_first() -> None:
    arms = plan(2, 2, (50, 100)).arms
    assert [(arm.seed, arm.share, arm.contender.label) for arm in arms] == [
        (0, 50, "a"), (0, 50, "b"), (0, 100, "b"), (0, 100, "a"),
        (1, 50, "b"), (1, 50, "a"), (1, 100, "a"), (1, 100, "b"),
    ]  # fmt: skip
    assert len({arm.key for arm in plan(3, 3, (25, 50, 100)).arms}) == 27


@pytest.mark.parametrize(
    ("vit", "size", "expected"),
    [
        # 0.0028 G operations; a ResNet-20 at 8 pixels has 0.0408 / 16. No Swin is that small.
        ("vit_nano_patch2_8", (8, 8), ["vit_nano_patch2_8", "resnet20_32"]),
        # ResNet-18 has a more similar cost, but is made for large images.
        ("vit_micro_patch8_32", (32, 32), ["vit_micro_patch8_32", "resnet20_32"]),
        ("vit_small_patch8_64", (64, 64), ["vit_small_patch8_64", "resnet20_32"]),
        # 4.6 G: Swin-T has 4.5, and ResNet-50 4.1.
        ("deit_small_patch16_224", None, ["deit_small_patch16_224", "swin_tiny_patch4_window7_224", "resnet50"]),
        ("vit_base_patch16_224", None, ["vit_base_patch16_224", "swin_base_patch4_window7_224", "resnet101"]),
    ],
)
def test_default_models_cost_alike(vit: str, size: tuple[int, int] | None, expected: list[str]) -> None:
    assert default_models(vit, size, pretrained=False) == expected


def test_digits_are_compared_at_their_own_size() -> None:
    found = make_plan(open_dataset("digits"))
    assert [each.label for each in found.contenders] == ["vit_nano_patch2_8", "resnet20_32"]
    assert found.settings["img_size"] == (8, 8)
    assert found.settings["budget"] == 600
    assert found.shares == (25, 50, 100)
    assert make_plan(open_dataset("digits"), settings={"epochs": 3}).length == "3 epochs"


def test_parts_of_the_images_are_stratified_nested_and_differ_by_seed() -> None:
    dataset = open_dataset("digits")
    full = dataset.split("train")
    parts = {share: part_of(dataset, share, 0).split("train") for share in (25, 50, 100)}
    names = {share: {part.name(i) for i in range(len(part))} for share, part in parts.items()}
    assert names[25] < names[50] < names[100]
    for share, part in parts.items():
        counts = np.bincount(part.labels) / np.bincount(full.labels)
        assert np.abs(counts - share / 100).max() < 0.01
    other = part_of(dataset, 25, 1).split("train")
    assert {other.name(i) for i in range(len(other))} != names[25]
    assert part_of(dataset, 25, 0).split("test") is dataset.split("test")

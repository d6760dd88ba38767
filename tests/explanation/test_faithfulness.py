"""Deletion and insertion against torchcam, and models whose evidence is known by construction."""

import contextlib
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchcam.metrics import DeletionInsertionMetric

from vitrail.errors import ConfigError
from vitrail.explanation.faithfulness import FORWARDS, Faithfulness, grid_of, measure
from vitrail.explanation.targets import Target, parse_target
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model
from vitrail.models.configs import ViTConfig

NAMES = tuple("abcde")
SIZE, CELL = (32, 48), 8  # 4x6 cells


@pytest.fixture(scope="module")
def model() -> ImageModel:
    torch.manual_seed(0)
    built = build_model(ViTConfig(patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, img_size=SIZE))
    for value in built.parameters():
        if value.dim() > 1:
            nn.init.normal_(value, std=1.5 * value[0].numel() ** -0.5)
    return built.eval()


class GivenMaps:
    """A stand-in for torchcam's extractors that returns maps given to it."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def blurred(images: Tensor) -> Tensor:
    sigma = max(SIZE) / 20
    width = 2 * round(4 * sigma) + 1
    return torch.stack(
        [
            torch.from_numpy(cv2.GaussianBlur(x.numpy(), (width, width), sigma, borderType=cv2.BORDER_REPLICATE))
            for x in images.flatten(0, 1)
        ]
    ).reshape(images.shape)


@pytest.mark.parametrize("steps", [3, 6])
@pytest.mark.parametrize(("baseline", "theirs"), [("mean", None), ("blur", blurred)])
@pytest.mark.parametrize("target", [None, 2])
def test_against_torchcam(
    model: ImageModel, baseline: str, theirs: Callable[[Tensor], Tensor] | None, steps: int, target: int | None
) -> None:
    fractions = [step / steps for step in range(1, steps)]
    for _ in range(3):
        image, cells = torch.randn(1, 3, *SIZE), torch.randn(1, 4, 6)
        pixels = cells.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
        metric = DeletionInsertionMetric(
            GivenMaps(model, pixels), partial(torch.softmax, dim=-1), steps=steps, baseline=theirs
        )
        metric.update(image, target)
        expected = metric.summary()
        (ours,) = measure(model, image, cells, parse_target(target, NAMES), baseline, fractions)
        assert ours.deletion == pytest.approx(expected["deletion_auc"], abs=1e-4)
        assert ours.insertion == pytest.approx(expected["insertion_auc"], abs=1e-4)
        assert ours.score == pytest.approx(expected["insertion_auc"] - expected["deletion_auc"], abs=1e-4)


def readout(weights: Tensor, images: Tensor) -> Tensor:
    """A model of two classes: the logit of "b" is a weighted sum of the means of the cells, of "a" it is 0."""
    means = images.mean(dim=1).unflatten(1, (-1, CELL)).unflatten(3, (-1, CELL)).mean(dim=(2, 4))  # N h w
    evidence = (means * weights).sum(dim=(1, 2))
    return torch.stack([torch.zeros_like(evidence), evidence], dim=1)


@pytest.mark.parametrize("baseline", ["mean", "blur"])
@pytest.mark.parametrize("target", ["b", "b:a"])
def test_known_evidence_is_above_all_random_orders(baseline: str, target: str) -> None:
    weights = torch.zeros(14, 14)
    weights[3:5, 8:10] = 1.0
    image = torch.zeros(1, 3, 112, 112)
    image[:, :, 24:40, 64:80] = 1.0
    logits = partial(readout, weights)
    (right,) = measure(logits, image, weights[None], parse_target(target, "ab"), baseline)
    assert right.percentile == 100
    assert right.z > 3
    assert right.score > 0.05
    (wrong,) = measure(logits, image, -weights[None], parse_target(target, "ab"), baseline)
    assert wrong.percentile == 0
    assert wrong.score == pytest.approx(-right.score)
    assert wrong.z < -3
    (elsewhere,) = measure(logits, image, weights.T[None], parse_target(target, "ab"), baseline)
    assert abs(elsewhere.z) < 3
    (nothing,) = measure(logits, image, torch.zeros(1, 14, 14), parse_target(target, "ab"), baseline)
    assert abs(nothing.z) < 3


def test_areas_of_a_linear_model_by_hand() -> None:
    """Four cells that all count alike: each is a quarter of the difference of logits, in any order."""
    logits = partial(readout, torch.ones(2, 2))
    image, pair = torch.ones(1, 3, 16, 16), parse_target("b:a", "ab")
    (even,) = measure(logits, image, torch.rand(1, 2, 2), pair, fractions=(0.25, 0.5, 0.75))
    assert even == Faithfulness(0, pytest.approx(2), pytest.approx(2), 0, 0, 0)
    assert even.z == 0
    weights = torch.tensor([[8.0, 4], [2, 1]])
    (ranked,) = measure(partial(readout, weights), image, weights[None], pair, fractions=(0.25, 0.5, 0.75))
    assert ranked.deletion == pytest.approx((15 / 2 + 7 + 3 + 1 + 0) / 4)
    assert ranked.insertion == pytest.approx((0 + 8 + 12 + 14 + 15 / 2) / 4)


def test_a_model_that_sees_nothing_has_no_score() -> None:
    def constant(images: Tensor) -> Tensor:
        return torch.tensor([[1.0, 2.0]]).expand(len(images), 2)

    (found,) = measure(constant, torch.randn(1, 3, 16, 16), torch.rand(1, 4, 4), Target(("a", "b")))
    assert (found.score, found.random_std, found.percentile, found.z) == (0, 0, 0, 0)
    assert Faithfulness(1, 0, 1, 0, 0, 100).z == float("inf")


def test_the_number_of_forwards(model: ImageModel) -> None:
    sizes: list[int] = []

    def logits(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return model(images)  # type: ignore[return-value]

    measure(logits, torch.randn(2, 3, *SIZE), torch.rand(2, 4, 6), Target(NAMES))
    assert sum(sizes) == 2 * FORWARDS
    assert FORWARDS <= 65
    assert sizes == [16, 16, 14] * 2


def test_it_is_deterministic_and_draws_nothing_from_the_process(model: ImageModel) -> None:
    images, maps = torch.randn(3, 3, *SIZE), torch.rand(3, 4, 6)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    found = measure(model, images, maps, Target(NAMES))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    again = [measure(model, images[i : i + 1], maps[i : i + 1], Target(NAMES))[0] for i in range(3)]
    assert found == again
    with torch.inference_mode():
        assert found == measure(model, images, maps, Target(NAMES))
    assert all(result.random_mean == pytest.approx(0, abs=1e-12) for result in found)


def test_bfloat16_and_maps_of_any_grid(model: ImageModel) -> None:
    half = build_model(model.config).bfloat16().eval()
    half.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, *SIZE)
    for grid in ((4, 6), (1, 2), (32, 48), (11, 16)):
        (rough,) = measure(half, images.bfloat16(), torch.rand(1, *grid), Target(NAMES), "blur")
        assert np.isfinite([rough.score, rough.random_std]).all()


@pytest.mark.parametrize(
    ("grid", "height", "expected", "side"),
    [
        ((14, 14), 224, (14, 14), 16),
        ((28, 28), 224, (28, 28), 8),
        ((56, 56), 224, (14, 14), 16),
        ((224, 224), 224, (14, 14), 16),
        ((63, 63), 250, (13, 13), 20),
        ((32, 48), 32, (8, 12), 4),
        ((7, 7), 224, (7, 7), 32),
    ],
)
def test_fine_maps_are_averaged_to_cells(
    grid: tuple[int, int], height: int, expected: tuple[int, int], side: int
) -> None:
    cells, found = grid_of(torch.full(grid, 3.0), height)
    assert (tuple(cells.shape), found) == (expected, side)
    assert torch.all(cells == 3)
    assert cells.shape[0] * found >= height


def test_an_unknown_baseline_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'blurr'.*'blur'"):
        measure(nn.Identity(), torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 2), Target(NAMES), "blurr")

"""At which image sizes the logits of a Swin equal timm's: `window_mismatch` against timm."""

import re
from dataclasses import replace

import pytest
import torch

from models.test_parity import SWIN, timm_twin
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS
from vitrail.models.configs import ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.models.timm_compat import timm_base_variant, window_mismatch

CONFIG = SwinConfig(window_size=4, num_classes=7, **SWIN)  # patches of 2, three stages
TINY = VARIANTS["swin_tiny_patch4_window7_224"].config


@torch.no_grad()
def relative_difference(config: SwinConfig, size: tuple[int, int]) -> float:
    """Of logits from timm's model built for `size`, on weights that make attention matter."""
    ours, theirs = build_model(config).eval(), timm_twin(replace(config, img_size=size)).eval()
    for name, value in ours.state_dict().items():
        value.normal_(0, 1 if "bias_table" in name else 1.5 * max(1, value[0].numel()) ** -0.5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, *size)
    expected = theirs(x)
    return float((ours(x) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "size", [(2, 2), (6, 8), (8, 10), (8, 16), (12, 16), (16, 32), (24, 24), (32, 32), (32, 48), (40, 64)], ids=str
)
def test_a_mismatch_is_reported_exactly_where_logits_differ(size: tuple[int, int]) -> None:
    config = replace(CONFIG, img_size=size)
    differs = relative_difference(config, size) > 1e-5
    assert (window_mismatch(config) is not None) == differs
    assert (timm_base_variant(config) is None) == differs


def test_logits_of_some_sizes_differ_much() -> None:
    assert relative_difference(replace(CONFIG, img_size=(40, 40)), (40, 40)) > 0.01


@pytest.mark.parametrize(
    ("config", "size", "facts"),
    [
        (TINY, (320, 192), r"320x192 .* windows of 7, .* height 224 or 448 and width 224$"),
        (replace(TINY, img_size=(320, 192)), None, "height 224 or 448 and width 112 or 224$"),
        (replace(TINY, img_size=(256, 224)), None, "height 224 or 448 and width 224$"),
        (VARIANTS["swin_base_patch4_window12_384"].config, (224, 384), "windows of 12, .* height 384 and width 384$"),
        (replace(CONFIG, img_size=(33, 32)), None, "height 32 or 64 and width 32$"),
    ],
)
def test_the_nearest_sizes_that_agree(config: ModelConfig, size: tuple[int, int] | None, facts: str) -> None:
    found = window_mismatch(config, size)
    assert found is not None
    assert re.search(facts, found)


@pytest.mark.parametrize("config", [TINY, ViTConfig(), ResNetConfig(img_size=(100, 30))], ids=str)
def test_no_mismatch_for_other_architectures(config: ModelConfig) -> None:
    assert window_mismatch(config) is None

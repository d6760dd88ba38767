"""ConvNeXt alone: image sizes, downsampling and initial weights."""

import pytest
import torch

from vitrail.errors import ModelError
from vitrail.models.configs import ConvNeXtConfig
from vitrail.models.convnext import ConvNeXt


def small() -> ConvNeXt:
    return ConvNeXt(ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5))


def test_any_image_size_from_32() -> None:
    assert small().forward_features(torch.randn(1, 3, 70, 33)).shape == (1, 32, 2, 1)


def test_every_later_stage_downsamples_whatever_its_width() -> None:
    model = ConvNeXt(ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5))
    assert model.forward_features(torch.randn(1, 3, 64, 32)).shape == (1, 16, 2, 1)


def test_too_small_image_raises() -> None:
    with pytest.raises(ModelError, match="31x64"):
        small()(torch.zeros(1, 3, 31, 64))


def test_first_weights_are_the_papers() -> None:
    model = small()
    block = model.stages[0].blocks[0]
    assert torch.equal(block.gamma, torch.full((8,), 1e-6))
    assert block.conv_dw.weight.std().item() == pytest.approx(0.0176, rel=0.1)
    assert (block.conv_dw.bias == 0).all()

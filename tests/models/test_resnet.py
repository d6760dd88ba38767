"""ResNet's own: where the strides are, and the first weights."""

import pytest
import torch

from vitrail.models.configs import ResNetConfig
from vitrail.models.resnet import ResNet


def test_the_stride_of_a_bottleneck_is_in_its_3x3_convolution() -> None:
    model = ResNet(ResNetConfig(layers=(1, 1, 1, 1)))
    assert [model.layer2[0].conv1.stride, model.layer2[0].conv2.stride] == [(1, 1), (2, 2)]
    assert model.forward_features(torch.randn(1, 3, 65, 32)).shape == (1, 2048, 3, 1)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_residual_branches_begin_at_zero(block: str) -> None:
    model = ResNet(ResNetConfig(block=block, layers=(2, 1, 1, 1)))
    x = torch.rand(2, model.layer1[1].conv1.in_channels, 8, 8)
    assert torch.equal(model.layer1[1](x), x)
    weight = model.layer2[0].conv1.weight
    fan_out = weight.shape[0] * weight[0, 0].numel()
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_checkpointing_moves_the_statistics_once() -> None:
    model = ResNet(ResNetConfig(block="basic", layers=(1, 1, 1, 1)))
    twin = ResNet(model.config)
    twin.load_state_dict(model.state_dict())
    twin.set_grad_checkpointing()
    x = torch.randn(4, 3, 32, 32)
    for each in (model, twin):
        each.train()(x).sum().backward()
    expected = dict(model.named_buffers())
    for name, value in twin.named_buffers():
        torch.testing.assert_close(value, expected[name], msg=name)

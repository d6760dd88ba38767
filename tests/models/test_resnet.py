"""ResNet alone: strides, and initial weights."""

import pytest
import torch
from timm.models.resnet import BasicBlock
from timm.models.resnet import ResNet as TimmResNet
from torch import nn

from tolerance import assert_near
from vitrail.models.catalog import VARIANTS
from vitrail.models.configs import ResNetConfig
from vitrail.models.resnet import ResNet


def test_the_stride_of_a_bottleneck_is_in_its_3x3_convolution() -> None:
    model = ResNet(ResNetConfig(layers=(1, 1, 1, 1)))
    assert [model.layer2[0].conv1.stride, model.layer2[0].conv2.stride] == [(1, 1), (2, 2)]
    assert model.forward_features(torch.randn(1, 3, 65, 32)).shape == (1, 2048, 3, 1)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_residual_branches_start_at_zero(block: str) -> None:
    model = ResNet(ResNetConfig(block=block, layers=(2, 1, 1, 1)))
    x = torch.rand(2, model.layer1[1].conv1.in_channels, 8, 8)
    assert torch.equal(model.layer1[1](x), x)
    weight = model.layer2[0].conv1.weight
    fan_out = weight.shape[0] * weight[0, 0].numel()
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_small_stem_with_timms_blocks() -> None:
    """He et al., section 4.2: 3x3 convolutions alone, stages of 16, 32 and 64 channels at sizes 32, 16 and 8."""
    ours = ResNet(VARIANTS["resnet20_32"].config)
    theirs = TimmResNet(BasicBlock, [3, 3, 3, 1], num_classes=10, channels=(16, 32, 64, 64))
    theirs.conv1, theirs.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    theirs.layer1 = nn.Sequential(*(BasicBlock(16, 16) for _ in range(3)))
    theirs.maxpool = theirs.layer4 = nn.Identity()
    assert [module.kernel_size for module in ours.modules() if isinstance(module, nn.Conv2d)].count((3, 3)) == 19
    for value in ours.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 0.3) if value.dim() == 1 else value.normal_(0, value[0].numel() ** -0.5)
    theirs.load_state_dict(ours.state_dict())
    ours.eval(), theirs.eval()
    x = torch.randn(2, 3, 32, 32)
    assert ours.forward_features(x).shape == (2, 64, 8, 8)
    assert_near(ours(x), theirs(x))


def test_layer_ids() -> None:
    ids = ResNet(VARIANTS["resnet20_32"].config).layer_ids()
    names = ("conv1.weight", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "fc.weight")
    assert [ids[name] for name in names] == [0, 1, 9, 10]


@pytest.mark.parametrize("values", [{"layers": ()}, {"layers": (1, 1)}, {"layers": (1,), "channels": (0,)}], ids=str)
def test_invalid_stages_raise(values: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="layers and channels"):
        ResNetConfig(**values)  # type: ignore[arg-type]


def test_checkpointing_updates_the_statistics_once() -> None:
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

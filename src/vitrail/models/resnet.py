"""ResNet, version 1.5: He et al., "Deep Residual Learning for Image Recognition", 2015 (https://arxiv.org/abs/1512.03385).

In 1.5 the stride of a bottleneck is in its 3x3 convolution, not in the first 1x1 (https://arxiv.org/abs/1706.02677).
With the small stem it is the paper's network for CIFAR (section 4.2), but with convolutions as shortcuts where the
width changes (the paper's option B; the paper's CIFAR network pads with zeros, option A).

Shapes: B batch, I channels of the image, H W height and width of the image or of a feature map, C channels, K classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.layers.block import DropPath, drop_path_rates
from vitrail.layers.embed import channels_last
from vitrail.models.base import ImageModel, head_layer
from vitrail.models.configs import ResNetConfig


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: B C H W -> B C' H/stride W/stride."""

    expansion = 1

    def __init__(self, dim: int, width: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(dim, width, stride)
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path)
        nn.init.zeros_(self.bn2.weight)  # each block starts as the identity (https://arxiv.org/abs/1706.02677)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.drop_path(self.bn2(self.conv2(out)))
        out += x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.act(out)
        return activated


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 of widths C', C', 4C', and a shortcut: B C H W -> B 4C' H/stride W/stride."""

    expansion = 4

    def __init__(self, dim: int, width: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, self.expansion * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * width)
        self.downsample = shortcut(dim, self.expansion * width, stride)
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path)
        nn.init.zeros_(self.bn3.weight)  # each block starts as the identity (https://arxiv.org/abs/1706.02677)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.drop_path(self.bn3(self.conv3(out)))
        out += x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.act(out)
        return activated


def shortcut(dim: int, out: int, stride: int) -> nn.Sequential | None:
    """A 1x1 convolution with batch norm if the shape changes, else None for the identity."""
    if stride == 1 and dim == out:
        return None
    return nn.Sequential(nn.Conv2d(dim, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))


class ResNet(ImageModel):
    """Images B I H W of any size to logits B K."""

    config: ResNetConfig
    head_names = ("fc",)

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        dim, small = config.channels[0], config.small_stem
        self.conv1 = nn.Conv2d(
            config.in_chans,
            dim,
            kernel_size=3 if small else 7,
            stride=1 if small else 2,
            padding=1 if small else 3,
            bias=False,
        )
        self.bn1 = nn.BatchNorm2d(dim)
        self.act = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        blocks: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
        block = blocks[config.block]
        rates = iter(drop_path_rates(config.drop_path_rate, sum(config.layers)))
        self.stages = tuple(f"layer{number}" for number in range(1, len(config.layers) + 1))
        for stage, width, depth in zip(self.stages, config.channels, config.layers, strict=True):
            layers = nn.Sequential()
            for index in range(depth):
                stride = 2 if index == 0 and stage != self.stages[0] else 1
                layers.append(block(dim, width, stride, next(rates)))
                dim = block.expansion * width
            self.add_module(stage, layers)
        self.num_stages = 1 + len(self.stages)
        self.num_features = dim
        self.head_drop = nn.Dropout(config.drop_rate)
        self.fc = head_layer(dim, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def run_block(self, block: nn.Module, *args: Any) -> Tensor:
        """As in the base class, but recomputing a block must not update the running statistics a second time."""
        if not (self.grad_checkpointing and self.training):
            return super().run_block(block, *args)
        out: Tensor = checkpoint(
            block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(block))
        )
        return out

    def forward_stages(self, x: Tensor, norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Maps B C H W; as in timm, the first is the output of the stem before pooling. There is no final norm."""
        x = self.act(self.bn1(self.conv1(channels_last(x))))  # B C H/2 W/2, or B C H W with the small stem
        pooled = self.maxpool(x)
        yield x, pooled
        x = pooled
        for stage in self.stages:
            for block in self.get_submodule(stage).children():
                x = self.run_block(block, x)
            yield x, x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x if self.unpooled else x.mean(dim=(2, 3)))
        logits: Tensor = x if pre_logits else self.fc(x)
        return logits

    def keep_stages(self, count: int, prune_norm: bool, prune_head: bool) -> None:
        shorter = count < self.num_stages
        if shorter:
            for stage in self.stages[count - 1 :]:
                delattr(self, stage)
            self.stages = self.stages[: count - 1]
            self.num_stages = count
            self.num_features = self.feature_info[count - 1]["num_chs"]
        if count == 1:
            self.maxpool = nn.Identity()
        if shorter or prune_head:
            self.reset_classifier(0, "")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            self.set_pool(global_pool, num_classes)
        self.num_classes = num_classes
        self.fc = head_layer(self.num_features, num_classes).to(self.conv1.weight)

    def layer_id(self, path: list[str]) -> int:
        match path:
            case ["fc", *_]:
                return 1 + sum(self.config.layers)
            case [stage, block, *_] if stage in self.stages:
                return 1 + sum(self.config.layers[: self.stages.index(stage)]) + int(block)
        return 0


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Let the block's batch norms normalise as in training mode without updating their running statistics."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches

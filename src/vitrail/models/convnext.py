"""ConvNeXt: Liu et al., "A ConvNet for the 2020s", 2022 (https://arxiv.org/abs/2201.03545).

Shapes: B batch, I channels of the image, H W height and width of the image or of a feature map, C channels, K classes.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.layers.block import DropPath, Mlp, drop_path_rates, init_linear
from vitrail.models.base import PoolHead, Stage, StagedModel, head_layer
from vitrail.models.configs import ConvNeXtConfig


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of B C H W."""

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return normalised.movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    """x + gamma * MLP(norm(7x7 depthwise convolution(x))), on a feature map B C H W."""

    def __init__(self, dim: int, drop_path: float, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = nn.Parameter(torch.full((dim,), config.ls_init_value))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.mlp(self.norm(self.conv_dw(x).movedim(1, -1))) * self.gamma  # B H W C
        out: Tensor = x + self.drop_path(branch.movedim(-1, 1))
        return out


class ConvNeXt(StagedModel):
    """Images B I H W to logits B K, of any size from 32x32.

    The last feature map is B C H/32 W/32 and not normalised: the norm follows pooling.
    """

    config: ConvNeXtConfig
    stage_list = "stages"

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.num_stages = len(config.depths)
        self.num_features = config.dims[-1]
        before = config.dims[0]
        self.stem = nn.Sequential(
            nn.Conv2d(config.in_chans, before, 4, stride=4), ChannelNorm(before, eps=config.norm_eps)
        )
        rates = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))
        self.stages = nn.Sequential()
        for dim, depth in zip(config.dims, config.depths, strict=True):
            downsample: nn.Module = nn.Identity()
            if len(self.stages):
                downsample = nn.Sequential(
                    ChannelNorm(before, eps=config.norm_eps), nn.Conv2d(before, dim, 2, stride=2)
                )
            self.stages.append(Stage(downsample, (ConvNeXtBlock(dim, next(rates), config) for _ in range(depth))))
            before = dim
        self.head = PoolHead(
            (2, 3),
            nn.LayerNorm(self.num_features, eps=config.norm_eps),
            config.drop_rate,
            head_layer(self.num_features, config.num_classes),
        )
        self.apply(init_linear)
        self.apply(partial(init_linear, layer=nn.Conv2d))

    def forward_stages(self, x: Tensor, norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        if min(x.shape[2:]) < 32:
            raise ModelError(f"an image of {x.shape[2]}x{x.shape[3]} is too small: ConvNeXt needs at least 32x32")
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x, self.run_block)
            yield x, x

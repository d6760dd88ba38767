"""A model in the form that is folded: for images of one size, with the steps apart that folds move into each other.

Unfolded, it computes what the model computes. Blocks are those of the model; their attention and, in a Swin, the order
of tokens have a form of their own.

Shapes: B batch, I channels of the image, H W height and width, N tokens, Q query tokens, C width, A heads, D = C / A,
M windows of a feature map, n tokens of a window, T tokens that the head reads, K classes, F = C of the last block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.deploy.fold.attention import TokenAttention
from vitrail.deploy.fold.windows import WindowBody
from vitrail.errors import ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.layers.block import LayerScale
from vitrail.layers.embed import ConvStem, check_divides, resample_positions
from vitrail.models.base import ImageModel
from vitrail.models.convnext import ConvNeXt, ConvNeXtBlock
from vitrail.models.deit import DistilledVisionTransformer
from vitrail.models.resnet import ResNet
from vitrail.models.swin import SwinTransformer
from vitrail.models.vit import VisionTransformer


class Affine(nn.Module):
    """x * weight + bias, for each channel of the last axis."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Deployed(nn.Module):
    """Pixels B I H W, floats in 0..255, to logits B K and features B F.

    normalize: of the pixels. body: images to the final token or tokens, B T F. affine: of the final norm, when it is
    apart from it. head: B T F to logits; `head_reads_features` unless the affine is in its weights.
    """

    def __init__(self, normalize: nn.Module, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.body = body
        self.affine: nn.Module = nn.Identity()
        self.head = head
        self.head_reads_features = True

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.body(self.normalize(pixels))  # B T F
        features = self.affine(tokens)
        logits = self.head(features if self.head_reads_features else tokens)
        return logits, features.mean(dim=1) if features.shape[1] > 1 else features[:, 0]


class OneHead(nn.Module):
    """B 1 F -> B K."""

    def __init__(self, fc: nn.Module) -> None:
        super().__init__()
        self.fc = fc

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.fc(tokens[:, 0])
        return logits


class MeanOfHeads(nn.Module):
    """B T F -> B K: a linear layer for each token, and their mean."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.stack([head(tokens[:, index]) for index, head in enumerate(self.heads)]).mean(dim=0)


class ProductHead(nn.Module):
    """B T F -> B K by one linear layer of T F inputs."""

    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.fc = fc

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.fc(tokens.flatten(1))
        return logits


class AddTokens(nn.Module):
    """Patches B N C to the input of the first block: prefix tokens before them, and the positions of this size."""

    prefix: Tensor  # 1 P C
    patches: Tensor  # 1 N C, positions
    prefix_positions: Tensor | None  # 1 P C

    def __init__(self, model: VisionTransformer, size: tuple[int, int]) -> None:
        super().__init__()
        patch, embedded = model.config.patch_size, 0 if model.config.no_embed_class else model.num_prefix_tokens
        check_divides(*size, patch)
        grid = (size[0] // patch, size[1] // patch)
        positions = resample_positions(model.pos_embed, model.grid, grid, embedded).detach()
        tokens = [t.detach() for t in (model.cls_token, model.dist_token, model.reg_token) if t is not None]
        self.register_buffer("prefix", torch.cat(tokens, dim=1) if tokens else positions[:, :0])
        self.register_buffer("patches", positions[:, embedded:].clone())
        self.register_buffer("prefix_positions", positions[:, :embedded].clone() if embedded else None)

    def forward(self, patches: Tensor) -> Tensor:
        x = patches + self.patches
        if not self.prefix.shape[1]:
            return x
        prefix = self.prefix if self.prefix_positions is None else self.prefix + self.prefix_positions
        return torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)

    def sum_prefix(self) -> None:
        """Add the positions to the prefix tokens, once."""
        if self.prefix_positions is not None:
            self.prefix = self.prefix + self.prefix_positions
            self.prefix_positions = None


class TokenBody(nn.Module):
    """ViT and DeiT. `read`: the number of leading tokens that the last block computes; None for all."""

    def __init__(self, model: VisionTransformer, size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.add_tokens = AddTokens(model, size)
        self.read: int | None = None
        for block in model.blocks:
            block.attn = TokenAttention(block.attn)  # type: ignore[arg-type]
        stem = [*model.patch_embed.convs] if isinstance(model.patch_embed, ConvStem) else []
        self.patches = Patches(nn.Sequential(*stem, model.patch_embed.proj))
        del model.patch_embed, model.pos_embed, model.cls_token, model.dist_token, model.reg_token

    def forward(self, images: Tensor) -> Tensor:
        x = self.model.pool(self.model.encode_tokens(self.add_tokens(self.patches(images)), self.read))
        return x if x.dim() == 3 else x[:, None]  # pool gives B 2 C for DeiT


class Patches(nn.Module):
    """B I H W -> B N C, by convolutions."""

    def __init__(self, convs: nn.Sequential) -> None:
        super().__init__()
        self.convs = convs

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.convs(x).flatten(2).transpose(1, 2)
        return tokens


class ConvNeXtForm(nn.Module):
    """A block of a ConvNeXt, whose gamma is a layer of its own."""

    def __init__(self, block: ConvNeXtBlock) -> None:
        super().__init__()
        self.conv_dw, self.norm, self.mlp = block.conv_dw, block.norm, block.mlp
        self.ls = LayerScale(len(block.gamma), 1.0)
        self.ls.gamma = block.gamma

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.ls(self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))))
        return x + branch.permute(0, 3, 1, 2)


class ConvNeXtBody(nn.Module):
    """ConvNeXt: stem and stages, mean over the map, and norm."""

    def __init__(self, model: ConvNeXt, size: tuple[int, int]) -> None:
        super().__init__()
        self.stem = model.stem
        self.stages = nn.Sequential()
        for stage in model.stages:
            self.stages.append(nn.Sequential(stage.downsample, *map(ConvNeXtForm, stage.blocks)))  # type: ignore[arg-type]
        self.norm = model.head.norm

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.stages(self.stem(images)).mean(dim=(2, 3)))
        return tokens[:, None]


class ResNetBody(nn.Module):
    """ResNet: stem and stages, and mean over the map."""

    def __init__(self, model: ResNet, size: tuple[int, int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(model.conv1, model.bn1, model.act, model.maxpool)
        self.stages = nn.Sequential(*(model.get_submodule(name) for name in model.stages))

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.stages(self.stem(images)).mean(dim=(2, 3))
        return pooled[:, None]


class Normalize(Affine):
    """Pixels in 0..255 to (x / 255 - mean) / std: B I H W."""

    def __init__(self, preprocess: Preprocess, dtype: torch.dtype) -> None:
        mean, std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (preprocess.mean, preprocess.std))
        super().__init__((1 / (255 * std)).to(dtype), (-mean / std).to(dtype))


def to_form(model: ImageModel, preprocess: Preprocess) -> Deployed:
    """The form of `model`, which takes over its modules, for images of `preprocess.size`.

    Raises:
        ModelError: an architecture without such a form.
    """
    normalize = Normalize(preprocess, next(model.parameters()).dtype)
    size = preprocess.size
    if isinstance(model, DistilledVisionTransformer):
        return Deployed(normalize, TokenBody(model, size), MeanOfHeads([model.head, model.head_dist]))
    if isinstance(model, VisionTransformer):
        return Deployed(normalize, TokenBody(model, size), OneHead(model.head))
    if isinstance(model, SwinTransformer):
        return Deployed(normalize, WindowBody(model, size), OneHead(model.head.fc))
    if isinstance(model, ConvNeXt):
        return Deployed(normalize, ConvNeXtBody(model, size), OneHead(model.head.fc))
    if isinstance(model, ResNet):
        return Deployed(normalize, ResNetBody(model, size), OneHead(model.fc))
    raise ModelError(f"{type(model).__name__} cannot be exported: only models of vitrail's own architectures can")

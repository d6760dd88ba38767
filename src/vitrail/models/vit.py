"""Vision Transformer: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020 (https://arxiv.org/abs/2010.11929).

With its options this is also DeiT (https://arxiv.org/abs/2012.12877; the distillation token is in `deit.py`), DeiT III
(https://arxiv.org/abs/2204.07118) and DINOv2 (https://arxiv.org/abs/2304.07193).

Shapes: B batch, I channels of the image, H W its height and width, h w height and width of the grid of patches,
N = prefix tokens + h w, Q query tokens (Q <= N), C width, A heads, K classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.layers.attention import Attention
from vitrail.layers.block import DropPath, LayerScale, Mlp, drop_path_rates, init_linear
from vitrail.layers.embed import ConvStem, PatchEmbed, check_divides, resample_positions
from vitrail.layers.merging import Groups, find_pairs, first_groups, merge, score_bias, spread
from vitrail.layers.norm import LayerNorm
from vitrail.models.base import ImageModel, head_layer
from vitrail.models.configs import ViTConfig


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): equations 2 and 3 of ViT (https://arxiv.org/abs/2010.11929)."""

    def __init__(self, drop_path: float, config: ViTConfig) -> None:
        super().__init__()
        dim = config.embed_dim

        def scale() -> nn.Module:
            return nn.Identity() if config.init_values is None else LayerScale(dim, config.init_values)

        self.norm1 = LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(dim, config.num_heads, config.qkv_bias, config.attn_drop_rate, config.proj_drop_rate)
        self.ls1 = scale()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), config.proj_drop_rate)
        self.ls2 = scale()
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """B N C -> B Q C. With `queries`, only the first `queries` tokens are computed; they attend to all N."""
        x = x[:, :queries] + self.drop_path1(self.ls1(self.attn(self.norm1(x), queries)))
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return out

    def forward_with_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` without dropout or drop path: the output B N C and the attention weights B A N N."""
        attended, weights = self.attn.attend_with_weights(self.norm1(x))
        x = x + self.ls1(attended)
        return x + self.ls2(self.mlp(self.norm2(x))), weights


class MergingBlock(Block):
    """A block that merges `r` patch tokens between attention and MLP; see `vitrail.layers.merging`."""

    def __init__(self, drop_path: float, config: ViTConfig, r: int) -> None:
        super().__init__(drop_path, config)
        self.r = r
        self.prefix = config.num_prefix_tokens

    def forward(  # type: ignore[override]  # a chain of merging blocks passes on what the tokens stand for
        self, x: Tensor, queries: int | None, groups: Groups
    ) -> tuple[Tensor, Groups]:
        """B N C, and what the tokens stand for -> B N-r C and the same, or with `queries` B Q C without merging."""
        x, keys = self.attend(x, queries, groups)
        if self.r and queries is None:
            x, groups = merge(x, groups, find_pairs(keys, self.prefix), self.r, self.prefix)
        return self.finish(x), groups

    def attend(self, x: Tensor, queries: int | None, groups: Groups) -> tuple[Tensor, Tensor]:
        """The first half of the block: B Q C, and the keys B A N D."""
        attended, keys = self.attn.forward_with_keys(self.norm1(x), queries, score_bias(groups))
        return x[:, :queries] + self.drop_path1(self.ls1(attended)), keys

    def finish(self, x: Tensor) -> Tensor:
        """The second half of the block, B N C -> B N C."""
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return out


class VisionTransformer(ImageModel):
    """Images B I H W to logits B K.

    The order of tokens is class, distillation, registers, patches (row by row). Images may have another size than
    `config.img_size`, in multiples of the patch size: the position embedding is resampled to it.
    """

    config: ViTConfig
    head_names: tuple[str, ...] = ("head",)

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.num_features = self.embed_dim = dim = config.embed_dim
        check_divides(*config.img_size, config.patch_size)
        self.grid = (config.img_size[0] // config.patch_size, config.img_size[1] // config.patch_size)
        self.num_prefix_tokens = config.num_prefix_tokens
        self.num_stages = config.depth

        self.patch_embed: PatchEmbed | ConvStem
        if config.stem == "conv":
            self.patch_embed = ConvStem(config.patch_size, config.in_chans, dim, config.stem_depth)
        else:
            self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.dist_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.reg_tokens, dim)) if config.reg_tokens else None
        positions = self.grid[0] * self.grid[1] + self._embedded_prefix
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim))
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        rates = drop_path_rates(config.drop_path_rate, config.depth)
        self.blocks = nn.Sequential(
            *(MergingBlock(rate, config, r) for rate, r in zip(rates, config.merge, strict=True))
            if config.merge
            else (Block(rate, config) for rate in rates)
        )
        norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.norm = nn.Identity() if config.fc_norm else norm
        self.fc_norm = norm if config.fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = head_layer(dim, config.num_classes)
        self._init_weights()

    @property
    def _embedded_prefix(self) -> int:
        """Number of prefix tokens that the position embedding covers."""
        return 0 if self.config.no_embed_class else self.num_prefix_tokens

    @property
    def read_tokens(self) -> int | None:
        """Number of leading tokens that the head reads; None for all (average pooling)."""
        return None if self.unpooled or self.config.global_pool == "avg" else 1

    def _init_weights(self) -> None:
        """As in the papers' code: truncated normal with std 0.02 for linear layers and positions, tokens near 0."""
        self.apply(init_linear)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.dist_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def embed(self, x: Tensor) -> Tensor:
        """Images B I H W to the input of the first block B N C: prefix and patch tokens with position embedding."""
        grid = (x.shape[2] // self.config.patch_size, x.shape[3] // self.config.patch_size)
        x = self.patch_embed(x)
        positions = resample_positions(self.pos_embed, self.grid, grid, self._embedded_prefix)
        prefix = [
            t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None
        ]
        if self.config.no_embed_class:
            x = torch.cat([*prefix, x + positions], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + positions
        dropped: Tensor = self.pos_drop(x)
        return dropped

    def encode(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Images B I H W to normalised tokens B N C; with `queries`, to the first `queries` of them.

        The last block then uses the other tokens as keys and values only, which saves their queries and MLP. A model
        that merges tokens returns for every patch the token that it is part of.
        """
        return self.encode_tokens(self.embed(x), queries)

    def encode_tokens(self, x: Tensor, queries: int | None = None) -> Tensor:
        """`encode` from the input of the first block, B N C."""
        for tokens, groups in self.run_blocks(x, queries):  # noqa: B007  the last ones are used
            pass
        normalised: Tensor = self.norm(spread(tokens, groups) if queries is None else tokens[:, :queries])
        return normalised

    def run_blocks(self, x: Tensor, queries: int | None = None) -> Iterator[tuple[Tensor, Groups]]:
        """The tokens after each block, and what they stand for if the model merges tokens; see `encode`."""
        last = len(self.blocks) - 1
        groups = first_groups(x) if self.config.merge and queries is None else Groups()
        for index, block in enumerate(self.blocks):
            chosen = queries if index == last else None
            if self.config.merge:
                x, groups = self.run_block(block, x, chosen, groups)
            else:
                x = self.run_block(block, x, chosen)
            yield x, groups

    def pool(self, x: Tensor) -> Tensor:
        """Tokens B N C to B C: the class token, or the mean of the patches; unpooled, all tokens B N C."""
        if not self.unpooled:
            x = x[:, 0] if self.config.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(dim=1)
        pooled: Tensor = self.fc_norm(x)
        return pooled

    def forward_features(self, x: Tensor) -> Tensor:
        """Images B I H W to all normalised tokens B N C."""
        return self.encode(x)

    def forward_stages(self, x: Tensor, norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """For each block, its tokens B N C (normalised if `norm`), and the same without norm."""
        for merged, groups in self.run_blocks(self.embed(x)):
            x = spread(merged, groups)
            yield self.norm(x) if norm else x, x

    def forward_intermediates(  # type: ignore[override]  # timm's order of arguments
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """The tokens after chosen blocks, like timm's method of the same name; see `ImageModel.forward_intermediates`.

        Args:
            return_prefix_tokens: return pairs of map and prefix tokens B n C, if the model has any.
            norm: apply the final norm to the tokens of every block.
            output_fmt: "NCHW" for maps of the patches B C h w, "NLC" for B (h w) C.
            output_dict: as of the base class; prefix tokens are "image_intermediates_prefix".
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ModelError(f"output_fmt={output_fmt!r}: give 'NCHW' or 'NLC'")
        features, tokens = self.run_stages(x, indices, norm, stop_early)
        maps: list[Any] = [t[:, self.num_prefix_tokens :] for t in tokens]
        if output_fmt == "NCHW":
            grid = (x.shape[2] // self.config.patch_size, x.shape[3] // self.config.patch_size)
            maps = [patches.transpose(1, 2).unflatten(2, grid).contiguous() for patches in maps]
        prefixes = [t[:, : self.num_prefix_tokens] for t in tokens]
        with_prefixes = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            found |= {"image_intermediates_prefix": prefixes} if with_prefixes else {}
            return found if intermediates_only else found | {"image_features": self.norm(features)}
        if with_prefixes:
            maps = list(zip(maps, prefixes, strict=True))
        return maps if intermediates_only else (self.norm(features), maps)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """The patch tokens after the last `n` blocks, or those listed: DINO's interface to `forward_intermediates`."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def keep_stages(self, count: int, prune_norm: bool, prune_head: bool) -> None:
        if self.config.merge:
            raise ModelError("a model that merges tokens cannot be pruned: make it with merge=0")
        self.blocks = nn.Sequential(*list(self.blocks)[:count])
        self.num_stages = count
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, None if self.config.dist_token else "")

    def resize_to(self, config: ViTConfig) -> None:
        """Resample the position embedding to the grid of the new size."""
        check_divides(*config.img_size, config.patch_size)
        grid = (config.img_size[0] // config.patch_size, config.img_size[1] // config.patch_size)
        table = resample_positions(self.pos_embed.detach(), self.grid, grid, self._embedded_prefix)
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.grid = grid

    def set_pool(self, pool: str, num_classes: int) -> None:
        if pool in ("token", "avg"):
            if self.config.dist_token and pool == "avg":
                raise ModelError("the heads of a distilled model read its class and distillation tokens: not 'avg'")
            try:
                self.config = dataclasses.replace(self.config, global_pool=pool)  # type: ignore[arg-type]
            except ValueError as error:
                raise ModelError(f"{type(self).__name__} cannot pool by {pool!r}: {error}") from None
        elif pool == "" and self.config.dist_token:
            raise ModelError("the heads of a distilled model read its class and distillation tokens: not ''")
        super().set_pool(pool, num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        logits: Tensor = x if pre_logits else self.head(x)
        return logits

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images B I H W to logits B K; equal to `forward_head(forward_features(x))` but cheaper, see `encode`."""
        return self.forward_head(self.encode(x, self.read_tokens))

    def forward_pre_logits(self, x: Tensor) -> Tensor:
        return self.forward_head(self.encode(x, self.read_tokens), pre_logits=True)

    def no_weight_decay(self) -> set[str]:
        tokens = {"pos_embed", "cls_token", "dist_token", "reg_token"}
        return tokens & {name for name, _ in self.named_parameters()}

    def layer_id(self, path: list[str]) -> int:
        match path:
            case ["blocks", block, *_]:
                return int(block) + 1
            case ["patch_embed" | "pos_embed" | "cls_token" | "dist_token" | "reg_token", *_]:
                return 0
        return self.config.depth + 1

"""DeiT with its distillation token: Touvron et al., "Training data-efficient image transformers & distillation through
attention", 2020 (https://arxiv.org/abs/2012.12877). DeiT without the token is a plain ViT (`vit.py`).

Shapes: B batch, N tokens, C width, K classes.
"""

import torch
from torch import Tensor

from vitrail.layers.block import init_linear
from vitrail.models.base import head_layer
from vitrail.models.configs import ViTConfig
from vitrail.models.vit import VisionTransformer


class DistilledVisionTransformer(VisionTransformer):
    """A ViT with a class token and a distillation token, and a head for each.

    In training mode `forward` returns the logits of both heads (class, distillation), B K each; in evaluation mode
    their mean B K.
    """

    head_names = ("head", "head_dist")

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.head_dist = head_layer(config.embed_dim, config.num_classes)
        self.head_dist.apply(init_linear)

    @property
    def read_tokens(self) -> int:
        return 2

    def pool(self, x: Tensor) -> Tensor:
        """Tokens B N C to the class and distillation tokens B 2 C."""
        normalised: Tensor = self.fc_norm(x[:, :2])
        return normalised

    def forward_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens B N C to the logits of both heads, B K each."""
        class_token, dist_token = self.head_drop(self.pool(x)).unbind(dim=1)
        return self.head(class_token), self.head_dist(dist_token)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens B N C to the mean of both heads' logits B K, or with `pre_logits` of both tokens B C."""
        if pre_logits:
            mean: Tensor = self.head_drop(self.pool(x)).mean(dim=1)
            return mean
        return torch.stack(self.forward_heads(x)).mean(dim=0)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        tokens = self.encode(x, self.read_tokens)
        return self.forward_heads(tokens) if self.training else self.forward_head(tokens)

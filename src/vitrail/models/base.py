"""The interface that every model has: timm's, so that models of both stand in for each other."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.models.configs import ModelConfig


class ImageModel(nn.Module):
    """Images B C H W to logits B num_classes (or to features, where num_classes is 0)."""

    config: ModelConfig
    num_features: int  # width of what the head reads
    num_classes: int
    grad_checkpointing: bool = False

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, normalised and not pooled: B N C, B H W C or B C H W, as in timm."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool `forward_features`' output; B num_features with `pre_logits`, else logits B num_classes."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))

    def forward_pre_logits(self, x: Tensor) -> Tensor:
        """Images B C H W to what the head reads, B num_features, at the least cost."""
        return self.forward_head(self.forward_features(x), pre_logits=True)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh head for `num_classes` in place of the old one; 0 takes the head off."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm, beside the biases and norms that never get any."""
        return set()

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter by name, for layer-wise decay: 0 at the input, the largest at the head."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: blocks are computed again in the backward pass and not kept."""
        self.grad_checkpointing = enable

    def run_block(self, block: Callable[..., Tensor], *args: Any) -> Tensor:
        """Call `block`, with gradient checkpointing where that is on."""
        if self.grad_checkpointing and self.training:
            out: Tensor = checkpoint(block, *args, use_reentrant=False)
            return out
        return block(*args)


def head_layer(num_features: int, num_classes: int) -> nn.Module:
    """A linear head, or the identity for no classes."""
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()

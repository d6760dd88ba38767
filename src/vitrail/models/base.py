"""The interface that every model has: timm's, so that models of both stand in for each other."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.errors import ModelError
from vitrail.models.configs import ModelConfig


class ImageModel(nn.Module):
    """Images B C H W to logits B num_classes (or to features, where num_classes is 0)."""

    config: ModelConfig
    num_features: int  # width of what the head reads
    num_classes: int
    num_stages: int  # how many feature maps `forward_intermediates` can return
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

    def forward_stages(self, x: Tensor, norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """For `forward_intermediates`, after each stage: its feature map B C H W (the last one normalised if `norm`),
        and what `forward_features` would return if this stage were the last computed."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The feature maps of chosen stages, as timm's method of this name.

        Args:
            x: images B C H W.
            indices: the last n stages for a number, these stages for a list (-1 is the last), all for None.
            norm: apply the final norm to the last stage's map, where the architecture has one.
            stop_early: compute nothing after the last chosen stage.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.

        Returns:
            (features, list of B C H W), with features as `forward_features` returns them; or the list.

        Raises:
            ModelError: an index out of range, or another output_fmt.
        """
        if output_fmt != "NCHW":
            raise ModelError(f"output_fmt={output_fmt!r}: {type(self).__name__} has 'NCHW' alone")
        taken, found = take_indices(self.num_stages, indices), []
        for index, (feature_map, features) in enumerate(self.forward_stages(x, norm)):
            if index in taken:
                found.append(feature_map.contiguous())
            x = features
            if stop_early and index == max(taken):
                break
        return found if intermediates_only else (x, found)

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


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Which of `count` stages or blocks `indices` chooses: the last n for a number, all for None.

    Raises:
        ModelError: an index out of range, or none at all.
    """
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        taken = list(range(count - last, count)) if 0 < last <= count else []
    else:
        taken = [index + count if index < 0 else index for index in indices]
    if not taken or min(taken) < 0 or max(taken) >= count:
        raise ModelError(f"indices={indices} is out of range: give 1 to {count}, or a list of 0 to {count - 1}")
    return taken


def head_layer(num_features: int, num_classes: int) -> nn.Module:
    """A linear head, or the identity for no classes."""
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()

"""The interface that every model has. It is timm's, so that models of either library can be used in the same code.

Shapes: B batch, I channels of the image, H W height and width of the image or of a feature map, C channels, K classes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.errors import ModelError
from vitrail.layers.block import init_linear
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, SwinConfig


class ImageModel(nn.Module):
    """Images B I H W to logits B K, or to features B num_features if num_classes is 0."""

    config: ModelConfig
    num_features: int  # width of the head's input
    num_classes: int
    head_names: tuple[str, ...]  # modules from features to logits
    num_stages: int  # number of feature maps that `forward_intermediates` can return
    grad_checkpointing: bool = False

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last feature map, normalised and not pooled: B N C, B H W C or B C H W, as in timm."""
        for output, features in self.forward_stages(x, norm=False):
            x = features
            del output  # frees its memory while the next stage runs
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the output of `forward_features`, and apply the head unless `pre_logits`: B num_features or B K."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))

    def forward_pre_logits(self, x: Tensor) -> Tensor:
        """Images to the input of the head, B num_features, without computing what it does not need."""
        return self.forward_head(self.forward_features(x), pre_logits=True)

    def forward_stages(self, x: Tensor, norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Images to, for each stage, its output (with the final norm if `norm`, where it applies) and the features:
        what `forward_intermediates` returns as such when this stage is the last one computed."""
        raise NotImplementedError

    def run_stages(
        self, x: Tensor, indices: int | Sequence[int] | None, norm: bool, stop_early: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The features, and the outputs of the chosen stages; see `forward_intermediates`."""
        chosen, outputs = choose_stages(self.num_stages, indices), []
        for index, (output, features) in enumerate(self.forward_stages(x, norm)):
            if index in chosen:
                outputs.append(output)
            x = features
            if stop_early and index == max(chosen):
                break
        return x, outputs

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The feature maps of chosen stages, like timm's method of the same name.

        Args:
            x: images B I H W.
            indices: an int n for the last n stages, a list for these stages (-1 is the last), None for all.
            norm: apply the final norm to the map of the last stage, if the architecture has one.
            stop_early: compute nothing after the last chosen stage.
            output_fmt: "NCHW".
            intermediates_only: return only the list.

        Returns:
            (features, list of B C H W), with features as from `forward_features`; or the list.

        Raises:
            ModelError: an index out of range, or an unsupported output_fmt.
        """
        if output_fmt != "NCHW":
            raise ModelError(f"output_fmt={output_fmt!r}: {type(self).__name__} supports only 'NCHW'")
        features, maps = self.run_stages(x, indices, norm, stop_early)
        maps = [feature_map.contiguous() for feature_map in maps]
        return maps if intermediates_only else (features, maps)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a newly initialised one for `num_classes`, or by the identity for 0."""
        self.num_classes = num_classes
        for name in self.head_names:
            head = head_layer(self.num_features, num_classes).to(next(self.parameters()))
            self.set_submodule(name, head.apply(init_linear))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, in addition to biases and norms, which never have any."""
        return set()

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter by name, for layer-wise learning rate decay: 0 for the stem, 1 for the first block
        and so on, and the largest for the head. A downsampling layer belongs to the block after it."""
        return {name: self.layer_id(name.split(".")) for name, _ in self.named_parameters()}

    def layer_id(self, path: list[str]) -> int:
        """The depth of one parameter; path: the parts of its name."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations: less memory, more time."""
        self.grad_checkpointing = enable

    def run_block(self, block: nn.Module, *args: Any) -> Tensor:
        """Call `block`, with gradient checkpointing if enabled."""
        if self.grad_checkpointing and self.training:
            out: Tensor = checkpoint(block, *args, use_reentrant=False)
        else:
            out = block(*args)
        return out


class Stage(nn.Module):
    """A stage of a hierarchical model: a downsampling layer (the identity in the first stage), then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Iterator[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, run_block: Callable[..., Tensor]) -> Tensor:
        """run_block: `ImageModel.run_block` of the model."""
        x = self.downsample(x)
        for block in self.blocks:
            x = run_block(block, x)
        return x


class PoolHead(nn.Module):
    """Average pooling of a feature map over `axes`, norm, dropout, and a linear layer (`fc`): B num_features or B K."""

    def __init__(self, axes: tuple[int, int], norm: nn.Module, drop: float, fc: nn.Module) -> None:
        super().__init__()
        self.axes = axes
        self.norm = norm
        self.drop = nn.Dropout(drop)
        self.fc = fc

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.norm(x.mean(dim=self.axes)))
        logits: Tensor = x if pre_logits else self.fc(x)
        return logits


class StagedModel(ImageModel):
    """A hierarchical model: a stem, a sequence of `Stage`s, perhaps a norm, and a `PoolHead`."""

    config: SwinConfig | ConvNeXtConfig
    head_names = ("head.fc",)
    head: PoolHead

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        logits: Tensor = self.head(x, pre_logits)
        return logits

    def layer_id(self, path: list[str]) -> int:
        depths = self.config.depths
        match path:
            case ["stem" | "patch_embed", *_]:
                return 0
            case ["stages" | "layers", stage, "blocks", block, *_]:
                return 1 + sum(depths[: int(stage)]) + int(block)
            case ["stages" | "layers", stage, "downsample", *_]:
                return 1 + sum(depths[: int(stage)])
        return 1 + sum(depths)


def choose_stages(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """The stages, 0 to `count` - 1, that `indices` selects: the last n for an int, all for None.

    Raises:
        ModelError: an index out of range, or none selected.
    """
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        chosen = list(range(count - last, count)) if 0 < last <= count else []
    else:
        chosen = [index + count if index < 0 else index for index in indices]
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise ModelError(f"indices={indices} is out of range: give 1 to {count}, or a list of 0 to {count - 1}")
    return chosen


def head_layer(num_features: int, num_classes: int) -> nn.Module:
    """A linear layer, or the identity for 0 classes."""
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()

"""The interface that every model has. It is timm's, so that models of either library can be used in the same code.

Shapes: B batch, I channels of the image, H W height and width of the image or of a feature map, C channels, K classes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.errors import ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.layers.block import init_linear
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, SwinConfig
from vitrail.models.timm_compat import feature_info, global_pool, group_matcher, pretrained_cfg


class ImageModel(nn.Module):
    """Images B I H W to logits B K, or to features B num_features if num_classes is 0."""

    config: ModelConfig
    num_features: int  # width of the head's input
    num_classes: int
    head_names: tuple[str, ...]  # modules from features to logits
    num_stages: int  # number of feature maps that `forward_intermediates` can return
    grad_checkpointing: bool = False
    preprocess: Preprocess | None = None  # with which its weights were trained, if known
    unpooled: bool = False  # `forward` returns the feature map: reset_classifier(0, "")
    pruned: bool = False  # the config then has more layers than the model

    @property
    def head_hidden_size(self) -> int:
        """Width of the head's input; timm's other name of `num_features`."""
        return self.num_features

    @property
    def global_pool(self) -> str:
        """ "token" or "avg"; "" for none."""
        return "" if self.unpooled else global_pool(self.config)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Of each map of `forward_intermediates`: its channels ("num_chs"), stride ("reduction") and "module"."""
        return feature_info(self.config)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's record of the preprocessing; ImageNet's at the model's size if that of the weights is unknown."""
        size, channels = self.config.img_size, self.config.in_chans
        return pretrained_cfg(self.config, self.preprocess or Preprocess(size=size).with_channels(channels))

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's other name of `pretrained_cfg`."""
        return self.pretrained_cfg

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
        output_dict: bool = False,
    ) -> Any:
        """The feature maps of chosen stages, like timm's method of the same name.

        Args:
            x: images B I H W.
            indices: an int n for the last n stages, a list for these stages (-1 is the last), None for all.
            norm: apply the final norm to the map of the last stage, if the architecture has one.
            stop_early: compute nothing after the last chosen stage.
            output_fmt: "NCHW".
            intermediates_only: return only the list.
            output_dict: return a dict of "image_features" and "image_intermediates", without the features if
                `intermediates_only`.

        Returns:
            (features, list of B C H W), with features as from `forward_features`; or the list, or the dict.

        Raises:
            ModelError: an index out of range, or an unsupported output_fmt.
        """
        if output_fmt != "NCHW":
            raise ModelError(f"output_fmt={output_fmt!r}: {type(self).__name__} supports only 'NCHW'")
        features, maps = self.run_stages(x, indices, norm, stop_early)
        maps = [feature_map.contiguous() for feature_map in maps]
        if output_dict:
            return {"image_intermediates": maps} | ({} if intermediates_only else {"image_features": features})
        return maps if intermediates_only else (features, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen maps of `forward_intermediates` do not need; returns their indices.

        prune_norm: the final norm too. prune_head: the head too; it is always removed with the layers that it reads.
        """
        chosen = choose_stages(self.num_stages, indices)
        self.pruned = True
        self.keep_stages(max(chosen) + 1, prune_norm, prune_head)
        return chosen

    def keep_stages(self, count: int, prune_norm: bool, prune_head: bool) -> None:
        """Keep the first `count` stages; see `prune_intermediate_layers`."""
        raise NotImplementedError

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the size of the images that the model is made for, in pixels. The patch size cannot be changed.

        Raises:
            ModelError: the model cannot have this size.
        """
        own = getattr(self.config, "patch_size", None)
        if patch_size not in (None, own, (own, own)):
            raise ModelError(f"the patch size of {type(self).__name__} cannot be changed: it stays {own}")
        if img_size is None:
            return
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        try:
            config = dataclasses.replace(self.config, img_size=size)
            self.resize_to(config)
        except ValueError as error:
            raise ModelError(f"{type(self).__name__} cannot have the input size {img_size}: {error}") from None
        self.config = config
        if self.preprocess is not None:
            self.preprocess = self.preprocess.replace(size=config.img_size)

    def resize_to(self, config: Any) -> None:
        """Change what depends on the size of the image; nothing in a CNN. Raises ValueError."""

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The head; of a model with two heads, both."""
        heads = tuple(self.get_submodule(name) for name in self.head_names)
        return heads[0] if len(heads) == 1 else heads

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a newly initialised one for `num_classes`, or by the identity for 0.

        global_pool: how features are pooled: "avg", of a ViT also "token", or with 0 classes "" for not at all; None:
        as before.

        Raises:
            ModelError: the model cannot pool so.
        """
        if global_pool is not None:
            self.set_pool(global_pool, num_classes)
        self.num_classes = num_classes
        for name in self.head_names:
            head = head_layer(self.num_features, num_classes).to(next(self.parameters()))
            self.set_submodule(name, head.apply(init_linear))

    def set_pool(self, pool: str, num_classes: int) -> None:
        """See `reset_classifier`."""
        if pool not in ("", global_pool(self.config)):
            raise ModelError(f"{type(self).__name__} cannot pool by {pool!r}: give {global_pool(self.config)!r} or ''")
        if pool == "" and num_classes:
            raise ModelError(f"a head of {num_classes} classes needs pooled features: global_pool='' needs 0 classes")
        self.unpooled = pool == ""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names by which timm groups parameters by depth; coarse: by stage, not by block."""
        return group_matcher(self.config, coarse)

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

    def without_pooling(self, x: Tensor) -> Tensor:
        """Norm and dropout of the whole feature map."""
        channels = ({1, 2, 3} - set(self.axes)).pop()
        dropped: Tensor = self.drop(self.norm(x.movedim(channels, -1)).movedim(-1, channels))
        return dropped


class StagedModel(ImageModel):
    """A hierarchical model: a stem, a sequence of `Stage`s, perhaps a norm, and a `PoolHead`."""

    config: SwinConfig | ConvNeXtConfig
    head_names = ("head.fc",)
    head: PoolHead

    stage_list: str  # name of the module that has the stages

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        logits: Tensor = self.head.without_pooling(x) if self.unpooled else self.head(x, pre_logits)
        return logits

    def keep_stages(self, count: int, prune_norm: bool, prune_head: bool) -> None:
        shorter = count < self.num_stages
        if hasattr(self, "norm") and (shorter or prune_norm):
            self.set_submodule("norm", nn.Identity())  # of the last stage alone
        if shorter:
            self.set_submodule(self.stage_list, self.get_submodule(self.stage_list)[:count])  # type: ignore[index]
            self.num_stages = count
            self.num_features = self.feature_info[count - 1]["num_chs"]
        if shorter or prune_head:
            self.head.norm = nn.Identity()
            self.reset_classifier(0, "")

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

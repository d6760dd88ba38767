"""Which model and which settings, when nobody names them: two tables, and the reason in a line.

Importing this imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What a choice goes by: training images, their median height and width, and how it starts."""

    images: int
    size: tuple[int, int]
    uniform: bool  # whether all images have this size
    pretrained: bool  # whether the model starts from weights, of any source

    @property
    def side(self) -> int:
        """The longer side, pixels."""
        return max(self.size)


@dataclass(frozen=True)
class ModelRow:
    """A model for images up to `up_to` pixels a side.

    It sees images in their own size, rounded up to a multiple of `multiple`, and at most `at_most` pixels a side; with
    neither, in the size that it is made for.
    """

    up_to: float
    pretrained: bool
    model: str
    why: str
    multiple: int = 0
    at_most: int = 0

    def img_size(self, size: tuple[int, int], uniform: bool) -> tuple[int, int] | None:
        """Height and width that the model sees; None for its own."""
        if not self.multiple:
            return None
        if not uniform or max(size) > self.at_most:
            return self.at_most, self.at_most
        height, width = (-(-side // self.multiple) * self.multiple for side in size)
        return height, width


@dataclass(frozen=True)
class RecipeRow:
    """Settings for images up to `up_to` pixels a side.

    epochs: such that about `seen` images are learnt from in all, but within `epochs` (fewest, most).
    """

    up_to: float
    pretrained: bool
    name: str
    seen: float
    epochs: tuple[int, int]
    warmup: float
    settings: dict[str, Any] = field(default_factory=dict)


_EVER = float("inf")

_STEM = "a ViT with a convolutional stem, made for small images"

MODELS = (
    ModelRow(12, False, "vit_nano_patch2_8", _STEM, multiple=2, at_most=12),
    ModelRow(20, False, "vit_nano_patch2_16", _STEM, multiple=2, at_most=20),
    ModelRow(32, False, "vit_micro_patch8_32", _STEM, multiple=8, at_most=32),
    ModelRow(48, False, "vit_mini_patch4_32", _STEM, multiple=4, at_most=48),
    ModelRow(_EVER, False, "vit_small_patch8_64", f"{_STEM}; --pretrained would learn more", multiple=8, at_most=64),
    ModelRow(_EVER, True, "deit_small_patch16_224", "a strong model of moderate cost to fine-tune"),
)

_SMALL = {
    "lr": 2e-3,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
    "ema": 0.99,
}
_COLOUR = {"brightness": 0.2, "contrast": 0.2}

RECIPES = (
    RecipeRow(
        12,
        False,
        "tiny images from scratch",
        7.1e4,
        (20, 60),
        2,
        {**_SMALL, "lr": 5e-3, "batch_size": 128, "rotate": 12.0, "shear": 6.0, "shift": 0.12, "zoom": (0.88, 1.13)},
    ),
    RecipeRow(
        64,
        False,
        "small images from scratch",
        6e5,
        (10, 100),
        1,
        {**_SMALL, "batch_size": 128, "pad_shift": 2, "flip": 0.5},
    ),
    RecipeRow(
        _EVER,
        False,
        "photographs from scratch",
        1e6,
        (10, 200),
        5,
        {**_SMALL, "batch_size": 64, "lr": 1e-3, "crop_scale": (0.35, 1.0), "flip": 0.5, **_COLOUR, "mixup": 0.2},
    ),
    RecipeRow(
        _EVER,
        True,
        "fine-tuning",
        3e4,
        (3, 30),
        1,
        {
            "batch_size": 32,
            "lr": 3e-4,
            "layer_decay": 0.75,
            "weight_decay": 0.05,
            "clip_grad": 1.0,
            "label_smoothing": 0.1,
            "crop_scale": (0.5, 1.0),
            "flip": 0.5,
            **_COLOUR,
            "drop_path": 0.1,
        },
    ),
)


@dataclass(frozen=True)
class Choice:
    """Values by config key for what was not given, and a line for each decision."""

    values: dict[str, Any]
    reasons: list[str]


def choose(facts: Facts, given: Mapping[str, Any]) -> Choice:
    """A model and settings for images like these. What `given` names is not touched, and the rest fits to it."""
    values: dict[str, Any] = {}
    reasons = []
    if "model" not in given:
        row = next(r for r in MODELS if facts.side <= r.up_to and facts.pretrained == r.pretrained)
        values["model"] = row.model
        values["img_size"] = row.img_size(facts.size, facts.uniform)
        height, width = facts.size
        reasons.append(f"model {row.model}: the images are {height}x{width} px, and this is {row.why}")
    # A size that was asked for says what kind of training this is; a model's own size says nothing of the images.
    side = max(given.get("img_size") or values.get("img_size") or facts.size)
    recipe = next(r for r in RECIPES if side <= r.up_to and facts.pretrained == r.pretrained)
    values |= recipe.settings
    values["batch_size"] = batch = given.get("batch_size") or _batch_size(recipe.settings["batch_size"], facts.images)
    # Adam's rate goes with the root of the batch (Malladi et al., 2022, https://arxiv.org/abs/2205.10287).
    values["lr"] = float(f"{recipe.settings['lr'] * (batch / recipe.settings['batch_size']) ** 0.5:.3g}")
    epochs = given.get("epochs")
    if epochs is None and not given.get("budget"):
        fewest, most = recipe.epochs
        epochs = values["epochs"] = float(max(fewest, min(most, round(recipe.seen / facts.images))))
    values["warmup_epochs"] = recipe.warmup if epochs is None else min(recipe.warmup, round(epochs / 10, 3))
    length = "as long as the budget lasts" if epochs is None else f"{epochs:g} epochs"
    reasons.append(f"settings for {recipe.name}: {length} of {facts.images:,} images in batches of {batch}")
    return Choice({key: value for key, value in values.items() if key not in given}, reasons)


def _batch_size(usual: int, images: int) -> int:
    """The usual one; of few images a power of two such that an epoch has about eight steps."""
    fitting = 2 ** max(3, (images // 8).bit_length() - 1)
    return int(min(usual, fitting, images))

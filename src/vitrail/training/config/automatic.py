"""Which model and which recipe, when nobody names them: two tables, and the reason in a line.

Importing this imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitrail.models.catalog import VARIANTS
from vitrail.training.config.recipes import Recipe, named_recipe, rates_for
from vitrail.training.config.schema import Use, keys_for


@dataclass(frozen=True)
class DatasetStats:
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
    """A recipe for images up to `up_to` pixels a side, at least `at_least` of them, and models of some families.

    families: none for any. epochs: such that about `seen` images are learnt from in all, but within `epochs` (fewest,
    most). when: what all this is, in words.
    """

    recipe: str
    when: str
    seen: float
    epochs: tuple[int, int]
    up_to: float = float("inf")
    at_least: int = 0
    families: tuple[str, ...] = ()
    pretrained: bool = False

    def suits(self, facts: DatasetStats, side: int, family: str) -> bool:
        """Whether this is the recipe for a model of a family that sees images of so many pixels a side."""
        return (
            facts.pretrained == self.pretrained
            and side <= self.up_to
            and facts.images >= self.at_least
            and (not self.families or family in self.families)
        )


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

_MANY = 100_000  # images from which on a paper's recipe for ImageNet is worth its time
_IMAGENET = 3.8e8  # 300 epochs of it

# The first that suits.
RECIPES = (
    RecipeRow("finetune", "fine-tuning", 3e4, (3, 30), pretrained=True),
    RecipeRow("tiny", "tiny images from scratch", 7.1e4, (20, 60), up_to=12),
    RecipeRow("small", "small images from scratch", 6e5, (10, 100), up_to=64),
    RecipeRow("resnet-a2", "a CNN from scratch", _IMAGENET, (100, 300), families=("resnet", "convnext")),
    RecipeRow("swin", "a Swin from scratch on many images", _IMAGENET, (100, 300), at_least=_MANY, families=("swin",)),
    RecipeRow("augreg", "a ViT from scratch on millions of images", _IMAGENET, (10, 90), at_least=5 * 10**6),
    RecipeRow("deit", "a ViT from scratch on many images", _IMAGENET, (100, 300), at_least=_MANY),
    RecipeRow("photos", "photographs from scratch", 1e6, (10, 200)),
)


@dataclass(frozen=True)
class Choice:
    """Values by config key for what was not given, and a line for each decision."""

    values: dict[str, Any]
    reasons: list[str]


def choose(facts: DatasetStats, given: Mapping[str, Any], recipe: Recipe | None = None) -> Choice:
    """A model and settings for images like these. What `given` names is not touched, and the rest fits to it.

    recipe: one that was asked for. A whole one stands for all settings that would be chosen.
    """
    values: dict[str, Any] = {}
    reasons = []
    if "model" not in given:
        own = next(r for r in MODELS if facts.side <= r.up_to and facts.pretrained == r.pretrained)
        values["model"] = own.model
        values["img_size"] = own.img_size(facts.size, facts.uniform)
        height, width = facts.size
        reasons.append(f"model {own.model}: the images are {height}x{width} px, and this is {own.why}")
    # A size that was asked for says what kind of training this is; a model's own size says nothing of the images.
    side = max(given.get("img_size") or values.get("img_size") or facts.size)
    name = given.get("model", values.get("model"))
    row = next(row for row in RECIPES if row.suits(facts, side, VARIANTS[name].family if name in VARIANTS else ""))
    whole = recipe is not None and recipe.whole
    settings = ({} if whole else dict(named_recipe(row.recipe).settings)) | (recipe.flexible if recipe else {})
    if name not in VARIANTS:
        settings = {key: value for key, value in settings.items() if key not in keys_for(Use.BUILD)}
    usual, epochs = settings["batch_size"], given.get("epochs")
    keeps = recipe is not None and recipe.keeps_batch
    batch = given.get("batch_size") or (usual if keeps else limit_batch_size(usual, facts.images))
    own_epochs = settings.pop("epochs")
    values |= {"recipe": row.recipe} | settings | {"batch_size": batch} | rates_for(batch, settings)
    if epochs is None and not given.get("budget"):
        fewest, most = row.epochs
        epochs = own_epochs if whole else float(max(fewest, min(most, round(row.seen / facts.images))))
        values["epochs"] = epochs
    if epochs not in (None, own_epochs):
        values["warmup_epochs"] = min(settings["warmup_epochs"], round(epochs / 10, 3))
    length = "as long as the budget lasts" if epochs is None else f"{epochs:g} epochs"
    origin = f"{row.recipe}, for {row.when}{f', and {recipe.name}' if recipe else ''}"
    if recipe is not None and whole:
        origin = recipe.name
    line = f"recipe {origin}: {length} of {facts.images:,} images in batches of {batch}"
    if batch != usual and "lr" not in given:
        line += f", lr {values['lr']:g} ({settings['lr']:g} is for {usual}; it goes with the root)"
    reasons.append(line)
    return Choice({key: value for key, value in values.items() if key not in given}, reasons)


def limit_batch_size(usual: int, images: int) -> int:
    """The usual batch size, lowered for few images to a power of two that gives about eight steps per epoch."""
    largest = 2 ** max(3, (images // 8).bit_length() - 1)
    return int(min(usual, largest, images))

"""The automatic choice of model and recipe: two tables, and a line with the reason.

`vitrail train` without --model takes the first of `candidates`; `vitrail recommend` takes the first that is within its
limits. Importing this imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vitrail.models.catalog import VARIANTS
from vitrail.training.config.recipes import Recipe, named_recipe, rates_for
from vitrail.training.config.schema import Use, keys_for
from vitrail.utils.text import counted


@dataclass(frozen=True)
class DatasetStats:
    """What the choice depends on: number of training images, median height and width, and pretraining."""

    images: int
    size: tuple[int, int]
    uniform: bool  # whether all images have this size
    pretrained: bool  # whether training starts from weights

    @property
    def side(self) -> int:
        """The longer side, pixels."""
        return max(self.size)


@dataclass(frozen=True)
class ModelRow:
    """A model for images of at most `max_side` pixels a side.

    Its input size is that of the images, rounded up to a multiple of `multiple`, at most `max_input` pixels a side;
    with multiple = 0, the model's default.
    """

    max_side: float
    pretrained: bool
    model: str
    why: str
    multiple: int = 0
    max_input: int = 0

    def img_size(self, size: tuple[int, int], uniform: bool) -> tuple[int, int] | None:
        """Input height and width; None for the model's default."""
        if not self.multiple:
            return None
        if not uniform or max(size) > self.max_input:
            return self.max_input, self.max_input
        height, width = (-(-side // self.multiple) * self.multiple for side in size)
        return height, width


@dataclass(frozen=True)
class RecipeRow:
    """A recipe for at least `min_images` images of at most `max_side` pixels a side, and models of some families.

    families: empty for any. Epochs are chosen such that about `samples` images are processed in total, within `epochs`
    (min, max). task: a description.
    """

    recipe: str
    task: str
    samples: float
    epochs: tuple[int, int]
    max_side: float = float("inf")
    min_images: int = 0
    families: tuple[str, ...] = ()
    pretrained: bool = False

    def matches(self, stats: DatasetStats, side: int, family: str) -> bool:
        """Whether this recipe applies to a model of a family with an input of `side` pixels a side."""
        return (
            stats.pretrained == self.pretrained
            and side <= self.max_side
            and stats.images >= self.min_images
            and (not self.families or family in self.families)
        )


_ANY = float("inf")  # pixels

_STEM = "a ViT with a convolutional stem, made for small images"

MODELS = (
    ModelRow(12, False, "vit_nano_patch2_8", _STEM, multiple=2, max_input=12),
    ModelRow(20, False, "vit_nano_patch2_16", _STEM, multiple=2, max_input=20),
    ModelRow(32, False, "vit_micro_patch8_32", _STEM, multiple=8, max_input=32),
    ModelRow(48, False, "vit_mini_patch4_32", _STEM, multiple=4, max_input=48),
    ModelRow(_ANY, False, "vit_small_patch8_64", f"{_STEM}; --pretrained may be better", multiple=8, max_input=64),
    ModelRow(_ANY, True, "deit_small_patch16_224", "accurate, at moderate cost"),
)

_SMALL = 64  # largest side, pixels, of images that are trained from scratch although there are published weights
# Models with published weights beside that of MODELS, of 224 pixels: ViTs of three sizes, Swin, and two CNNs.
_PUBLISHED = (
    "vit_base_patch16_224",
    "vit_small_patch16_224",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "resnet50",
)
_CNN = ModelRow(_ANY, False, "resnet20_32", "a small CNN", multiple=1, max_input=64)
_TOKENS = (16, 256)  # of a ViT from scratch, fewest and most

_MANY = 100_000  # images from which on a paper's recipe for ImageNet is used
_IMAGENET = 3.8e8  # samples: 300 epochs of ImageNet-1k

# The first that matches is used.
RECIPES = (
    RecipeRow("finetune", "fine-tuning", 3e4, (3, 30), pretrained=True),
    RecipeRow("tiny-vit", "a ViT on tiny images", 3.4e4, (12, 40), max_side=12, families=("vit", "deit")),
    RecipeRow("tiny", "tiny images from scratch", 7.1e4, (20, 60), max_side=12),
    RecipeRow("small", "small images from scratch", 6e5, (10, 100), max_side=64),
    RecipeRow("resnet-a2", "a CNN from scratch", _IMAGENET, (100, 300), families=("resnet", "convnext")),
    RecipeRow("swin", "Swin from scratch on many images", _IMAGENET, (100, 300), min_images=_MANY, families=("swin",)),
    RecipeRow("augreg", "a ViT from scratch on millions of images", _IMAGENET, (10, 90), min_images=5 * 10**6),
    RecipeRow("deit", "a ViT from scratch on many images", _IMAGENET, (100, 300), min_images=_MANY),
    RecipeRow("photos", "photographs from scratch", 1e6, (10, 200)),
)


@dataclass(frozen=True)
class Choice:
    """Values by config key for what was not given, and a line per decision."""

    values: dict[str, Any]
    reasons: list[str]


@dataclass(frozen=True)
class Candidate:
    """A model for a dataset. size: height and width of its input. img_size: the same, or None for the model's own.

    pretrained: whether it starts from the default published weights. why: a phrase.
    """

    model: str
    img_size: tuple[int, int] | None
    pretrained: bool
    why: str

    @property
    def size(self) -> tuple[int, int]:
        return self.img_size or VARIANTS[self.model].config.img_size

    @property
    def gmacs(self) -> float:
        """Estimated 1e9 multiply-accumulate operations per image, taken as proportional to the input's area."""
        row = VARIANTS[self.model]
        (height, width), (own_height, own_width) = self.size, row.config.img_size
        return row.gmacs * height * width / (own_height * own_width)

    @property
    def top1(self) -> float | None:
        """The published accuracy of its weights on ImageNet, percent; None from scratch or if not published."""
        return VARIANTS[self.model].weights[0].top1 if self.pretrained else None


def weights_advised(size: tuple[int, int]) -> bool:
    """Whether training on images of this median height and width should start from published weights."""
    return max(size) > _SMALL


def candidates(stats: DatasetStats) -> tuple[Candidate, ...]:
    """Models for these images, the preferred first; that is what is chosen automatically.

    Large images have candidates with published weights and others from scratch; `stats.pretrained` decides which come
    first. After the first, those with weights are in order of published top-1, those from scratch of decreasing cost.
    """
    scratch = _from_scratch(stats)
    if not stats.pretrained and not weights_advised(stats.size):
        return scratch
    row = _default_row(stats, pretrained=True)
    others = (Candidate(name, None, True, "with published weights") for name in _PUBLISHED)
    ranked = sorted(others, key=lambda candidate: (-(candidate.top1 or 0.0), -candidate.gmacs))
    weights = (Candidate(row.model, None, True, row.why), *ranked)
    return (*weights, *scratch) if stats.pretrained else (scratch[0], *weights, *scratch[1:])


def _default_row(stats: DatasetStats, pretrained: bool) -> ModelRow:
    return next(row for row in MODELS if stats.side <= row.max_side and row.pretrained == pretrained)


def _from_scratch(stats: DatasetStats) -> tuple[Candidate, ...]:
    """The model of MODELS for these images, and the others at about its input size."""
    first = _default_row(stats, pretrained=False)
    size = first.img_size(stats.size, stats.uniform)
    assert size is not None
    others: list[Candidate] = []
    # Variants may differ in their default size alone.
    configs = {replace(VARIANTS[first.model].config, img_size=size)}
    for row in (_CNN, *(row for row in reversed(MODELS) if not row.pretrained)):
        height, width = (-(-side // row.multiple) * row.multiple for side in size)
        config = replace(VARIANTS[row.model].config, img_size=(height, width))
        tokens = height * width // row.multiple**2
        if config not in configs and (row is _CNN or _TOKENS[0] <= tokens <= _TOKENS[1]):
            others.append(Candidate(row.model, (height, width), False, "from scratch"))
            configs.add(config)
    others.sort(key=lambda candidate: -candidate.gmacs)
    return (Candidate(first.model, size, False, first.why), *others)


def choose(stats: DatasetStats, given: Mapping[str, Any], recipe: Recipe | None = None) -> Choice:
    """A model and settings for these images, consistent with the `given` settings, which are kept.

    recipe: the requested one. A complete one replaces all settings that would be chosen.
    """
    values: dict[str, Any] = {}
    reasons = []
    if "model" not in given:
        chosen = candidates(stats)[0]
        values |= {"model": chosen.model, "img_size": chosen.img_size}
        height, width = stats.size
        reasons.append(f"model {chosen.model} for images of {height}x{width} px: {chosen.why}")
    # The given input size decides; a model's default size is unrelated to the images.
    side = max(given.get("img_size") or values.get("img_size") or stats.size)
    name = given.get("model", values.get("model"))
    family = VARIANTS[name].family if name in VARIANTS else ""
    row = next(row for row in RECIPES if row.matches(stats, side, family) and _suits(row, given))
    complete = recipe is not None and recipe.complete
    settings = ({} if complete else dict(named_recipe(row.recipe).settings)) | (recipe.flexible if recipe else {})
    if name not in VARIANTS:
        settings = {key: value for key, value in settings.items() if key not in keys_for(Use.BUILD)}
    usual, epochs = settings["batch_size"], given.get("epochs")
    keep = recipe is not None and recipe.keeps_batch_size
    batch = given.get("batch_size") or (usual if keep else limit_batch_size(usual, stats.images))
    recipe_epochs = settings.pop("epochs")
    values |= {"recipe": row.recipe} | settings | {"batch_size": batch} | rates_for(batch, settings)
    if epochs is None and not given.get("budget"):
        shortest, longest = row.epochs
        epochs = recipe_epochs if complete else float(max(shortest, min(longest, round(row.samples / stats.images))))
        values["epochs"] = epochs
    if epochs not in (None, recipe_epochs):
        values["warmup_epochs"] = min(settings["warmup_epochs"], round(epochs / 10, 3))
    length = "as many epochs as the budget allows" if epochs is None else counted(epochs, "epoch")
    origin = f"{row.recipe}, for {row.task}{f', and {recipe.name}' if recipe else ''}"
    if recipe is not None and complete:
        origin = recipe.name
    line = f"recipe {origin}: {length} of {counted(stats.images, 'image')} in batches of {batch}"
    if batch != usual and "lr" not in given:
        line += f", lr {values['lr']:g} ({settings['lr']:g} at {usual}: square-root scaling)"
    reasons.append(line)
    return Choice({key: value for key, value in values.items() if key not in given}, reasons)


def _suits(row: RecipeRow, given: Mapping[str, Any]) -> bool:
    """Whether a recipe for one optimizer is for the given one. Most are for AdamW, and so for Muon too."""
    own = named_recipe(row.recipe).settings.get("optimizer")
    return own is None or given.get("optimizer", own) == own


def limit_batch_size(usual: int, images: int) -> int:
    """The usual batch size, lowered for few images to a power of two that gives about eight steps per epoch."""
    largest = 2 ** max(3, (images // 8).bit_length() - 1)
    return int(min(usual, largest, images))

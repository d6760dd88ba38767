"""The configuration of a run: one schema in sections, each setting with its type, range, default and meaning.

A key names one setting, whatever its section: `lr=1e-3` on the command line and in Python, `[optimizer] lr = 1e-3` in
TOML, `config.optimizer.lr` in code. Values are checked once, by `make_config`; the config remembers which of them were
given.

Importing this imports no torch.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from vitrail.data.augment.settings import Augment
from vitrail.errors import ConfigError, did_you_mean
from vitrail.training.config.aliases import by_key, key_of
from vitrail.training.config.values import Auto, BatchSize, CacheSize, Threads, TrackerNames
from vitrail.utils.settings import (
    MAX_SEED,
    Amount,
    Count,
    Merge,
    Optional,
    Pair,
    PathText,
    Positive,
    Rate,
    Seconds,
    Settings,
    Share,
    Size,
)
from vitrail.utils.text import one_line, printable

_MAX_BYTES = 32 << 10  # of a config file; a complete one has 8 KiB, and dotted keys are parsed in quadratic time


class Use(Enum):
    """What a setting is for besides training; part of the annotation of a field or a section."""

    RESUME = auto()  # may change when a run is resumed
    PROBE = auto()  # used by a linear probe
    VIEWS = auto()  # decides what the model sees in a step, and so what a teacher's cached logits belong to
    RATE = auto()  # a learning rate, which follows the batch size
    HELD_OUT = auto()  # decides which images are held out for validation and test
    BUILD = auto()  # an option of create_model, where its name ends with _rate


class DataSettings(Settings):
    """Images and their split."""

    data: str = Field(
        "", description="a folder of images, a CSV or parquet table, a dataset's name, wds: shards or an hf-dataset:"
    )
    data_dir: Annotated[PathText, Use.RESUME] = Field(None, description="folder of a named dataset's files")
    val_fraction: Annotated[float, Use.HELD_OUT] = Field(
        0.1, gt=0, lt=1, description="share of the training images used for validation if the data has no val split"
    )
    test_fraction: Annotated[float, Use.HELD_OUT] = Field(
        0.1, ge=0, lt=1, description="share of the images used for testing if a folder has no test split"
    )
    split_seed: Annotated[int, Use.HELD_OUT] = Field(0, ge=0, le=MAX_SEED, description="seed of that split")
    group_duplicates: Annotated[bool, Use.HELD_OUT] = Field(
        False, description="keep near duplicates on one side of the split; reads every image first"
    )


class ModelSettings(Settings):
    """Architecture, initial weights and input."""

    model: str = Field("", description="a name from `vitrail models`")
    pretrained: Annotated[bool | None, Auto] = Field(None, description="use published weights: true, false or auto")
    weights: PathText = Field(None, description="start from these weights: a file, a folder or hf:org/repo")
    probe: bool = Field(False, description="linear probe: freeze the model and fit a linear head to its features")
    img_size: Size = Field(None, description="input height and width, pixels; none: the model's own")
    fit: Literal["auto", "crop", "pad", "squash"] = Field(
        "auto",
        description="how an image of another aspect ratio is fitted; auto: as the weights ask, else crop",
    )
    in_chans: Annotated[Literal[1, 3] | None, Optional] = Field(
        None, description="input channels, 1 or 3; none: those of the weights, else of the images"
    )
    merge: Merge = Field(
        None, description="ViT: tokens merged per block (8, or 8,4,0 by block), or a share (0.3); none: the model's own"
    )


class OptimizerSettings(Settings):
    """Optimizer and learning rate."""

    optimizer: Literal["adamw", "sgd", "lamb", "muon"] = Field(
        "adamw",
        description="sgd and lamb need an lr of their own; muon is for training from scratch: docs/optimizers.md",
    )
    lr: Annotated[Positive, Use.RATE] = Field(1e-3, description="peak learning rate")
    backbone_lr: Annotated[Positive | None, Optional, Use.RATE] = Field(
        None, description="peak learning rate of all layers but the head; none: lr"
    )
    head_lr: Annotated[Positive | None, Optional, Use.RATE] = Field(
        None, description="peak learning rate of the head; none: lr"
    )
    layer_decay: float = Field(1.0, gt=0, le=1, description="factor on the learning rate per layer from the head down")
    weight_decay: Amount = Field(0.05, description="not applied to biases, norms, tokens and position embeddings")
    betas: Annotated[tuple[Rate, Rate], Pair] = Field((0.9, 0.999), description="decay of the two moment estimates")
    momentum: Annotated[Rate | None, Optional] = Field(None, description="of sgd and muon; none: 0.9 and 0.95")
    clip_grad: Annotated[Positive | None, Optional] = Field(None, description="largest gradient norm; none: no limit")


class ScheduleSettings(Settings):
    """Linear warm-up, then a half cosine."""

    epochs: Annotated[Amount | None, Optional] = Field(
        None, le=1e6, description="passes over the training images, fractions allowed; none: until the budget is spent"
    )
    budget: Seconds = Field(None, description="training time in seconds, or 10m, or 2h: the schedule ends with it")
    batch_size: Annotated[int, Field(ge=0, le=1_000_000), BatchSize, Use.VIEWS] = Field(
        128, description="images per step; auto, or 0: chosen for the device, and lr with it"
    )
    warmup_epochs: Amount = Field(0.0, description="epochs of linear warm-up; a budget scales it with the rest")
    min_lr: Annotated[Amount, Use.RATE] = Field(0.0, description="final learning rate where the peak is lr")
    eval_every: Count = Field(1, description="epochs between validations; the last epoch is always validated")
    patience: Annotated[Count | None, Optional, Use.RESUME] = Field(
        None, description="early stopping: epochs without a better validation after which the run ends; none: off"
    )


class RegularizeSettings(Settings):
    """Loss, dropout, class balance and weight averaging."""

    loss: Literal["ce", "bce"] = Field("ce", description="cross-entropy, or binary cross-entropy per class")
    bce_threshold: Annotated[Rate | None, Optional] = Field(
        None, description="of loss=bce: soft targets above this become 1, others 0; none: soft targets"
    )
    label_smoothing: Rate = Field(0.0, description="share of the target that is distributed over all classes")
    drop: Annotated[Rate | None, Optional, Use.BUILD] = Field(
        None, description="dropout before the head; none: the model's own"
    )
    drop_path: Annotated[Rate | None, Optional, Use.BUILD] = Field(
        None, description="stochastic depth at the last block; none: the model's own"
    )
    attn_drop: Annotated[Rate | None, Optional, Use.BUILD] = Field(
        None, description="dropout of attention weights; none: the model's own"
    )
    balance: Annotated[Literal["none", "sample", "loss"], Use.VIEWS, Use.PROBE] = Field(
        "none", description="class balance: draw every class equally often (sample), or use class weights (loss)"
    )
    ema: Rate = Field(
        0.0, description="decay of the moving average of weights, which is validated and kept; 0: no average"
    )
    ema_warmup: bool = Field(True, description="limit the decay to (1 + step) / (10 + step) in the first steps")


class DistillSettings(Settings):
    """A teacher and how its logits are used."""

    teacher: Annotated[str | None, Optional] = Field(
        None, description="a run or model folder, a catalog name, hf:, timm:, torchvision:, an .onnx file"
    )
    distill: Literal["auto", "hard", "soft"] = Field(
        "auto",
        description="the teacher's top class or its probabilities; auto: hard with a distillation token, else soft",
    )
    distill_weight: Share = Field(0.5, description="weight of the teacher's loss; the labels' has the rest")
    temperature: Positive = Field(1.0, description="temperature of soft distillation")
    teacher_outputs: Annotated[PathText, Use.RESUME] = Field(
        None, description="folder in which the teacher's logits are cached, for this run and later ones"
    )


class IOSettings(Settings):
    """Checkpoints, trackers and the image cache."""

    checkpoint_every: Annotated[int | None, Field(ge=0), Optional, Use.RESUME] = Field(
        None,
        description="steps between checkpoints; 0: by checkpoint_minutes only; none: 200, or as many more as keep the "
        "cost below 2 % of the time",
    )
    checkpoint_minutes: Annotated[Amount, Use.RESUME] = Field(
        5.0, description="minutes between checkpoints, if these pass first; 0: by checkpoint_every only"
    )
    track: Annotated[str, TrackerNames, Use.RESUME] = Field(
        "none", description="experiment trackers: tensorboard, wandb, trackio, or several with commas"
    )
    cache: Annotated[str, CacheSize, Use.VIEWS] = Field(
        "auto", description="disk cache of decoded images: auto (if it helps and fits), off, or its size, such as 20GB"
    )


class MachineSettings(Settings):
    """Device, precision, memory and threads."""

    device: Annotated[str, Use.RESUME, Use.PROBE] = Field(
        "auto", description="cpu, cuda, cuda:1, mps; auto: the best available"
    )
    amp: Annotated[Literal["auto", "bf16", "off"], Use.PROBE] = Field(
        "auto", description="mixed precision: bfloat16, off, or where the hardware supports it (auto): docs/machine.md"
    )
    accumulate: Annotated[Count, Use.VIEWS] = Field(
        1, le=1_000_000, description="gradient accumulation: parts of a batch; less memory, the same gradient"
    )
    shard: Annotated[bool, Use.RESUME] = Field(
        False, description="under torchrun, shard weights and optimiser over the processes (FSDP2)"
    )
    compile: bool = Field(False, description="torch.compile the model")
    grad_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    eval_batch_size: Annotated[Count | None, Optional, Use.RESUME, Use.PROBE] = Field(
        None, description="images per batch in evaluation; none: by image size"
    )
    workers: Annotated[int | None, Optional, Use.RESUME, Use.PROBE] = Field(
        None, ge=0, le=1024, description="threads that read images; none: by cores and data"
    )
    threads: Annotated[str, Threads, Use.PROBE] = Field(
        "auto", description="torch's threads on the CPU: a number, or the fastest by trial (auto): docs/machine.md"
    )


class TrainConfig(Settings):
    """Everything that decides a run. Two runs with the same config on the same machine end in the same weights."""

    recipe: Annotated[str | None, Optional] = Field(
        None, description="named recipe or TOML file that the settings come from; none: chosen for the images"
    )
    seed: Annotated[int, Use.PROBE, Use.VIEWS] = Field(
        0, ge=0, le=MAX_SEED, description="seed of weights, order, augmentation and dropout; not of the split"
    )
    data: Annotated[DataSettings, Use.PROBE] = DataSettings()
    model: Annotated[ModelSettings, Use.PROBE] = ModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    augment: Annotated[Augment, Use.VIEWS] = Augment()
    regularize: RegularizeSettings = RegularizeSettings()
    distill: DistillSettings = DistillSettings()
    io: IOSettings = IOSettings()
    machine: MachineSettings = MachineSettings()

    @property
    def flat(self) -> dict[str, Any]:
        """All values by key."""
        return {key: getattr(self._group(key), key) for key in KEYS}

    @property
    def given(self) -> dict[str, Any]:
        """The values that were given, by key, without defaults."""
        return {key: value for key, value in self.flat.items() if key in self._group(key).model_fields_set}

    def updated(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values, by key. They are not checked: take them from a config or a recipe."""
        update = {key: value for key, value in values.items() if key not in SECTION_OF}
        for name in SECTIONS:
            if part := {key: value for key, value in values.items() if SECTION_OF.get(key) == name}:
                update[name] = getattr(self, name).model_copy(update=part)
        return self.model_copy(update=update)

    def _group(self, key: str) -> Settings:
        return getattr(self, SECTION_OF[key]) if key in SECTION_OF else self


SECTIONS: dict[str, type[Settings]] = {
    name: field.annotation
    for name, field in TrainConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
}
SECTION_OF = {key: name for name, section in SECTIONS.items() for key in section.model_fields}
FIELDS: dict[str, FieldInfo] = {
    **{key: field for key, field in TrainConfig.model_fields.items() if key not in SECTIONS},
    **{key: field for section in SECTIONS.values() for key, field in section.model_fields.items()},
}
KEYS = tuple(FIELDS)


def keys_for(use: Use) -> tuple[str, ...]:
    """The keys whose field or section is marked with a use."""

    def marks(key: str) -> list[Any]:
        section = [] if key not in SECTION_OF else TrainConfig.model_fields[SECTION_OF[key]].metadata
        return [*FIELDS[key].metadata, *section]

    return tuple(key for key in KEYS if use in marks(key))


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """A config from values by key; strings are read by the key's type, and what is not given has its default.

    Raises:
        ConfigError: an unknown key, one that is given twice, or a value out of its range.
    """
    values = by_key(values, KEYS)
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if key in SECTION_OF:
            nested.setdefault(SECTION_OF[key], {})[key] = value
        else:
            nested[key] = value
    try:
        return TrainConfig.model_validate(nested)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = next(str(part) for part in fault["loc"] if part in values)
        about, given = FIELDS[key].description, values[key]
        reason = one_line(fault["msg"].removeprefix("Value error, ").lower())
        raise ConfigError(f"training option {key} cannot be {one_line(repr(given), 80)}: {reason} ({about})") from None


def parse_overrides(arguments: Iterable[str]) -> dict[str, str]:
    """`["lr=1e-3", "img-size=64"]` to strings by key.

    Raises:
        ConfigError: an argument without "=", an unknown key, or one that is given twice.
    """
    values: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            hint = did_you_mean(argument, KEYS)
            raise ConfigError(f"{one_line(repr(argument), 80)} is not key=value{hint}; for example lr=1e-3")
        key = key_of(name.strip().lstrip("-").replace("-", "_"), KEYS)
        if key in values:
            raise ConfigError(
                f"{printable(key, 80)} is given twice: as {one_line(values[key], 80)} and as {one_line(value, 80)}"
            )
        values[key] = value.strip()
    return values


def to_toml(config: TrainConfig, keys: Iterable[str] = KEYS) -> str:
    """The config, or some of its keys, as TOML in sections, descriptions as comments; None is the string "none"."""
    lines, section, values = [], None, config.flat
    for key in keys:
        if SECTION_OF.get(key) != section:
            section = SECTION_OF[key]
            lines.append(f"\n[{section}]")
        value = "none" if values[key] is None else values[key]
        lines.append(f"{key} = {_toml_value(value)}  # {FIELDS[key].description}")
    return "\n".join(lines) + "\n"


def _toml_value(value: object) -> str:
    """Strings, numbers, booleans and lists of them: JSON writes these as TOML does, but for the delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_config(path: str | Path) -> TrainConfig:
    """The config in a TOML file, in sections or flat: a recipe.

    Raises:
        ConfigError: the file could not be read or is not TOML, an unknown key, or a value out of its range.
    """
    return parse_toml(read_text(path), path)


def read_text(path: str | Path) -> str:
    """The text of a config file. Raises ConfigError if it could not be read, is too large or not UTF-8."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path} is too large for a config: at most {_MAX_BYTES >> 10} KiB")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"could not read {path}: {reason}") from None


def parse_toml(text: str, path: str | Path) -> TrainConfig:
    """The config in the text of a TOML file; path: for messages. Raises ConfigError as `read_config`."""
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path} is not a config: it is nested too deeply") from None
    except ValueError as error:  # also a number of thousands of digits
        raise ConfigError(f"{path} is not TOML: {one_line(error)}") from None
    try:
        return make_config(_flatten(values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """TOML tables to values by key. Keys outside a section are allowed: earlier versions wrote a flat file."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(value, dict):
            flat[name] = value
            continue
        if name not in SECTIONS:
            raise ConfigError(f"unknown section [{printable(name, 80)}]{did_you_mean(name, SECTIONS)}")
        for key in value:
            if key in KEYS and SECTION_OF.get(key) != name:
                where = f"section [{SECTION_OF[key]}]" if key in SECTION_OF else "no section"
                raise ConfigError(f"{key} belongs to {where}, not to [{name}]")
        flat |= value
    return flat

"""The whole configuration of a run: flat keys, each with its unit and range; a key that nobody knows is an error.

Importing this imports no torch.
"""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vitrail.errors import VitrailError, did_you_mean

TRACKERS = ("tensorboard", "wandb", "trackio")  # where figures can be sent while a run goes on


def _parts(value: object) -> object:
    """ "0.9, 0.999" or "0.9:0.999" to its parts, "none" to None; anything else as it is."""
    if isinstance(value, str):
        return None if _none(value) is None else value.strip("()[] ").replace(":", ",").split(",")
    return value


def _pair(value: object) -> object:
    """One number, or "224", stands for both sides; "192x320" names them."""
    if isinstance(value, str):
        value = _parts(value.replace("x", ","))
    if isinstance(value, int):
        value = [value]
    return list(value) * 2 if isinstance(value, list) and len(value) == 1 else value


def _none(value: object) -> object:
    """The word none, in any case, to None."""
    return None if isinstance(value, str) and value.strip().lower() in ("none", "null", "") else value


def _place(value: object) -> object:
    """A Path to its text, the word none to None; anything else as it is."""
    return str(value) if isinstance(value, Path) else _none(value)


def seconds(value: object) -> object:
    """ "90", "90s", "10m", "1.5h" or "1h30m" to seconds; a number, or what is no duration, as it is."""
    if not isinstance(value, str) or _none(value) is None:
        return _none(value)
    number = r"(\d+\.?\d*)"
    found = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s?)?", value.replace(" ", "").lower())
    if not found:
        return value
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))


def byte_count(size: str) -> int:
    """ "4GB", "500 MB" or "1.5TB" to bytes. Raises ValueError."""
    found = re.fullmatch(r"(\d+\.?\d*) *([KMGT]?)B?", size.strip().upper())
    if not found:
        raise ValueError("neither auto nor off nor a size such as 4GB")
    return int(float(found[1]) * 1000 ** ("", "K", "M", "G", "T").index(found[2]))


def _cache(value: object) -> object:
    """auto, off, or a size; true and false stand for auto and off."""
    if isinstance(value, bool):
        return "auto" if value else "off"
    word = str(value).strip().lower()
    if word in ("auto", "off"):
        return word
    return "off" if _none(word) is None or byte_count(word) == 0 else str(value).strip()


def _auto(value: object) -> object:
    """The word auto to 0."""
    return 0 if isinstance(value, str) and value.strip().lower() == "auto" else value


def _trackers(value: object) -> object:
    """ "tensorboard, wandb", or a list of such names, as one word with commas; "none" for no name."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return value
    names = [name.strip().lower() for name in value if _none(name) is not None]
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"there is no tracker {name!r}{did_you_mean(name, TRACKERS)}")
    return ",".join(dict.fromkeys(names)) or "none"


Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Optional = BeforeValidator(_none)
Trackers = BeforeValidator(_trackers)
Pair = BeforeValidator(_parts)


class TrainConfig(BaseModel):
    """Everything that decides a run. Two runs with the same config on the same machine end in the same weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # what is trained, and on what
    data: str = Field(description="a folder of images, a dataset's name, wds: shards or an hf-dataset:")
    data_dir: Annotated[str | None, Optional] = Field(None, description="where a named dataset's files are or go")
    val_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the training images held back where no val split is"
    )
    test_fraction: float = Field(0.1, ge=0, lt=1, description="likewise of a folder that has no test split")
    split_seed: int = Field(0, ge=0, description="seed of the split into training and held-back images")
    model: str = Field(description="a name from `vitrail models`")
    pretrained: bool = Field(False, description="start from the published weights")
    weights: Annotated[str | None, Optional] = Field(
        None, description="start from these weights: a file, a folder or hf:org/repo"
    )
    probe: bool = Field(False, description="freeze the model and fit a linear head to its features, computed once")
    img_size: Annotated[tuple[Count, Count] | None, BeforeValidator(_pair)] = Field(
        None, description="height and width that the model sees, pixels; none: the model's own"
    )
    fit: Literal["auto", "crop", "pad", "squash"] = Field(
        "auto", description="how an image of another shape is made to fit; auto: as the weights ask, else crop"
    )
    in_chans: Annotated[Literal[1, 3] | None, Optional] = Field(
        None, description="colour channels that the model sees: 1 or 3; none: as the images, or as the weights ask"
    )

    recipe: Annotated[str | None, Optional] = Field(
        None, description="where the settings below come from: a named recipe, or a file; none: chosen for the images"
    )

    # how long
    epochs: Annotated[Amount | None, Optional] = Field(
        None, description="passes over the training images, parts allowed; none: as many as the budget holds"
    )
    budget: Annotated[Positive | None, BeforeValidator(seconds)] = Field(
        None, description="seconds, or 10m, or 2h: the schedule ends when this time does"
    )
    batch_size: Annotated[int, Field(ge=0), BeforeValidator(_auto)] = Field(
        128, description="images in one step; auto, or 0: fitted to the machine, and lr to it"
    )
    eval_every: Count = Field(1, description="epochs from one validation to the next; the last one is always validated")

    # the optimiser: AdamW, warm-up, then a half cosine
    lr: Positive = Field(1e-3, description="peak learning rate")
    backbone_lr: Annotated[Positive | None, Optional] = Field(
        None, description="peak rate of all but the head; none: lr"
    )
    head_lr: Annotated[Positive | None, Optional] = Field(None, description="peak rate of the head; none: lr")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="each layer's rate is this times that of the layer after it"
    )
    min_lr: Amount = Field(0.0, description="where a group whose peak is lr ends; other groups in proportion")
    warmup_epochs: Amount = Field(0.0, description="epochs of linear warm-up; a budget shortens it with the rest")
    weight_decay: Amount = Field(0.05, description="AdamW's; never on biases, norms, tokens and positions")
    betas: Annotated[tuple[Rate, Rate], Pair] = Field((0.9, 0.999), description="AdamW's two averages")
    clip_grad: Annotated[Positive | None, Optional] = Field(
        None, description="largest norm of the whole gradient; none: any"
    )

    # regularisation
    loss: Literal["ce", "bce"] = Field(
        "ce", description="cross-entropy over all classes, or binary cross-entropy of each class by itself"
    )
    bce_threshold: Annotated[Rate | None, Optional] = Field(
        None, description="of loss=bce: an image is of a class if more than this share of it is; none: by its share"
    )
    label_smoothing: Rate = Field(0.0, description="share of the target that is spread over all classes")
    drop: Annotated[Rate | None, Optional] = Field(None, description="dropout before the head; none: the model's own")
    drop_path: Annotated[Rate | None, Optional] = Field(
        None, description="stochastic depth at the last block; none: the model's own"
    )
    attn_drop: Annotated[Rate | None, Optional] = Field(
        None, description="dropout of attention weights; none: the model's own"
    )

    balance: Literal["none", "sample", "loss"] = Field(
        "none", description="for rare classes: draw every class equally often (sample), or weigh the loss (loss)"
    )

    # augmentation: the crop when an image is read, the rest in batches where the model runs
    crop_scale: Annotated[tuple[Share, Share] | None, Pair] = Field(
        None, description="share of the image's area that a random crop takes, from and to; none: no random crop"
    )
    crop_ratio: Annotated[tuple[Positive, Positive], Pair] = Field(
        (3 / 4, 4 / 3), description="width to height of a random crop"
    )
    flip: Share = Field(0.0, description="probability of a left-right mirror image")
    vflip: Share = Field(0.0, description="probability of an upside-down mirror image")
    pad_shift: int = Field(0, ge=0, description="largest shift each way, whole pixels")
    rotate: float = Field(0.0, ge=0, le=180, description="largest rotation each way, degrees")
    shear: float = Field(0.0, ge=0, lt=90, description="largest shear each way, degrees")
    zoom: Annotated[tuple[Positive, Positive], Pair] = Field(
        (1.0, 1.0), description="from which to which scale; above 1 is larger"
    )
    shift: Share = Field(0.0, description="largest shift each way, as a share of the side")
    edge: Literal["black", "edge", "reflect"] = Field("black", description="what comes in from outside the image")
    rand_augment: float = Field(0.0, ge=0, le=10, description="magnitude of RandAugment, 0 to 10; 0: none")
    rand_augment_ops: Count = Field(2, description="operations of it for an image; each is done every other time")
    rand_augment_std: Amount = Field(0.5, description="standard deviation of its magnitude from image to image")
    brightness: Amount = Field(0.0, description="largest relative change of brightness")
    contrast: Amount = Field(0.0, description="largest relative change of contrast")
    saturation: Amount = Field(0.0, description="largest relative change of saturation; of colour images alone")
    erase: Share = Field(0.0, description="probability that a rectangle is erased")
    erase_area: Annotated[tuple[Positive, Share], Pair] = Field(
        (0.02, 1 / 3), description="share of the image that it takes"
    )
    erase_ratio: Annotated[tuple[Positive, Positive], Pair] = Field(
        (0.3, 1 / 0.3), description="its height to its width"
    )
    erase_fill: Literal["noise", "mean"] = Field("noise", description="what takes its place")
    mixup: Amount = Field(0.0, description="alpha of mixup's beta distribution; 0: no mixup")
    cutmix: Amount = Field(0.0, description="alpha of CutMix's beta distribution; 0: no CutMix")
    mix_prob: Share = Field(
        1.0, description="probability that a pair of images is mixed at all, if mixup or cutmix is on"
    )
    switch: Share = Field(0.5, description="probability of CutMix where both are on")

    # distillation
    teacher: Annotated[str | None, Optional] = Field(
        None,
        description="learn from this model too: a run or model folder, a name, hf:, timm:, torchvision:, an .onnx file",
    )
    distill: Literal["auto", "hard", "soft"] = Field(
        "auto",
        description="learn the teacher's class or its probabilities; auto: hard with a distillation token, else soft",
    )
    distill_weight: Share = Field(0.5, description="share of the loss that is the teacher's; the labels have the rest")
    temperature: Positive = Field(1.0, description="what both sides' logits are divided by in soft distillation")
    teacher_outputs: Annotated[str | None, BeforeValidator(_place)] = Field(
        None, description="folder where the teacher's outputs are stored once, and read again by later runs"
    )

    repeats: Count = Field(
        1, description="views of an image in a batch, of fewer images in an epoch as long; 1: no repeated augmentation"
    )

    # what is kept
    ema: Rate = Field(
        0.0, description="decay of the average of weights that is validated and kept; 0: the weights themselves"
    )
    ema_warmup: bool = Field(
        True, description="begin with a short average: decay (1 + step) / (10 + step) while that is less"
    )
    checkpoint_every: Annotated[int | None, Field(ge=0), Optional] = Field(
        None,
        description="steps from one checkpoint to the next; 0: by checkpoint_minutes alone; none: 200, or as many more "
        "as keep the cost under 2 % of the time",
    )
    checkpoint_minutes: Amount = Field(
        5.0, description="minutes from one checkpoint to the next, whichever comes first; 0: by checkpoint_every alone"
    )

    track: Annotated[str, Trackers] = Field(
        "none", description="where figures are sent: tensorboard, wandb, trackio, or several of them with commas"
    )

    # the machine
    accumulate: Count = Field(
        1, description="parts in which a batch goes through the model: less memory, the same gradient"
    )
    amp: Literal["auto", "bf16", "off"] = Field(
        "auto",
        description="bfloat16 always, never (off), or where the device is made for it (auto): see docs/machine.md",
    )
    shard: bool = Field(
        False, description="under torchrun, split weights and optimiser over the processes (FSDP2): for large models"
    )
    compile: bool = Field(False, description="torch.compile the model")
    grad_checkpointing: bool = Field(
        False, description="compute activations twice and keep fewer: less memory, more time"
    )
    eval_batch_size: Annotated[Count | None, Optional] = Field(
        None, description="images at once in evaluation; none: by image size"
    )
    workers: Annotated[int | None, Optional] = Field(
        None, ge=0, description="threads that read images; none: by cores and data"
    )
    cache: Annotated[str, BeforeValidator(_cache)] = Field(
        "auto",
        description="decoded images kept on the disk for later epochs: auto (where it helps and fits), off, or 20GB",
    )
    threads: Annotated[Count | None, Optional] = Field(
        None, description="threads of torch's on the CPU, on which the last bits depend; none: torch's own number"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto: the best that is there")
    seed: int = Field(0, ge=0, description="seed of weights, order, augmentation and dropout; not of the split")


KEYS = tuple(TrainConfig.model_fields)
_STAND_IN = {"data": "-", "model": "-"}


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """A config from keys and values; strings are read by the key's type.

    Raises:
        VitrailError: a key that nobody knows (with the nearest that there is), or a value out of its range.
    """
    for key in values:
        if key not in KEYS:
            raise VitrailError(
                f"there is no training option {key!r}{did_you_mean(key, KEYS)}; see `vitrail train --help`"
            )
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = str(fault["loc"][0]) if fault["loc"] else "?"
        given = values.get(key, "nothing")
        about = TrainConfig.model_fields[key].description if key in KEYS else ""
        raise VitrailError(f"training option {key} cannot be {given!r}: {fault['msg'].lower()} ({about})") from None


def check_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of some keys, each read by its type; data and model may be left out.

    Raises:
        VitrailError: as `make_config`.
    """
    config = make_config({**_STAND_IN, **values})
    return {key: getattr(config, key) for key in values}


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """`["lr=1e-3", "img_size=64"]` to checked values by key.

    Raises:
        VitrailError: a word without "=", a key that nobody knows, or a value out of its range.
    """
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise VitrailError(f"{word!r} is not key=value{did_you_mean(word, KEYS)}; for example lr=1e-3")
        values[key.strip().replace("-", "_")] = value.strip()
    return check_options(values)


def to_toml(config: TrainConfig, keys: Iterable[str] = KEYS) -> str:
    """The config, or some of its keys, as flat TOML, descriptions as comments; None is the word "none"."""
    lines = []
    for key in keys:
        value, about = getattr(config, key), TrainConfig.model_fields[key].description
        lines.append(f"{key} = {_toml_value('none' if value is None else value)}  # {about}")
    return "\n".join(lines) + "\n"


def _toml_value(value: object) -> str:
    """Strings, numbers, booleans and lists of them: JSON writes these as TOML does, but for the delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Checked values by key from a flat TOML file: a recipe, or a run's config.

    Raises:
        VitrailError: no such file, no TOML, a key that nobody knows, or a value out of its range.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise VitrailError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    except tomllib.TOMLDecodeError as error:
        raise VitrailError(f"{path} is not TOML: {error}") from None
    try:
        return check_options(values)
    except VitrailError as error:
        raise VitrailError(f"{path}: {error}") from None

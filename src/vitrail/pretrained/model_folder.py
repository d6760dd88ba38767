"""The model folder: a classifier on disk, as `config.json` and `model.safetensors`, and a card for people to read.

The folder is timm's: `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same logits wherever timm can
build the architecture. What is ours alone stands under the key "vitrail", and reading goes by that.
Nothing but JSON and safetensors is read, so a folder cannot hold code.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from vitrail._version import __version__
from vitrail.errors import WeightsError
from vitrail.images.preprocess import Preprocess
from vitrail.models import config_io
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS
from vitrail.models.configs import ModelConfig
from vitrail.models.timm_compat import (
    RATES,
    family_of,
    global_pool,
    model_args,
    pretrained_cfg,
    same_but_for_args,
    timm_stand_in,
    window_mismatch,
)
from vitrail.utils.files import atomic_folder
from vitrail.utils.text import format_shape, join_names, one_line

FORMAT = 1  # of the part under "vitrail"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_REPLACEABLE = {CONFIG, WEIGHTS, CARD}  # a folder that holds anything else is never replaced


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a model folder holds. `notes` is JSON that travels along and means nothing to the model."""

    model: ImageModel
    preprocess: Preprocess
    class_names: tuple[str, ...]
    architecture: str  # the variant's name in the catalog, or the nearest word for a model that is none of them
    notes: dict[str, Any]


def is_model_folder(path: Path) -> bool:
    """Whether `path` is a folder with a config.json that we wrote (or one so damaged that nobody can tell)."""
    if not (path / CONFIG).is_file():
        return False
    try:
        return "vitrail" in _read_json(path / CONFIG)
    except WeightsError:
        return True


def write_model_folder(folder: Path, contents: Contents) -> None:
    """Write the folder whole or not at all; a model folder that stands there is replaced.

    Raises:
        WeightsError: the folder holds files that are not a model's, or the disk refuses.
    """
    folder = folder.resolve()  # else a link to a folder would be replaced by a folder
    if folder.exists():
        others = sorted({entry.name for entry in folder.iterdir()} - _REPLACEABLE) if folder.is_dir() else [folder.name]
        if others:
            raise WeightsError(f"{folder} holds other files ({join_names(others, 3)}); save the model to a new folder")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in contents.model.state_dict().items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(to_json(contents), indent=2, ensure_ascii=False)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        (temporary / CARD).write_text(to_card(contents), encoding="utf-8")


def to_json(contents: Contents) -> dict[str, Any]:
    """What stands in config.json: timm's keys, then ours."""
    # reset_classifier changes the model and not the frozen config that it was built from.
    config = dataclasses.replace(contents.model.config, num_classes=contents.model.num_classes)
    return {
        "architecture": _timm_architecture(contents.architecture, config, contents.preprocess.size),
        "num_classes": config.num_classes,
        "num_features": contents.model.num_features,
        "global_pool": global_pool(config),
        "label_names": list(contents.class_names),
        "model_args": model_args(config, contents.preprocess),
        "pretrained_cfg": pretrained_cfg(config, contents.preprocess),
        "vitrail": {
            "format": FORMAT,
            "version": __version__,
            "architecture": contents.architecture,
            "family": family_of(config),
            "config": config_io.to_json(config),
            "preprocess": contents.preprocess.to_dict(),
            "class_names": list(contents.class_names),
            "notes": contents.notes,
        },
    }


def to_card(contents: Contents, repo: str | None = None) -> str:
    """What stands in README.md; `repo` is "org/name" where it is for a repository of the hub."""
    from vitrail.pretrained.model_card import model_card  # only writing needs it

    config, params = contents.model.config, sum(parameter.numel() for parameter in contents.model.parameters())
    in_timm = timm_stand_in(config, contents.preprocess.size) is not None
    note = window_mismatch(config, contents.preprocess.size)
    return model_card(to_json(contents), params, in_timm=in_timm, timm_note=note, repo=repo)


def _timm_architecture(name: str, config: ModelConfig, size: tuple[int, int]) -> str:
    """The name that timm looks up. Where timm can build no such model, one that it refuses as unknown."""
    stand_in, row = timm_stand_in(config, size), VARIANTS.get(name)
    timms_own = row is not None and timm_stand_in(row.config) is not None
    if stand_in is None:
        return f"vitrail_{name}" if timms_own else name
    return name if row is not None and timms_own and same_but_for_args(row.config, config) else stand_in


def name_of(config: ModelConfig) -> str:
    """The catalog's name for a config, whatever its image size, channels, classes and drop rates; else its family."""
    free = {"img_size", "in_chans", "num_classes", *RATES}
    key = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    rows = [
        row
        for row in VARIANTS.values()
        if type(row.config) is type(config) and key.items() <= dataclasses.asdict(row.config).items()
    ]
    rows.sort(key=lambda row: row.config.img_size != config.img_size)
    return rows[0].name if rows else family_of(config)


def read_model_folder(folder: Path) -> Contents:
    """Read and check a folder: every tensor that the config asks for, in its shape, and no other.

    Raises:
        WeightsError: a file is missing, damaged or from elsewhere; a key, value, name or shape does not fit.
    """
    source = folder / CONFIG
    record = _section(_read_json(source), "vitrail", source)
    if record.get("format") != FORMAT:
        raise WeightsError(f"{source} has format {record.get('format')!r}, not {FORMAT}: update vitrail to read it")
    config = config_io.from_json(record.get("family"), _section(record, "config", source), str(source))
    names = record.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{source} has no list of class_names")
    if len(names) != config.num_classes:
        raise WeightsError(f"{source} has {len(names)} class names for {config.num_classes} classes")
    try:
        preprocess = Preprocess.from_dict(_section(record, "preprocess", source))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{source} has an invalid preprocessing: {one_line(error)}") from None
    if preprocess.channels != config.in_chans:
        raise WeightsError(f"{source} preprocesses {preprocess.channels} channels for a model with {config.in_chans}")
    return Contents(
        model=_load(folder / WEIGHTS, config),
        preprocess=preprocess,
        class_names=tuple(names),
        architecture=str(record.get("architecture")),
        notes=_section(record, "notes", source),
    )


def _read_json(source: Path) -> dict[str, Any]:
    try:
        record = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"cannot read {source}: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{source} is not valid JSON: {one_line(error)}") from None
    if not isinstance(record, dict):
        raise WeightsError(f"{source} is no model's config: it holds a {type(record).__name__}")
    return record


def _section(record: Mapping[str, Any], key: str, source: Path) -> dict[str, Any]:
    section = record.get(key)
    if not isinstance(section, dict):
        hint = "; it was not written by vitrail" if key == "vitrail" else ""
        raise WeightsError(f"{source} has no section {key!r}{hint}")
    return section


def _load(source: Path, config: ModelConfig) -> ImageModel:
    """The model with the weights of a safetensors file, which must fit to the last tensor.

    It is first built without memory, to compare names and shapes: a wrong config then costs nothing, and no weight is
    initialised only to be overwritten.
    """
    if not source.is_file():
        raise WeightsError(f"{source} does not exist: the model's weights are missing")
    try:
        with safe_open(source, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
            model = _skeleton(config, len(shapes), source)
            expected = model.state_dict()
            _check_fit(expected, shapes, source)
            tensors = {name: file.get_tensor(name).to(expected[name].dtype) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{source} is damaged or not a safetensors file: {one_line(error)}") from None
    if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in tensors):
        model = build_model(config)  # it computes tables of its own, which need memory
        model.load_state_dict(tensors)
    else:
        model.load_state_dict(tensors, assign=True)
    return model.eval()


def _skeleton(config: ModelConfig, num_tensors: int, source: Path) -> ImageModel:
    """The model on the meta device: names and shapes without memory."""
    blocks = [getattr(config, name, 0) for name in ("depth", "depths", "layers")]
    if max(sum(b) if isinstance(b, tuple) else b for b in blocks) > num_tensors:
        raise WeightsError(f"{source} holds {num_tensors} tensors, too few for the depth in its config")
    try:
        with torch.device("meta"), _NoDraws():
            return build_model(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"{source.with_name(CONFIG)} does not describe a valid model: {one_line(error)}") from None


class _NoDraws(TorchFunctionMode):
    """Leaves tensors as they are where random numbers would be drawn: without memory, that loads torch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _check_fit(expected: Mapping[str, torch.Tensor], found: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Raise WeightsError, naming the tensors, unless names and shapes are the same."""
    faults = {
        "missing": [name for name in expected if name not in found],
        "not the model's": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {format_shape(found[name])} for {format_shape(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name] != tuple(tensor.shape)
        ],
    }
    words = [f"{what}: {join_names(names, 3)}" for what, names in faults.items() if names]
    if words:
        raise WeightsError(f"{source} does not match its config.json: {'; '.join(words)}")

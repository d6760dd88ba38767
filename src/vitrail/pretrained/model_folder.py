"""The model folder: a classifier on disk as `config.json`, `model.safetensors` and a model card.

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same logits if timm has the architecture. Our own
settings are under the key "vitrail". Only JSON and safetensors are read, so no code in a folder is run.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitrail._version import __version__
from vitrail.errors import ConfigError, WeightsError
from vitrail.images.preprocess import Preprocess
from vitrail.models import config_io
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model, build_on_meta
from vitrail.models.catalog import VARIANTS
from vitrail.models.configs import ModelConfig, differences
from vitrail.models.timm_compat import (
    RATES,
    differ_only_in_args,
    family_of,
    global_pool,
    model_args,
    pretrained_cfg,
    timm_base_variant,
    timm_mismatch,
)
from vitrail.pretrained.local import CARD, CONFIG, USUAL
from vitrail.utils.files import SUMS, atomic_folder, mismatches, write_checksums
from vitrail.utils.text import format_shape, join_names, one_line
from vitrail.weights.read import check_safetensors, read_json
from vitrail.weights.values import describe_casts, dtype_name, is_castable, non_finite

FORMAT = 1  # of the section "vitrail"
WEIGHTS = USUAL[0]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The content of a model folder. `notes` is JSON about the model's origin, which does not affect its output."""

    model: ImageModel
    preprocess: Preprocess
    class_names: tuple[str, ...]
    architecture: str  # the variant's name in the catalog, else of its family
    notes: dict[str, Any]


def find_model_folder(path: Path) -> Path | None:
    """`path`, or the folder "model" of a run folder: the one with a config.json of vitrail, or with a damaged one."""
    for folder in (path, path / "model"):
        try:
            if (folder / CONFIG).is_file() and "vitrail" in read_json(folder / CONFIG):
                return folder
        except WeightsError:
            return folder
    return None


def write_model_folder(folder: Path, contents: Contents) -> None:
    """Write the folder atomically; an existing model folder is replaced.

    Raises:
        WeightsError: the folder contains other files.
        RunError: the disk is full, read-only or forbidden.
    """
    folder = folder.resolve()  # else a symbolic link would be replaced
    if folder.exists():
        others = (
            sorted({entry.name for entry in folder.iterdir()} - {CONFIG, WEIGHTS, CARD, SUMS})
            if folder.is_dir()
            else [folder.name]
        )
        if others:
            raise WeightsError(
                f"{folder} contains other files ({join_names(others, 3)}): save the model to a new folder"
            )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in contents.model.state_dict().items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(to_json(contents), indent=2, ensure_ascii=False)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        (temporary / CARD).write_text(to_card(contents), encoding="utf-8")
        write_checksums(temporary, (CONFIG, WEIGHTS))


def to_json(contents: Contents) -> dict[str, Any]:
    """The content of config.json: timm's keys, then ours."""
    # reset_classifier changes the model but not its frozen config.
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
            "config": dataclasses.asdict(config),
            "preprocess": contents.preprocess.to_dict(),
            "class_names": list(contents.class_names),
            "notes": contents.notes,
        },
    }


def to_card(contents: Contents, repo: str | None = None) -> str:
    """The content of README.md; `repo`: "org/name", if it is for a repository on the hub."""
    from vitrail.pretrained.model_card import model_card  # only writing needs it

    config, params = contents.model.config, sum(parameter.numel() for parameter in contents.model.parameters())
    in_timm = timm_base_variant(config, contents.preprocess.size) is not None
    note = timm_mismatch(config, contents.preprocess.size)
    return model_card(to_json(contents), params, in_timm=in_timm, timm_note=note, repo=repo)


def _timm_architecture(name: str, config: ModelConfig, size: tuple[int, int]) -> str:
    """The name under which timm builds the model; one unknown to timm if it cannot."""
    base, row = timm_base_variant(config, size), VARIANTS.get(name)
    in_timm = row is not None and timm_base_variant(row.config) is not None
    if base is None:
        return f"vitrail_{name}" if in_timm else name
    return name if row is not None and in_timm and differ_only_in_args(row.config, config) else base


def name_of(config: ModelConfig) -> str:
    """The catalog's name for a config, regardless of image size, channels, classes, drop rates and merged tokens; else
    its family."""
    ignored = {"img_size", "in_chans", "num_classes", "merge", *RATES}
    same_type = [row for row in VARIANTS.values() if type(row.config) is type(config)]
    rows = [row for row in same_type if differences(row.config, config) <= ignored]
    return max(rows, key=lambda row: row.config.img_size == config.img_size).name if rows else family_of(config)


def read_model_folder(folder: Path) -> Contents:
    """Read a model folder strictly.

    Raises:
        WeightsError: a file is missing, damaged or not of vitrail, or the tensors do not match the config or are not
            finite.
        ModelError: the config is invalid.
    """
    source = folder / CONFIG
    record = _section(read_json(source), "vitrail", source)
    if record.get("format") != FORMAT:
        raise WeightsError(
            f"{source} has format {one_line(repr(record.get('format')), 40)}, not {FORMAT}: update vitrail to read it"
        )
    config = config_io.from_json(record.get("family"), _section(record, "config", source), str(source))
    names = record.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{source} has no list of class_names")
    if len(names) != config.num_classes:
        raise WeightsError(f"{source} has {len(names)} class names for {config.num_classes} classes")
    try:
        preprocess = Preprocess.from_dict(_section(record, "preprocess", source))
    except (ConfigError, TypeError, ValueError) as error:
        raise WeightsError(f"{source} has an invalid preprocessing: {one_line(error)}") from None
    if preprocess.channels != config.in_chans:
        raise WeightsError(f"{source} preprocesses {preprocess.channels} channels for a model with {config.in_chans}")
    notes = _section(record, "notes", source)
    model, casts = _load_model(folder / WEIGHTS, config)
    _check_sums(folder)  # last: other messages say more
    if casts:
        warnings.warn(f"{folder / WEIGHTS}: {casts}", stacklevel=3)
    return Contents(
        model=model,
        preprocess=preprocess,
        class_names=tuple(names),
        architecture=str(record.get("architecture")),
        notes=notes,
    )


def _check_sums(folder: Path) -> None:
    """Compare with the checksums, if there are any: damaged weights are an error, an edited config is told."""
    if not (folder / SUMS).is_file():
        return
    wrong = mismatches(folder, (CONFIG, WEIGHTS))
    if WEIGHTS in wrong:
        raise WeightsError(
            f"{folder / WEIGHTS} is damaged or was replaced: its checksum differs; if you replaced it, remove {SUMS}"
        )
    if wrong:
        warnings.warn(f"{folder / CONFIG} was edited or damaged: its checksum in {SUMS} differs", stacklevel=4)


def _section(record: Mapping[str, Any], key: str, source: Path) -> dict[str, Any]:
    section = record.get(key)
    if not isinstance(section, dict):
        hint = "; it was not written by vitrail" if key == "vitrail" else ""
        raise WeightsError(f"{source} has no section {key!r}{hint}")
    return section


def _load_model(source: Path, config: ModelConfig) -> tuple[ImageModel, str]:
    """Build the model and load a safetensors file strictly. Returns it, and which casts were needed.

    Names and shapes are compared on the meta device, so that a wrong config allocates nothing and no weight is
    initialised only to be overwritten.
    """
    if not source.is_file():
        raise WeightsError(f"{source} does not exist: the model's weights are missing")
    check_safetensors(source)
    try:
        with safe_open(source, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
            model = build_on_meta(config, len(shapes), str(source.with_name(CONFIG)))
            expected = model.state_dict()
            _check_tensors(expected, shapes, source)
            found = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{source} is damaged or not a safetensors file: {one_line(error)}") from None
    tensors, casts = _cast(found, expected, source)
    if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in tensors):
        model = build_model(config)  # it computes buffers, which need memory
        model.load_state_dict(tensors)
    else:
        model.load_state_dict(tensors, assign=True)
    return model.eval(), casts


def _cast(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], source: Path
) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors in the model's dtypes, and the casts. Raises WeightsError for another kind or values not finite."""
    casts, tensors = [], {}
    for name, tensor in found.items():
        old, new = dtype_name(tensor), str(expected[name].dtype).removeprefix("torch.")
        if not is_castable(tensor, expected[name]):
            raise WeightsError(f"{source} does not match its config.json: {name} is {old}, not {new}")
        tensors[name] = tensor.to(expected[name].dtype)
        if old != new:
            casts.append(f"{old} to {new}")
    if wrong := non_finite(tensors):
        raise WeightsError(f"{source} contains NaN or infinity in {join_names(wrong, 3)}: these weights are not usable")
    return tensors, describe_casts(casts)


def _check_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Raise WeightsError, naming the tensors, unless names and shapes are the same."""
    differences = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "shape mismatch": [
            f"{name} {format_shape(found[name])} for {format_shape(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name] != tuple(tensor.shape)
        ],
    }
    lines = [f"{what}: {join_names(names, 3)}" for what, names in differences.items() if names]
    if lines:
        raise WeightsError(f"{source} does not match its config.json: {'; '.join(lines)}")

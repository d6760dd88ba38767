"""Model configs as JSON: to a dict of plain values, and back with every key and type checked."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from vitrail.errors import ModelError, did_you_mean
from vitrail.models.configs import ModelConfig
from vitrail.models.timm_compat import FAMILIES

# Fields that files of earlier versions lack; their defaults are what those versions did.
ADDED_FIELDS: frozenset[str] = frozenset({"channels", "small_stem", "stem_depth"})


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The config's fields; `from_json` reads them back from JSON."""
    return dataclasses.asdict(config)


def from_json(family: object, values: Mapping[str, Any], where: str) -> ModelConfig:
    """The config dataclass of `family`, with every key known and every value of its type.

    Args:
        family: a key of `FAMILIES`.
        values: the fields, as parsed from JSON.
        where: what the values were read from, for messages.

    Raises:
        ModelError: an unknown family, a missing or unknown key, or a value of another type or out of range.
    """
    from pydantic import TypeAdapter, ValidationError  # takes 0.1 s, and only reading needs it

    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(f"{where}: unknown model family {family!r}; known are {', '.join(FAMILIES)}")
    kind = FAMILIES[family].config
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ModelError(f"{where}: unknown key {key!r} in config{did_you_mean(key, known)}")
    for key in known:
        if key not in values and key not in ADDED_FIELDS:
            raise ModelError(f"{where}: config has no {key!r}")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in ("config", *fault["loc"]))
        value, reason = (" ".join(text.split())[:100] for text in (repr(fault["input"]), fault["msg"]))
        raise ModelError(f"{where}: {key} cannot be {value}: {reason}") from None

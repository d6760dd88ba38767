"""Model configs from JSON, with every key and type checked."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from vitrail.errors import ModelError, did_you_mean
from vitrail.models.configs import ModelConfig
from vitrail.models.timm_compat import FAMILIES
from vitrail.utils.text import one_line

# Fields that files of earlier versions lack; the defaults reproduce those versions.
ADDED_FIELDS: frozenset[str] = frozenset({"channels", "merge", "small_stem", "stem_depth"})


def from_json(family: object, values: Mapping[str, Any], where: str) -> ModelConfig:
    """The config of `family` with these values.

    Args:
        family: a key of `FAMILIES`.
        values: the fields, as parsed from JSON.
        where: the source of the values, for error messages.

    Raises:
        ModelError: an unknown family, a missing or unknown key, or a value of the wrong type or out of range.
    """
    from pydantic import TypeAdapter, ValidationError  # deferred: the import takes 0.1 s

    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(f"{where}: unknown model family {one_line(repr(family), 40)}; known are {', '.join(FAMILIES)}")
    config_type = FAMILIES[family].config
    known = [field.name for field in dataclasses.fields(config_type)]
    for key in values:
        if key not in known:
            raise ModelError(f"{where}: unknown key {one_line(repr(key), 40)} in config{did_you_mean(key, known)}")
    for key in known:
        if key not in values and key not in ADDED_FIELDS:
            raise ModelError(f"{where}: config has no {key!r}")
    try:
        return TypeAdapter(config_type).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if not problem["loc"]:  # of the values together
            reason = one_line(problem["msg"].removeprefix("Value error, "))
            raise ModelError(f"{where} does not describe a valid model: {reason}") from None
        key = ".".join(str(part) for part in ("config", *problem["loc"]))
        value, reason = (one_line(text, 100) for text in (repr(problem["input"]), problem["msg"]))
        raise ModelError(f"{where}: {key} cannot be {value}: {reason}") from None

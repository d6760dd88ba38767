"""Base class and value types of settings: frozen, checked when they are made, and readable from strings.

Importing this imports no torch.
"""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_PIXELS = 1 << 24  # of a model's input: 4096x4096
MAX_SEED = 2**63 - 1


class Settings(BaseModel):
    """A group of settings. An unknown name is an error, as are NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def none_or(value: object) -> object:
    """Turn the string "none", in any case, into None."""
    return None if isinstance(value, str) and value.strip().lower() in ("none", "null", "") else value


def _split(value: object) -> object:
    """Split "0.9, 0.999" or "0.9:0.999" into its parts; "none" becomes None."""
    if isinstance(value, str):
        return None if none_or(value) is None else value.strip("()[] ").replace(":", ",").split(",")
    return value


def _height_width(value: object) -> object:
    """Turn 224 or "224" into two equal sides, and "192x320" into height and width."""
    if isinstance(value, str):
        value = _split(value.replace("x", ","))
    if isinstance(value, int):
        value = [value]
    return list(value) * 2 if isinstance(value, list) and len(value) == 1 else value


def _path_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else none_or(value)


def _seconds(value: object) -> object:
    """Turn "90", "90s", "10m", "1.5h" or "1h30m" into seconds."""
    if not isinstance(value, str) or none_or(value) is None:
        return none_or(value)
    number = r"(\d+\.?\d*)"
    found = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s?)?", value.replace(" ", "").lower())
    if not found:
        return value
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))


def _one_or_list(value: object) -> object:
    """ "8" or "0.3" to a number, "8,8,4,0" to several."""
    parts = value.split(",") if isinstance(value, str) and none_or(value) is not None else [none_or(value)]
    return parts[0] if len(parts) == 1 else parts


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"the smaller number comes first, not {value[0]:g}, {value[1]:g}")
    return value


def _bounded(value: tuple[int, int] | None) -> tuple[int, int] | None:
    if value and value[0] * value[1] > MAX_PIXELS:
        raise ValueError(f"at most {MAX_PIXELS:,} pixels, not {value[0]}x{value[1]}")
    return value


Optional = BeforeValidator(none_or)
Pair = BeforeValidator(_split)
Ascending = AfterValidator(_ascending)

Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=MAX_PIXELS)]
Amount = Annotated[float, Field(ge=0)]
Range = Annotated[tuple[Positive, Positive], Pair, Ascending]
Size = Annotated[tuple[Side, Side] | None, BeforeValidator(_height_width), AfterValidator(_bounded)]
Seconds = Annotated[Positive | None, BeforeValidator(_seconds)]
Merge = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...] | Annotated[int, Field(ge=0)] | Rate | None, BeforeValidator(_one_or_list)
]
PathText = Annotated[str | None, BeforeValidator(_path_text)]


def format_value(value: object) -> str:
    """A value as on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(format_value(part) for part in value)
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)

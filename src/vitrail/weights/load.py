"""Strict loading of tensors into a model, with a report on each tensor.

Resized, adapted, cast and unused tensors are reported; any other mismatch is an error, and nothing is loaded.

Shapes: B batch (1), N tokens, C width, H heads; grids and windows are (rows, columns).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import WeightsError
from vitrail.layers.embed import resample_positions
from vitrail.utils.text import format_shape, join_names, printable
from vitrail.weights.heads import HeadDecision, HeadPolicy, decide_head, head_names, num_classes_of
from vitrail.weights.report import Entry, Report
from vitrail.weights.resample import adapt_channels, resample_bias_table, resample_patches
from vitrail.weights.tensors import Tensors
from vitrail.weights.values import describe_casts, dtype_name, is_castable, is_finite

Pair = tuple[int, int]
_FIRST_CONVOLUTIONS = ("patch_embed.convs.0.weight", "patch_embed.proj.weight", "conv1.weight", "stem.0.weight")
_BIAS_TABLE, _COUNTER = "relative_position_bias_table", "num_batches_tracked"


def load_weights(
    model: nn.Module,
    tensors: Tensors,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    file_class_names: Sequence[str] | None = None,
    heads: HeadPolicy = "auto",
    grid: Pair | None = None,
    source: str = "",
    layout: str = "",
) -> Report:
    """Load `tensors`, under our names, into `model`, and report on each.

    Args:
        num_classes: the requested number of classes; None requires that the file's head matches.
        class_names: of the model, if known.
        file_class_names: of the file's head, if known.
        heads: "keep" requires the file's head, "new" a new one, "auto" keeps the file's if its classes match.
        grid: of the file's position embedding, if known; else a square one or the model's is assumed.
        source, layout: for the report.

    Raises:
        WeightsError: tensors do not match, with both shapes, or are not finite. The model is unchanged.
    """
    plan = _Plan(model, Tensors(tensors), grid)
    decision = decide_head(
        num_classes_of(tensors),
        num_classes_of(plan.expected),
        requested=num_classes,
        old_names=file_class_names,
        new_names=class_names,
        policy=heads,
    )
    plan.load_head(decision)
    plan.load_positions()
    plan.load_by_name()
    plan.check(source)
    report = Report(
        [*(plan.entries[name] for name in plan.expected), *plan.unused],
        source=source,
        layout=layout,
        notes=[*tensors.notes],
        casts=describe_casts(plan.casts),
        warnings=[decision.warning] if decision.warning else [],
    )
    model.load_state_dict(plan.state, strict=True)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=2)
    return report


@dataclass
class _Plan:
    """What will be loaded, decided for each tensor before the model is changed."""

    model: nn.Module
    remaining: Tensors  # not yet assigned
    grid: Pair | None
    expected: dict[str, Tensor] = field(init=False)
    state: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    unused: list[Entry] = field(default_factory=list)
    casts: list[str] = field(default_factory=list)  # "float16 to float32", one for each tensor
    problems: dict[str, str] = field(default_factory=dict)  # the model's name -> the mismatch; "" if another covers it

    def __post_init__(self) -> None:
        self.expected = self.model.state_dict()
        self.unused += [Entry(name, "unused", how=why) for name, why in self.remaining.unused.items()]

    def assign(self, name: str, value: Tensor, state: str, how: str, old: Tensor | None) -> None:
        """Set the value and the entry of one of the model's tensors."""
        expected = self.expected[name]
        self.state[name] = value
        shape = None if old is None else tuple(old.shape)
        origin = self.remaining.origin.get(name, "") if old is not None else ""
        self.entries[name] = Entry(name, state, shape, tuple(expected.shape), how, origin)

    def discard(self, name: str, reason: str) -> None:
        tensor = self.remaining.pop(name)
        self.unused.append(Entry(self.remaining.file_name(name), "unused", old=tuple(tensor.shape), how=reason))

    def load(self, name: str, value: Tensor, state: str = "loaded", how: str = "") -> None:
        """Assign the file's tensor `name`, converted to `value`, if its shape and kind are the model's."""
        old, expected = self.remaining.pop(name), self.expected[name]
        if value.shape != expected.shape:
            self.mismatch(name, old)
        elif not is_castable(value, expected):
            self.problems[name] = (
                f"{self.both_names(name)} is {dtype_name(value)} in the file and {dtype_name(expected)} in the model"
            )
        else:
            if value.dtype != expected.dtype:
                cast = f"{dtype_name(value)} to {dtype_name(expected)}"
                self.casts.append(cast)
                how = "; ".join(filter(None, [how, cast]))
            value = value.to(expected.dtype)
            if not is_finite(value):
                self.problems[name] = f"{self.both_names(name)} contains NaN or infinity as {dtype_name(expected)}"
            self.assign(name, value, state, how, old)

    def both_names(self, name: str) -> str:
        origin = self.remaining.file_name(name)
        return printable(name) if origin == name else f"{printable(name)} ({printable(origin, 300)} in the file)"

    def mismatch(self, name: str, old: Tensor, hint: str = "") -> None:
        shapes = f"{format_shape(old.shape)} in the file and {format_shape(self.expected[name].shape)} in the model"
        self.problems[name] = f"{self.both_names(name)} is {shapes}{hint}"

    def load_head(self, decision: HeadDecision) -> None:
        """Keep the file's head (both heads if there are two), or a new one."""
        in_file, in_model = head_names(self.remaining), head_names(self.expected)
        if decision.keep:
            for name in in_file:
                if decision.rows is not None and name in self.expected and self.remaining[name].ndim:
                    self.load(name, self.remaining[name][list(decision.rows)], how=decision.reason)
            return  # without a permutation, load_by_name loads it
        if decision.problem:
            hint = "; give num_classes for a new head, or 0 for none"
            if not in_file:
                self.problems[in_model[0]] = f"{decision.reason}, and the model needs {join_names(in_model)}{hint}"
                self.problems |= dict.fromkeys(in_model[1:], "")
            for name in in_file:
                tensor = self.remaining.pop(name)
                if name in self.expected:
                    self.mismatch(name, tensor, hint)
            return
        for name in in_file:
            self.discard(name, decision.reason)
        for name in in_model:
            self.assign(name, self.expected[name], "new", decision.reason, None)

    def load_positions(self) -> None:
        """Resample the position embedding; convert if only one side has positions of prefix tokens."""
        table, expected = self.remaining.get("pos_embed"), self.expected.get("pos_embed")
        if table is None or expected is None:
            return
        new = _grid_of(self.model, expected.shape[1])
        if table.ndim != 3 or new is None or table.shape[::2] != expected.shape[::2]:
            return  # load_by_name compares the shapes
        prefix = expected.shape[1] - new[0] * new[1]
        old = self.grid if self.grid and self.grid[0] * self.grid[1] <= table.shape[1] else None
        old = old or _guess_grid(table.shape[1], prefix, new)
        if old is None:
            return
        how = [] if old == new else [f"bicubic, from a grid of {format_shape(old)} to {format_shape(new)}"]
        old_prefix = table.shape[1] - old[0] * old[1]
        grid = resample_positions(table[:, old_prefix:], old, new)
        if old_prefix == prefix:
            value = torch.cat([table[:, :old_prefix], grid], dim=1)
        elif prefix == 0 and (tokens := self.add_positions(table[:, :old_prefix])):
            value = grid
            how.append(f"the position embedding of {' and '.join(tokens)} is added to the token")
        elif old_prefix == 0:
            value = torch.cat([torch.zeros_like(table[:, :1]).expand(-1, prefix, -1), grid], dim=1)
            how.append("the prefix tokens include their position, so it is 0 here")
        else:
            return
        self.load("pos_embed", value, "resized" if how else "loaded", "; ".join(how))

    def add_positions(self, rows: Tensor) -> list[str]:
        """Add one row to each of the first prefix tokens. Returns their names; none if there are fewer tokens."""
        known = ["cls_token", "dist_token"]
        tokens = [name for name in known if name in self.remaining and name in self.expected]
        if len(tokens) < rows.shape[1] or any(self.remaining[name].shape != rows[:, :1].shape for name in tokens):
            return []
        for name, row in zip(tokens, rows.split(1, dim=1), strict=False):
            self.load(name, self.remaining[name] + row, "adapted", "its position embedding is added to it")
        return tokens[: rows.shape[1]]

    def load_by_name(self) -> None:
        """All other tensors, by name."""
        first = next((name for name in _FIRST_CONVOLUTIONS if name in self.expected), None)
        has_counters = any(name.endswith(_COUNTER) for name in self.remaining)
        for name, expected in self.expected.items():
            if name in self.entries:
                continue
            if name not in self.remaining:
                if name.endswith(_COUNTER) and not has_counters:
                    self.assign(name, expected, "new", "a counter that old files lack and inference does not use", None)
                continue
            tensor = self.remaining[name]
            if name.endswith(_BIAS_TABLE):
                self.load_bias_table(name, tensor)
            elif name == first and tensor.ndim == 4 and tensor.shape != expected.shape:
                self.load_first_convolution(name, tensor)
            else:
                self.load(name, tensor)

    def load_bias_table(self, name: str, tensor: Tensor) -> None:
        """Resample Swin's bias table to the model's window."""
        expected = self.expected[name]
        attention = self.model.get_submodule(name.rpartition(".")[0])
        new = getattr(attention, "window", None) or getattr(attention, "window_size", None)
        side = math.isqrt(tensor.shape[0]) if tensor.ndim == 2 else 0
        if new is None or side * side != tensor.shape[0] or side % 2 == 0 or tensor.shape[1:] != expected.shape[1:]:
            return self.load(name, tensor)  # only square windows are known
        old, new = ((side + 1) // 2, (side + 1) // 2), (int(new[0]), int(new[1]))
        if old == new:
            return self.load(name, tensor)
        how = f"from windows of {format_shape(old)} to {format_shape(new)}"
        return self.load(name, resample_bias_table(tensor, old, new), "resized", how)

    def load_first_convolution(self, name: str, tensor: Tensor) -> None:
        """Other channels, and for patches another size."""
        expected, value, how, state = self.expected[name], tensor, [], "adapted"
        if value.shape[1] != expected.shape[1]:
            value = adapt_channels(value, expected.shape[1])
            how.append(f"{tensor.shape[1]} to {expected.shape[1]} channels")
        if name == "patch_embed.proj.weight" and value.shape[2:] != expected.shape[2:]:
            value = resample_patches(value, (expected.shape[2], expected.shape[3]))
            how.append(f"pseudo-inverse resize from patches of {format_shape(tensor.shape[2:])}")
            state = "resized"
        self.load(name, value, state, ", ".join(how))

    def check(self, source: str) -> None:
        """Raise WeightsError for missing or unexpected tensors, other shapes or dtypes, and values not finite."""
        missing = [name for name in self.expected if name not in self.entries and name not in self.problems]
        mismatches = [text for text in self.problems.values() if text]
        lines = mismatches[:8]
        if len(mismatches) > 8:
            lines.append(f"{len(mismatches) - 8} more differ")
        if missing:
            lines.append(f"missing from the file: {join_names(missing)}")
        if self.remaining:
            lines.append(f"unexpected in the file: {join_names(self.both_names(name) for name in self.remaining)}")
        if not lines:
            return
        if 4 * (len(missing) + len(mismatches) + len(self.remaining)) > len(self.expected):
            lines.append("are these weights of a different model?")
        raise WeightsError(f"{source or 'the weights'} do not match the model: {'; '.join(lines)}")


def _grid_of(model: Any, rows: int) -> Pair | None:
    """The model's patch grid: `grid` in our models, `patch_embed.grid_size` in timm's."""
    grid = getattr(model, "grid", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or grid[0] * grid[1] > rows:
        return None
    return int(grid[0]), int(grid[1])


def _guess_grid(rows: int, prefix: int, new: Pair) -> Pair | None:
    """The grid of a position embedding with `rows` rows: square if possible, else the model's."""
    for tokens in dict.fromkeys((prefix, 1, 0, 2)):
        side = math.isqrt(max(rows - tokens, 0))
        if side and side * side == rows - tokens:
            return side, side
    return new if new[0] * new[1] + prefix == rows else None

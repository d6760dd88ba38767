"""Loading a file's tensors into a model, with a report on each.

Resized, adapted and unused tensors are reported; any other mismatch is an error, and then nothing is loaded.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import WeightsError
from vitrail.utils.text import format_shape, join_names, printable
from vitrail.weights.heads import HeadDecision, HeadPolicy, decide_head, head_names, num_classes_of
from vitrail.weights.report import Entry, Report
from vitrail.weights.resample import adapt_channels, resample_bias_table, resample_patches, resample_positions
from vitrail.weights.tensors import Tensors

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
        num_classes: as requested; None if not, and then the file's head must match.
        class_names: of the model's classes, where they are known.
        file_class_names: of the classes that the file's head knows, where they are known.
        heads: "keep" the file's head or fail, "new" for a fresh one, "auto" to keep what certainly fits.
        grid: rows and columns of the file's position embedding, where they are known. Else it is taken to be square, or
            the model's own.
        source, layout: for the report.

    Raises:
        WeightsError: any mismatch that is not one of the above; it names the tensors and both shapes. The model is then
            as it was.
    """
    plan = _Plan(model, Tensors(tensors), grid)
    decision = decide_head(
        num_classes_of(tensors),
        num_classes_of(plan.wanted),
        asked=num_classes,
        old_names=file_class_names,
        new_names=class_names,
        policy=heads,
    )
    plan.take_head(decision)
    plan.take_tokens()
    plan.take_rest()
    plan.check(source)
    report = Report(
        plan.in_order(),
        source=source,
        layout=layout,
        notes=[*tensors.notes],
        warnings=[decision.warning] if decision.warning else [],
    )
    model.load_state_dict(plan.state, strict=True)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=2)
    return report


@dataclass
class _Plan:
    """What will be loaded, decided tensor by tensor before the model is touched."""

    model: nn.Module
    left: Tensors  # not yet placed
    grid: Pair | None
    wanted: dict[str, Tensor] = field(init=False)
    file_names: set[str] = field(init=False)
    state: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    unused: list[Entry] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)  # the model's name -> what is wrong
    settled: set[str] = field(default_factory=set)  # names that need no problem of their own
    added: list[str] = field(default_factory=list)  # tokens to which their position was added

    def __post_init__(self) -> None:
        self.wanted = self.model.state_dict()
        self.file_names = set(self.left)
        self.unused += [Entry(name, "unused", how=why) for name, why in self.left.unused.items()]

    def put(self, name: str, value: Tensor, state: str, how: str, old: Tensor | None) -> None:
        """Decide on one of the model's tensors."""
        wanted = self.wanted[name]
        self.state[name] = value
        shape = None if old is None else tuple(old.shape)
        origin = self.left.origin.get(name, "") if old is not None else ""
        self.entries[name] = Entry(name, state, shape, tuple(wanted.shape), how, origin)

    def leave(self, name: str, why: str) -> None:
        tensor = self.left.pop(name)
        self.unused.append(Entry(self.left.file_name(name), "unused", old=tuple(tensor.shape), how=why))

    def place(self, name: str, value: Tensor, state: str = "loaded", how: str = "") -> None:
        """Take the tensor `name` out of the file's, changed into `value`; its shape and kind must be the model's."""
        old, wanted = self.left.pop(name), self.wanted[name]
        if value.shape != wanted.shape:
            self.mismatch(name, old)
        elif not _alike(value, wanted):
            self.problems[name] = f"{self.both_names(name)} holds {_kind(value)}, where the model needs {_kind(wanted)}"
        else:
            if value.dtype != wanted.dtype:
                how = "; ".join(filter(None, [how, f"{_kind(value)} to {_kind(wanted)}"]))
            self.put(name, value, state, how, old)

    def both_names(self, name: str) -> str:
        called = self.left.file_name(name)
        return printable(name) if called == name else f"{printable(name)} ({printable(called, 300)} in the file)"

    def mismatch(self, name: str, old: Tensor, hint: str = "") -> None:
        shapes = f"{format_shape(old.shape)} in the file and {format_shape(self.wanted[name].shape)} in the model"
        self.problems[name] = f"{self.both_names(name)} is {shapes}{hint}"

    def take_head(self, decision: HeadDecision) -> None:
        """Both heads, where there are two, go the same way."""
        in_file, in_model = head_names(self.left), head_names(self.wanted)
        if decision.keep and not decision.problem:
            for name in in_file:
                if decision.rows is not None and name in self.wanted and self.left[name].ndim:
                    self.place(name, self.left[name][list(decision.rows)], how=decision.why)
            return  # where there is nothing to permute, the head is like any other tensor
        if decision.problem:
            hint = "; give num_classes for a new head, or 0 for none"
            if not in_file:
                self.problems[in_model[0]] = f"{decision.why}, and the model needs {join_names(in_model)}{hint}"
                self.settled |= {*in_model}
            for name in in_file:
                tensor = self.left.pop(name)
                if name in self.wanted:
                    self.mismatch(name, tensor, hint)
            return
        for name in in_file:
            self.leave(name, decision.why)
        for name in in_model:
            self.put(name, self.wanted[name], "new", decision.why, None)

    def take_tokens(self) -> None:
        """The position embedding, resampled; and the prefix tokens, where only one side embeds their position."""
        table, wanted = self.left.get("pos_embed"), self.wanted.get("pos_embed")
        if table is None or wanted is None:
            return
        new = _grid_of(self.model, wanted.shape[1])
        if table.ndim != 3 or new is None or table.shape[::2] != wanted.shape[::2]:
            return  # not understood; the rest compares the shapes
        prefix = wanted.shape[1] - new[0] * new[1]
        old = self.grid if self.grid and self.grid[0] * self.grid[1] <= table.shape[1] else None
        old = old or _guess_grid(table.shape[1], prefix, new)
        if old is None:
            return
        how = [] if old == new else [f"bicubic, from a grid of {format_shape(old)} to {format_shape(new)}"]
        have = table.shape[1] - old[0] * old[1]
        grid = resample_positions(table[:, have:], old, new)
        if have == prefix:
            value = torch.cat([table[:, :have], grid], dim=1)
        elif prefix == 0 and self.add_positions(table[:, :have]):
            value = grid
            how.append(f"the position embedding of {' and '.join(self.added)} is added to the token")
        elif have == 0:
            value = torch.cat([torch.zeros_like(table[:, :1]).expand(-1, prefix, -1), grid], dim=1)
            how.append("the prefix tokens include their position, so it is 0 here")
        else:
            return
        self.place("pos_embed", value, "resized" if how else "loaded", "; ".join(how))

    def add_positions(self, rows: Tensor) -> bool:
        """Add a row each to the first prefix tokens; whether there are as many."""
        known = ["cls_token", "dist_token"]
        tokens = [name for name in known if name in self.left and name in self.wanted]
        if len(tokens) < rows.shape[1] or any(self.left[name].shape != rows[:, :1].shape for name in tokens):
            return False
        self.added = tokens[: rows.shape[1]]
        for index, name in enumerate(self.added):
            self.place(
                name, self.left[name] + rows[:, index : index + 1], "adapted", "its position embedding is added to it"
            )
        return True

    def take_rest(self) -> None:
        """Every tensor that has its place in the model, by name."""
        first = next((name for name in _FIRST_CONVOLUTIONS if name in self.wanted), None)
        for name, wanted in self.wanted.items():
            if name in self.entries:
                continue
            if name not in self.left:
                if name.endswith(_COUNTER) and not any(other.endswith(_COUNTER) for other in self.file_names):
                    self.put(
                        name, wanted, "new", "old files do not have this counter, and inference does not use it", None
                    )
                continue
            tensor = self.left[name]
            if name.endswith(_BIAS_TABLE):
                self.take_bias_table(name, tensor)
            elif name == first and tensor.ndim == 4 and tensor.shape != wanted.shape:
                self.take_first_convolution(name, tensor)
            else:
                self.place(name, tensor)

    def take_bias_table(self, name: str, tensor: Tensor) -> None:
        """Swin's biases, for the window that the model has here."""
        wanted = self.wanted[name]
        attention = self.model.get_submodule(name.rpartition(".")[0])
        new = getattr(attention, "window", None) or getattr(attention, "window_size", None)
        side = math.isqrt(tensor.shape[0]) if tensor.ndim == 2 else 0
        if new is None or side * side != tensor.shape[0] or side % 2 == 0 or tensor.shape[1:] != wanted.shape[1:]:
            return self.place(name, tensor)  # square windows are all that is published
        old, new = ((side + 1) // 2, (side + 1) // 2), (int(new[0]), int(new[1]))
        if old == new:
            return self.place(name, tensor)
        how = f"from windows of {format_shape(old)} to {format_shape(new)}"
        return self.place(name, resample_bias_table(tensor, old, new), "resized", how)

    def take_first_convolution(self, name: str, tensor: Tensor) -> None:
        """Other channels, and for patches another size."""
        wanted, value, how, state = self.wanted[name], tensor, [], "adapted"
        if value.shape[1] != wanted.shape[1]:
            value = adapt_channels(value, wanted.shape[1])
            how.append(f"{tensor.shape[1]} to {wanted.shape[1]} channels")
        if name == "patch_embed.proj.weight" and value.shape[2:] != wanted.shape[2:]:
            value = resample_patches(value, (wanted.shape[2], wanted.shape[3]))
            how.append(f"pseudo-inverse resize from patches of {format_shape(tensor.shape[2:])}")
            state = "resized"
        self.place(name, value, state, ", ".join(how))

    def check(self, source: str) -> None:
        """Raise what remains: missing tensors, tensors without a place, shapes."""
        accounted = {*self.entries, *self.problems, *self.settled}
        missing = [name for name in self.wanted if name not in accounted]
        lines = [*self.problems.values()][:8]
        if len(self.problems) > 8:
            lines.append(f"{len(self.problems) - 8} more differ in shape")
        if missing:
            lines.append(f"missing from the file: {join_names(missing)}")
        if self.left:
            lines.append(f"unexpected in the file: {join_names(self.both_names(name) for name in self.left)}")
        if not lines:
            return
        if 4 * (len(missing) + len(self.problems) + len(self.left)) > len(self.wanted):
            lines.append("are these weights of a different model?")
        raise WeightsError(f"{source or 'the weights'} do not match the model: {'; '.join(lines)}")

    def in_order(self) -> list[Entry]:
        return [*(replace(self.entries[name]) for name in self.wanted), *self.unused]


def _alike(value: Tensor, wanted: Tensor) -> bool:
    """Whether numbers of this kind can be copied into that tensor without changing their meaning."""
    dense = value.layout == torch.strided and not value.is_quantized and not value.is_complex()
    return dense and value.is_floating_point() == wanted.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _grid_of(model: Any, rows: int) -> Pair | None:
    """The model's patches, rows and columns: ours say `grid`, timm's `patch_embed.grid_size`."""
    grid = getattr(model, "grid", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or grid[0] * grid[1] > rows:
        return None
    return int(grid[0]), int(grid[1])


def _guess_grid(rows: int, prefix: int, new: Pair) -> Pair | None:
    """The grid of a table of so many rows: square, as everything published, or else the model's own."""
    for tokens in dict.fromkeys((prefix, 1, 0, 2)):
        side = math.isqrt(max(rows - tokens, 0))
        if side and side * side == rows - tokens:
            return side, side
    return new if new[0] * new[1] + prefix == rows else None

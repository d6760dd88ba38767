"""The report on loaded weights, tensor by tensor."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from vitrail.utils.text import counted, format_shape, join_names, printable


@dataclass(frozen=True)
class Entry:
    """One tensor. `name` is the model's (the file's if unused), `file` the file's name if different, `old` and `new`
    the shapes in file and model, `how` the change and its reason."""

    name: str
    state: str
    old: tuple[int, ...] | None = None
    new: tuple[int, ...] | None = None
    how: str = ""
    file: str = ""


@dataclass
class Report:
    """The entries in the model's order, then the unused ones. casts: such as "150 cast from float16 to float32"."""

    entries: list[Entry]
    source: str = ""
    layout: str = ""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    casts: str = ""

    def of(self, state: str) -> list[Entry]:
        """The entries that are "loaded", "resized", "adapted", "new" or "unused"."""
        return [entry for entry in self.entries if entry.state == state]

    def __str__(self) -> str:
        """One line."""
        parts = [f"{counted(len(self.of('loaded')), 'tensor')} loaded"]
        for state in ("resized", "adapted"):
            if entries := self.of(state):
                parts.append(f"{len(entries)} {state} ({_summary(entries)})")
        if new := self.of("new"):
            parts.append(f"{len(new)} new ({join_names((entry.name for entry in new), 4)}: {_how(new)})")
        if unused := self.of("unused"):
            parts.append(f"{len(unused)} unused ({_how(unused)})")
        text = "; ".join(filter(None, [*parts, self.casts]))
        origin = " from " + self.source if self.source else ""
        return f"weights{origin}: {text}" + "".join(f"; warning: {warning}" for warning in self.warnings)

    def table(self) -> str:
        """One line per tensor: state, name, shapes, change, and the file's name if different."""
        rows = [
            (
                entry.state,
                printable(entry.name),
                _shapes(entry),
                "; ".join(filter(None, (entry.how, entry.file and f"in the file {printable(entry.file, 200)}"))),
            )
            for entry in self.entries
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]
        return "\n".join([str(self), *self.notes, *lines])


def _shapes(entry: Entry) -> str:
    old, new = (format_shape(shape) if shape is not None else "" for shape in (entry.old, entry.new))
    return old if old == new or not new else f"{old} -> {new}" if old else new


def _summary(entries: list[Entry]) -> str:
    """The first entry, and the number of the remaining ones."""
    first = entries[0]
    more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
    return f"{first.name} {_shapes(first)}{more}, {_how(entries)}"


def _how(entries: Iterable[Entry]) -> str:
    return "; ".join(dict.fromkeys(entry.how for entry in entries if entry.how))

"""A state dict that keeps the names of the file."""

from collections.abc import Iterable, Mapping

from torch import Tensor


class Tensors(dict[str, Tensor]):
    """A state dict under conversion.

    origin: new name -> the file's name (joined by " + " for merged tensors), for renamed tensors only.
    unused: the file's name -> the reason, for tensors that were removed.
    notes: sentences for the report, such as which of a checkpoint's state dicts was used.
    outside: names that lack the wrapper prefix of the other tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = ()) -> None:
        super().__init__(tensors)
        self.origin: dict[str, str] = {}
        self.unused: dict[str, str] = {}
        self.notes: list[str] = []
        self.outside: set[str] = set()
        if isinstance(tensors, Tensors):
            self.origin |= tensors.origin
            self.unused |= tensors.unused
            self.notes += tensors.notes
            self.outside |= tensors.outside

    def file_name(self, name: str) -> str:
        """The name of the tensor in the file."""
        return self.origin.get(name, name)

    def empty_copy(self) -> "Tensors":
        """Without tensors, with the same notes and unused names."""
        empty = Tensors()
        empty.unused |= self.unused
        empty.notes += self.notes
        return empty

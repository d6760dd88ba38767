"""A state dict on its way from a file to a model, with the names that the file used."""

from collections.abc import Iterable, Mapping

from torch import Tensor


class Tensors(dict[str, Tensor]):
    """A state dict with its history.

    origin: name here -> the file's name (names joined by " + " where several were put together). Only what was renamed.
    unused: the file's name -> why the model has no use for that tensor. Those tensors are not among the items.
    notes: sentences for the report, such as which of a checkpoint's state dicts was taken.
    outside: names without the wrapper's prefix that the others have.
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
        """The file's name of the tensor `name`."""
        return self.origin.get(name, name)

    def empty_copy(self) -> "Tensors":
        """No tensors, with the notes and unused names of this one."""
        empty = Tensors()
        empty.unused |= self.unused
        empty.notes += self.notes
        return empty

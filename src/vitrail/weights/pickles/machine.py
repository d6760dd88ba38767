"""The stack machine of pickle, for tensors and plain containers only: it imports and calls nothing that a file names.

What a file may take is bounded before it is allocated: the number of its instructions, and the memory of its tensors.
"""

import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vitrail.utils.text import join_names

MAX_PICKLE = 16 << 20  # bytes, without the tensors' data
_MAX_INSTRUCTIONS = 1_000_000  # about 25 for a tensor
_MAX_EXPANSION = 2  # the tensors' memory to the file's size, above _SPARE: they may share data
_SPARE = 64 << 20

_STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
_STORAGE_TYPES: dict[str, torch.dtype] = {
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{place}{kind}Storage": dtype for place in ("", "cuda.") for kind, dtype in _STORAGES.items()},
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_UNSUPPORTED = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of another class",
}
_PLAIN = {f"{module}.{name}" for module, name in (  # their values are not used
    ("_codecs", "encode"), ("argparse", "Namespace"), ("builtins", "bytearray"), ("builtins", "complex"),
    ("builtins", "set"), ("torch", "Tensor"), ("torch", "device"), ("torch.serialization", "_get_layout"),
)}  # fmt: skip
_MAPPINGS = {"collections.OrderedDict", "collections.Counter", "collections.defaultdict"}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


Instructions = list[tuple[str, Any]]
StorageOf = Callable[[str, torch.dtype, int], Tensor]  # key, dtype, elements -> a flat tensor


@dataclass(frozen=True)
class _Global:
    """A name such as "torch._utils._rebuild_tensor_v2", which stays a name."""

    name: str


_OPAQUE = _Global("")  # a value that is not used
_MARK = _Global("mark")


class Refused(Exception):
    """Why a file is not read, without its path."""


def parse(file: BinaryIO) -> Instructions:
    """The instructions of one pickle. Raises ValueError if it is damaged, Refused if it has too many."""
    found: Instructions = []
    for code, value, _ in pickletools.genops(file):
        found.append((code.name, value))
        if len(found) > _MAX_INSTRUCTIONS:
            raise Refused(too_long())
    return found


def too_long() -> str:
    return f"describes its tensors in more than {MAX_PICKLE >> 20} MiB or {_MAX_INSTRUCTIONS:,} steps: do not trust it"


class Machine:
    """The stack machine of pickle, for tensors and plain containers."""

    def __init__(self, storage_of: StorageOf, file_size: int) -> None:
        self.storage_of = storage_of
        self.allowed = _MAX_EXPANSION * file_size + _SPARE  # bytes
        self.copies = 0  # of pairs
        self.unknown: dict[str, None] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, instructions: Iterable[tuple[str, Any]]) -> Any:
        """The object that a pickle describes."""
        for name, value in instructions:
            if name in _VALUES:
                self.stack.append(value)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _PUT:
                self.memo[int(value)] = self.stack[-1]
            elif name in _GET:
                self.stack.append(self.memo[int(value)])
            elif name == "GLOBAL":
                self.stack.append(self.named(*value.split(" ", 1)))
            elif method := getattr(self, f"_{name.lower()}", None):
                method()
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise ValueError(f"the instruction {name} is not of a checkpoint")
        if self.unknown:
            raise Refused(
                f"needs Python code to be read ({join_names(self.unknown, 4)}), which is not run: if you trust the "
                "file, load it with torch.load(..., weights_only=False) and save its state_dict() as safetensors"
            )
        (result,) = self.stack
        return result

    def named(self, module: str, name: str) -> Any:
        """A name of the file; those that are not known are collected for the message."""
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full in _DTYPES:
            return _DTYPES[full]
        known = full.startswith("torch._utils._rebuild_") or full in _PLAIN | _MAPPINGS | _STORAGE_TYPES.keys()
        if not known and full not in _CALLS:
            self.unknown[full] = None
        return _Global(full)

    def call(self, function: Any, arguments: Any) -> Any:
        """What a function of the table would return."""
        name = function.name if isinstance(function, _Global) else ""
        if name in _UNSUPPORTED:
            raise Refused(f"contains {_UNSUPPORTED[name]}: save dense tensors")
        if name in _CALLS:
            return _CALLS[name](self, *arguments)
        if name in _MAPPINGS:
            pairs = arguments[0] if arguments else None
            if isinstance(pairs, dict):
                return pairs
            if not isinstance(pairs, list):
                return {}
            self.copies += len(pairs)
            if self.copies > _MAX_INSTRUCTIONS:
                raise Refused(too_long())
            return _checked({}, (part for key, value in pairs for part in (key, value)))
        if name.startswith("torch._utils._rebuild_"):
            self.unknown[name] = None
        return _OPAQUE

    def tensor(self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        """A view of a storage, within its bounds."""
        if not all(type(x) is int and x >= 0 for x in (offset, *size, *stride)) or len(size) != len(stride):
            raise ValueError("a tensor has no valid shape")
        count = 1
        for length in size:
            count *= length
        end = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1 if count else 0
        if end > storage.numel():
            raise ValueError("a tensor is larger than its data")
        self.allowed -= count * storage.dtype.itemsize
        if self.allowed < 0:
            raise Refused(f"has tensors of more than {_MAX_EXPANSION} times its size: do not trust it")
        return storage.as_strided(size, stride, offset)

    def pop_mark(self) -> list[Any]:
        """The values above the last mark, without it."""
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("no mark")
        values = self.stack[start + 1 :]
        del self.stack[start:]
        return values

    def _mark(self) -> None:
        self.stack.append(_MARK)

    def _pop(self) -> None:
        self.stack.pop()

    def _pop_mark(self) -> None:
        self.pop_mark()

    def _dup(self) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self.named(str(module), str(name)))

    def _empty_dict(self) -> None:
        self.stack.append({})

    def _empty_list(self) -> None:
        self.stack.append([])

    def _empty_tuple(self) -> None:
        self.stack.append(())

    def _empty_set(self) -> None:
        self.stack.append(_OPAQUE)

    def _frozenset(self) -> None:
        self.pop_mark()
        self.stack.append(_OPAQUE)

    def _dict(self) -> None:
        self.stack.append(_checked({}, self.pop_mark()))

    def _list(self) -> None:
        self.stack.append(self.pop_mark())

    def _tuple(self) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def _tuple1(self) -> None:
        self._make_tuple(1)

    def _tuple2(self) -> None:
        self._make_tuple(2)

    def _tuple3(self) -> None:
        self._make_tuple(3)

    def _make_tuple(self, length: int) -> None:
        values = tuple(self.stack[-length:])
        del self.stack[-length:]
        self.stack.append(values)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    _additems = _appends

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _setitems(self) -> None:
        self._update(self.pop_mark())

    def _update(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            _checked(self.stack[-1], values)

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack.append(self.call(self.stack.pop(), arguments))

    _newobj = _reduce

    def _newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self._reduce()

    def _build(self) -> None:
        self.stack.pop()  # attributes, which are not used

    def _binpersid(self) -> None:
        kind, storage_type, key, _, count, *view = self.stack.pop()
        dtype = _STORAGE_TYPES.get(getattr(storage_type, "name", ""))
        if kind != "storage" or dtype is None or any(view_of is not None for view_of in view):
            raise ValueError("a storage of an unknown kind")
        if type(count) is not int or not 0 <= count < 1 << 48:
            raise ValueError("a storage of no valid size")
        self.stack.append(self.storage_of(str(key), dtype, count))


def _checked(target: dict[Any, Any], values: Iterable[Any]) -> dict[Any, Any]:
    """`target` with the keys and values that alternate in `values`. A key is text or a number of 64 bits."""
    pairs = iter(values)
    for key in pairs:
        if not isinstance(key, str) and not (isinstance(key, int) and key.bit_length() < 64):
            raise ValueError(f"a key is a {type(key).__name__}")
        target[key] = next(pairs)
    return target


def _typed(
    machine: Machine, storage: Tensor, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    """A tensor of a storage of bytes."""
    flat = storage[: storage.numel() // dtype.itemsize * dtype.itemsize]
    return machine.tensor(flat.view(dtype), offset, size, stride)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": Machine.tensor,
    "torch._utils._rebuild_tensor_v2": Machine.tensor,
    "torch._utils._rebuild_tensor_v3": _typed,
    "torch._utils._rebuild_parameter": lambda machine, data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda machine, data, *_: data,
    "torch.nn.parameter.Parameter": lambda machine, data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda machine, function, kind, arguments, *_: machine.call(
        function, arguments
    ),
    "torch.Size": lambda machine, sizes=(): sizes,
}

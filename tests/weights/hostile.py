"""Hostile checkpoints and folders, made from a seed; run as a program, it loads each of them under limits.

    python tests/weights/hostile.py FOLDER

prints one JSON line for each: its name, the outcome, the message, CPU seconds, and the growth of the peak memory. The
address space may grow by GROWTH beyond what the process has after importing torch and loading one good folder.
"""

import io
import itertools
import json
import pickle
import resource
import signal
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save, save_file

GROWTH = 768 << 20  # bytes
SECONDS = 10
MARK = "code was run"

Make = Callable[[Path], Path]  # writes into an empty folder, and returns what to load


class Call:
    """Pickled as a call of a function by name."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(4, 3), "b": torch.randn(3)}


def zipped(instructions: bytes, data: dict[str, bytes] | None = None, **extra: bytes) -> bytes:
    """A torch.save archive with these instructions as data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", instructions)
        for key, content in (data or {"0": b"\0" * 48}).items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in {"version": b"3\n", "byteorder": b"little", **extra}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def stream(instructions: bytes) -> bytes:
    """A file of torch before 1.6 with these instructions as its content."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    keys = pickle.dumps(["0"], 2)
    return b"".join(pickle.dumps(x, 2) for x in head) + instructions + keys + struct.pack("<q", 12) + b"\0" * 48


def instructions(body: bytes) -> bytes:
    """A dict with one key, "a", whose value these instructions make."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + body + b"s."


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def tensor(shape: list[int], stride: list[int], offset: int = 0, count: int = 12, kind: str = "FloatStorage") -> bytes:
    """Instructions for a tensor of the storage "0"."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu") + number(count) + b"tQ"
    sizes = b"(" + b"".join(map(number, shape)) + b"t" + b"(" + b"".join(map(number, stride)) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes + b"\x89" + b"N" + b"tR"


def call(name: str, *arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n(".encode() + b"".join(arguments) + b"tR"


def _gadgets(mark: Path) -> dict[str, Any]:
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    return {
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(mark), "w"),
        "system": Call(__import__("os").system, f"touch '{mark}'"),
        "popen": Call(__import__("subprocess").Popen, ["touch", str(mark)]),
        "import": Call(__import__, "antigravity"),
        "getattr": Call(getattr, "x", "upper"),
        "compile": Call(compile, code, "x", "exec"),
        "map": Call(map, eval, (code,)),
        "touch": Call(Path.touch, mark),
        "module": torch.nn.Linear(1, 1),
        "numpy scalar": np.float64(1.0),
        "numpy array": np.zeros(3),
        "torch.load": Call(torch.load, str(mark)),
        "torch.hub": Call(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"),
        "partial": Call(__import__("functools").partial, eval, code),
    }


def _pickles() -> dict[str, bytes]:
    """Instructions that no torch.save writes."""
    deep = b"}" + b"".join(text("model") + b"}" for _ in range(30_000)) + b"s" * 30_000
    doubling = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    cases = {
        "bytearray of a terabyte": call("builtins.bytearray", number(1 << 40)),
        "bytearray of a gigabyte": call("__builtin__.bytearray", number(1 << 30)),
        "list of a bytearray": call("builtins.list", call("builtins.bytearray", number(1 << 33))),
        "rows without end": tensor([10**9, 4], [0, 1]),
        "2^62 rows": tensor([1 << 62], [0]),
        "shape that overflows": tensor([1 << 40, 1 << 40], [1, 1]),
        "negative shape": tensor([-4, 3], [3, 1]),
        "negative stride": tensor([4, 3], [-3, 1], 11),
        "negative offset": tensor([2], [1], -8),
        "offset beyond the data": tensor([4, 3], [3, 1], 9),
        "more than the storage": tensor([5, 3], [3, 1]),
        "storage larger than its data": tensor([400, 3], [3, 1], count=1200),
        "storage of a petabyte": tensor([4], [1], count=1 << 50),
        "negative storage": tensor([4], [1], count=-4),
        "unknown storage": tensor([4], [1], kind="EvilStorage"),
        "complex numbers": tensor([4], [1], kind="ComplexFloatStorage", count=6),
        "10,000 copies": b"]" + b"(" + tensor([1000, 12], [0, 1]) * 10_000 + b"e",
        "sparse": call("torch._utils._rebuild_sparse_tensor", call("torch.serialization._get_layout", text("x")), b")"),
        "meta": call("torch._utils._rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n", b")", b")", b"\x89"),
        "quantised": call("torch._utils._rebuild_qtensor", b")"),
        "nested tensor": call("torch._utils._rebuild_nested_tensor", b")"),
        "numpy on a device": call("torch._utils._rebuild_device_tensor_from_numpy", b")"),
        "wrapper": call("torch._utils._rebuild_wrapper_subclass", b")"),
        "stack is empty": b"000000",
        "no mark": b"t",
        "unknown memo": b"j\xff\xff\xff\x7f",
        "huge memo": b"Nr\xff\xff\xff\x7f",
        "tuple of itself": b"(tq\x00h\x00\x86",
        "list in itself": b"]q\x00h\x00a",
        "dict in itself": b"}q\x00" + text("model") + b"h\x00s",
        "deep dicts": deep,
        "deep tuples": b")" + b"\x85" * 100_000,
        "key of nested tuples": b"}" + doubling + b"Ns",
        "key of a tuple": b"})Ns",
        "key of a list": b"}]Ns",
        "key of None": b"}NNs",
        "key of a huge number": b"}\x8b" + struct.pack("<i", 60_000) + b"\x01" * 60_000 + b"Ns",
        "text of exabytes": b"\x8d" + struct.pack("<Q", 1 << 60) + b"x",
        "bytes of exabytes": b"\x8e" + struct.pack("<Q", 1 << 60) + b"x",
        "bytearray of exabytes": b"\x96" + struct.pack("<Q", 1 << 60) + b"x",
        "number of many digits": b"L" + b"9" * 100_000 + b"L\n",
        "no number": b"Iabc\n",
        "extension": b"\x82\x01",
        "persistent text": b"P0\n",
        "persistent number": b"K\x01Q",
        "instance": b"(ios\nsystem\n",
        "object": b"(cos\nsystem\n" + text("true") + b"o",
        "stack global": text("os") + text("system") + b"\x93" + text("true") + b"\x85R",
        "names from memory": text("os") + b"q\x00" + text("system") + b"q\x01h\x00h\x01\x93" + text("true") + b"\x85R",
        "call of a number": b"K\x01)R",
        "call of a tensor": tensor([4], [1]) + b")R",
        "call without arguments": call("torch._utils._rebuild_tensor_v2"),
        "call of itself": b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00Nh\x00Nt"
        + b"q\x01(h\x00Nh\x01Nt" * 2000 + b"R",
        "pairs, many times": b"](" + b"(K\x01Nt" * 20_000 + b"eq\x00"
        + b"0ccollections\nOrderedDict\n(h\x00tR" * 5000,
        "build of a class": b"ccollections\nOrderedDict\n}" + text("x") + b"Nsb",
        "new object": b"cargparse\nNamespace\n)\x81}" + text("__class__") + b"Nsb",
        "Size of text": call("torch.Size", text("x" * 1000)),
        "million numbers": b"](" + b"K\x01" * 1_200_000 + b"e",
        "frozen sets": b"(" * 1000 + b")" + b"\x91" * 1000,
        "not a number as a shape": call("torch._utils._rebuild_tensor_v2", b"N", b"N", b"N", b"N"),
        "data of another type": tensor([4], [1], kind="storage\nUntypedStorage"[8:]),
    }  # fmt: skip
    return {name: instructions(body) for name, body in cases.items()}


def _many(count: int, length: int) -> bytes:
    """Instructions for so many tensors with names of this length."""
    one = tensor([1], [1])
    names = (f"{i:0{length}d}" for i in range(count))
    return b"\x80\x02}(" + b"".join(text(name) + one for name in names) + b"u."


def _file(name: str, content: Callable[[Path], bytes]) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content(folder))
        return folder / name

    return make


def torch_files() -> Iterator[tuple[str, Make]]:
    for name in _gadgets(Path("x")):
        for old, place in itertools.product((False, True), ("model", "alone")):

            def content(folder: Path, name: str = name, old: bool = old, place: str = place) -> bytes:
                gadget, buffer = _gadgets(folder.parent / MARK)[name], io.BytesIO()
                what = gadget if place == "alone" else {"model": {**_weights(), "x": gadget}}
                torch.save(what, buffer, _use_new_zipfile_serialization=not old)
                return buffer.getvalue()

            yield f"gadget {name}, {'old' if old else 'zip'}, {place}", _file("w.pth", content)
    for name, body in _pickles().items():
        yield f"zip: {name}", _file("w.pth", lambda _, body=body: zipped(body))
        yield f"old: {name}", _file("w.pth", lambda _, body=body: stream(body))
        yield f"bare: {name}", _file("w.pkl", lambda _, body=body: body)
    good = instructions(tensor([4, 3], [3, 1]))
    keys, nets = pickle.dumps(["0"], 2), text("net." * 50_000)
    yield from {
        "20,000 tensors": _file("w.pth", lambda _: zipped(_many(20_000, 8))),
        "100,000 tensors": _file("w.pth", lambda _: zipped(_many(100_000, 8))),
        "long names": _file("w.pth", lambda _: zipped(_many(20, 100_000))),
        "a prefix without end": _file("w.pth", lambda _: zipped(instructions(b"N").replace(text("a"), nets))),
        "big-endian": _file("w.pth", lambda _: zipped(good, byteorder=b"big")),
        "no data": _file("w.pth", lambda _: zipped(good, {"1": b"\0" * 48})),
        "short data": _file("w.pth", lambda _: zipped(good, {"0": b"\0" * 40})),
        "two pickles": _file("w.pth", lambda _: zipped(good, **{"x/data.pkl": good})),
        "scripted": _file("w.pth", lambda _: zipped(good, **{"code/x.py": b"import os"})),
        "pickle of zeros": _file("w.pth", lambda _: zipped(b"\0" * (20 << 20))),
        "long pickle": _file("w.pth", lambda _: zipped(b"\x80\x02" + b"N0" * (9 << 20) + b"N.")),
        "tar": _file("w.pth", lambda _: b"x" * 257 + b"ustar" + b"\0" * 2000),
        "keys that are missing": _file("w.pth", lambda _: stream(good).replace(keys, pickle.dumps([], 2))),
        "keys that are unknown": _file("w.pth", lambda _: stream(good).replace(keys, pickle.dumps(["9"], 2))),
        "negative length": _file("w.pth", lambda _: stream(good).replace(b"\x0c" + b"\0" * 7, b"\xff" * 8)),
        "other magic": _file("w.pth", lambda _: stream(good).replace(b"\x6c\xfc\x9c\x46", b"\x6c\xfc\x9c\x47")),
    }.items()  # fmt: skip


def _npy(header: str, data: bytes = b"\0" * 48, version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def _npz(member: bytes, *, deflated: bool = False, name: str = "a.npy") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        archive.writestr(name, member)
    return buffer.getvalue()


def archives() -> Iterator[tuple[str, Make]]:
    def header(descr: str = "'<f4'", shape: str = "(4, 3)", order: str = "False") -> str:
        return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"

    members = {
        "a terabyte of rows": _npy(header(shape="(1000000000000,)")),
        "overflowing shape": _npy(header(shape="(4611686018427387904, 4)")),
        "negative shape": _npy(header(shape="(-4, 3)")),
        "shape of text": _npy(header(shape="'x'")),
        "objects": _npy(header(descr="'|O'")),
        "structure": _npy(header(descr="[('a', '<f4'), ('b', '|O')]")),
        "text": _npy(header(descr="'<U12'")),
        "dates": _npy(header(descr="'<M8[s]'", shape="(6,)")),
        "void": _npy(header(descr="'|V48'", shape="()")),
        "complex": _npy(header(descr="'<c8'", shape="(6,)")),
        "long double": _npy(header(descr="'<f16'", shape="(3,)")),
        "code in the header": _npy("{'descr': __import__('os').system('true')}"),
        "deep header": _npy("(" * 5000),
        "no header": _npy(""),
        "long header": _npy(header() + " " * 60_000),
        "version 9": _npy(header(), version=b"\x09\x00"),
        "version 3": _npy(header(), version=b"\x03\x00"),
        "short": _npy(header(), b"\0" * 40),
        "long": _npy(header(), b"\0" * 400),
        "nothing": b"",
        "zero width": _npy(header(descr="'|S0'", shape="(1000000000000,)")),
    }
    for name, member in members.items():
        yield f"npz: {name}", _file("w.npz", lambda _, member=member: _npz(member))
    good = _npy(header())
    yield from {
        "npz: bomb": _file("w.npz", lambda _: _npz(good + b"\0" * (200 << 20), deflated=True)),
        "npz: path": _file("w.npz", lambda _: _npz(good, name="../../a.npy")),
        "npz: control characters": _file("w.npz", lambda _: _npz(good, name="\x1b[2J\n.npy")),
        "npz: damaged": _file("w.npz", lambda _: _npz(good).replace(b"NUMPY", b"NUMPX")),
        "npz: encrypted": _file("w.npz", lambda _: _npz(good).replace(b"\x04\x14\x00\x00", b"\x04\x14\x00\x01")),
        "zip: 200,000 entries": _file("w.npz", lambda _: _entries(200_000)),
        "zip: nothing": _file("w.npz", lambda _: b"PK\x05\x06" + b"\0" * 18),
        "zip: half": _file("w.npz", lambda _: _npz(good)[: len(_npz(good)) // 2]),
        "zip: other method": _file("w.npz", lambda _: _npz(good).replace(b"\x00\x00\x00\x00", b"\x63\x00\x00\x00", 1)),
    }.items()  # fmt: skip


def _entries(count: int) -> bytes:
    """A directory with so many entries, all of the same empty member."""
    member = b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, 0, 0, 5, 0) + b"a.npy"
    row = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0) + b"a.npy"
    size = len(row) * count
    end64 = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, len(member))
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(member) + size, 1)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return member + row * count + end64 + locator + end


def safetensors_files() -> Iterator[tuple[str, Make]]:
    def header(content: Any, data: bytes = b"\0" * 48, length: int | None = None) -> bytes:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        return struct.pack("<Q", len(raw) if length is None else length) + raw + data

    def entry(dtype: Any = "F32", shape: Any = (4, 3), offsets: Any = (0, 48)) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    cases: dict[str, Any] = {
        "length of exabytes": header({"a": entry()}, length=(1 << 63) - 1),
        "length beyond the file": header({"a": entry()}, length=100_000),
        "30,000 names": {f"{i:08}": empty for i in range(30_000)},
        "300,000 names": {f"{i:08}": empty for i in range(300_000)},
        "deep": b'{"a":' * 100_000,
        "huge number": {"a": entry(shape=(10**400,))},
        "offsets beyond the file": {"a": entry(shape=(1 << 38,), offsets=(0, 1 << 40))},
        "offsets backwards": {"a": entry(offsets=(48, 0))},
        "overlapping": {"a": entry(), "b": entry()},
        "rows without end": {"a": entry(shape=(10**9, 768))},
        "empty of exabytes": {"a": entry(shape=(0, 1 << 62), offsets=(0, 0))},
        "shape of text": {"a": entry(shape=("x",))},
        "shape of fractions": {"a": entry(shape=(1.5,))},
        "negative shape": {"a": entry(shape=(-4, -3))},
        "unknown dtype": {"a": entry(dtype="F7")},
        "dtype of a number": {"a": entry(dtype=7)},
        "int8": {"a": entry(dtype="I8", shape=(48,))},
        "bool": {"a": entry(dtype="BOOL", shape=(48,))},
        "complex": {"a": entry(dtype="C64", shape=(6,))},
        "float8": {"a": entry(dtype="F8_E4M3", shape=(48,))},
        "no entries": {},
        "a list": [1, 2],
        "not text": b'{"\xff": 1}',
        "control characters": {"\x1b[2J\r\n": entry()},
        "name of 100,000 characters": {"x" * 100_000: entry()},
        "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry()},
        "the same name twice": b'{"a":{"dtype":"F32","shape":[4,3],"data_offsets":[0,48]},"a":{"dtype":"F32"}}',
        "NaN": json.dumps({"a": entry()}).encode().replace(b"48", b"NaN"),
    }
    for name, content in cases.items():
        raw = content if isinstance(content, bytes) and content[:1] != b"{" else header(content)
        yield f"safetensors: {name}", _file("w.safetensors", lambda _, raw=raw: raw)


VALUES: list[Any] = [
    0,
    -1,
    10**9,
    1 << 70,
    1e300,
    0.5,
    True,
    None,
    "x",
    "9" * 300,
    [],
    [1] * 300,
    {"a": 1},
    float("nan"),
]


def _vit() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A small ViT as transformers describes it, and its weights under timm's names."""
    from vitrail.models.build import build_model
    from vitrail.models.configs import ViTConfig

    config = {
        "model_type": "vit", "image_size": 16, "patch_size": 8, "num_channels": 3, "hidden_size": 12,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "layer_norm_eps": 1e-6,
        "qkv_bias": True, "hidden_act": "gelu", "id2label": {"0": "a", "1": "b", "2": "c"},
    }  # fmt: skip
    small = ViTConfig(img_size=(16, 16), patch_size=8, embed_dim=12, depth=1, num_heads=2, mlp_ratio=2.0, num_classes=3)
    torch.manual_seed(0)
    return config, build_model(small).state_dict()


def _model_folder(folder: Path) -> dict[str, Any]:
    """A model folder of vitrail, without checksums; returns its config."""
    from vitrail.classifier import Classifier
    from vitrail.images.preprocess import Preprocess
    from vitrail.models.build import build_model
    from vitrail.models.configs import ViTConfig

    torch.manual_seed(0)
    config = ViTConfig(
        img_size=(16, 16), patch_size=8, embed_dim=12, depth=1, num_heads=2, mlp_ratio=2.0, num_classes=3
    )
    Classifier(build_model(config), Preprocess(size=(16, 16)), ["a", "b", "c"]).save(folder)
    (folder / "SHA256SUMS").unlink(missing_ok=True)  # a stranger would write the right ones
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def folders() -> Iterator[tuple[str, Make]]:
    """One setting at a time of each kind of config replaced by each of VALUES."""

    def transformers(key: str, value: Any) -> Make:
        def make(folder: Path) -> Path:
            config, weights = _vit()
            save_file(weights, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps({**config, key: value}))
            return folder

        return make

    def ours(path: tuple[str, ...], value: Any) -> Make:
        def make(folder: Path) -> Path:
            config = _model_folder(folder / "m")
            section = config
            for name in path[:-1]:
                section = section[name]
            section[path[-1]] = value
            (folder / "m" / "config.json").write_text(json.dumps(config))
            return folder / "m"

        return make

    keys = ["image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "layer_norm_eps", "id2label", "model_type"]  # fmt: skip
    for key, value in itertools.product(keys, VALUES):
        yield f"transformers: {key}={repr(value)[:20]}", transformers(key, value)
    paths = [("vitrail", "config", "img_size"), ("vitrail", "config", "patch_size"), ("vitrail", "config", "depth"),
             ("vitrail", "config", "num_heads"), ("vitrail", "config", "embed_dim"), ("vitrail", "config", "mlp_ratio"),
             ("vitrail", "config", "num_classes"), ("vitrail", "preprocess", "mean"), ("vitrail", "preprocess", "std"),
             ("vitrail", "class_names"), ("vitrail", "family"), ("vitrail", "notes")]  # fmt: skip
    for path, value in itertools.product(paths, VALUES):
        yield f"ours: {'.'.join(path[1:])}={repr(value)[:20]}", ours(path, value)

    def large(folder: Path) -> Path:
        _model_folder(folder / "m")
        (folder / "m" / "config.json").write_text("[" + "[]," * (60 << 20 >> 2) + "0]")
        return folder / "m"

    def spoilt(change: Callable[[torch.Tensor], torch.Tensor]) -> Make:
        def make(folder: Path) -> Path:
            config, weights = _vit()
            weights["head.weight"] = change(weights["head.weight"])
            (folder / "model.safetensors").write_bytes(save(weights))
            (folder / "config.json").write_text(json.dumps(config))
            return folder

        return make

    yield "a config of 47 MB", large
    for name, change in {
        "NaN": lambda x: x * float("nan"),
        "infinity": lambda x: x / 0,
        "int8": lambda x: x.to(torch.int8),
        "bool": lambda x: x > 0,
        "complex": lambda x: x.to(torch.complex64),
        "too large for float32": lambda x: x.double() * 1e300,
    }.items():
        yield f"folder: weights are {name}", spoilt(change)


def damaged(count: int) -> Iterator[tuple[str, Make]]:
    """Good files with a few bytes changed: they load, or are refused."""
    rng = np.random.default_rng(12)
    buffer, old = io.BytesIO(), io.BytesIO()
    torch.save(_vit()[1], buffer)
    torch.save(_vit()[1], old, _use_new_zipfile_serialization=False)
    npz = io.BytesIO()
    np.savez(npz, **{key: value.numpy() for key, value in _vit()[1].items()})
    files = [buffer.getvalue(), old.getvalue(), npz.getvalue(), save(_vit()[1])]
    for index in range(count):
        content = bytearray(files[index % len(files)])
        limit = len(content) if index % 3 else min(len(content), 2000)
        for position in rng.integers(0, limit, 1 + index % 3):
            content[position] ^= int(rng.integers(1, 256))
        yield f"damaged {index}", _file("w.bin", lambda _, content=bytes(content): content)


def cases() -> dict[str, Make]:
    """All of them, by name."""
    found = [*torch_files(), *archives(), *safetensors_files(), *folders(), *damaged(80)]
    names = [name for name, _ in found]
    assert len(set(names)) == len(names)
    return dict(found)


def main(root: Path) -> None:
    """Load every case under the limits."""
    from vitrail.classifier import load
    from vitrail.errors import VitrailError
    from vitrail.pretrained.resolve import load_source

    _model_folder(root / "warm")
    load(root / "warm")
    found = cases()
    lines = Path("/proc/self/status").read_text().splitlines()
    address = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (address + GROWTH, resource.RLIM_INFINITY))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def late(*_: Any) -> None:
        raise TimeoutError("too long")

    signal.signal(signal.SIGPROF, late)
    for index, (name, make) in enumerate(found.items()):
        folder = root / str(index)
        folder.mkdir()
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        source = make(folder)
        resource.setrlimit(resource.RLIMIT_AS, (address + GROWTH, resource.RLIM_INFINITY))
        start, outcome, message = time.process_time(), "loaded", ""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                weights = load_source(source).tensors if source.is_file() else load(source).model.state_dict()
            if not all(bool(torch.isfinite(x.float()).all()) for x in weights.values()) and source.is_dir():
                outcome = "loaded what is not finite"
            del weights
        except VitrailError as error:
            outcome, message = "refused", str(error).replace(str(root), "")
        except BaseException as error:
            outcome, message = "failed", f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - start
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        record = {"name": name, "outcome": outcome, "message": message, "seconds": round(seconds, 2), "growth": growth}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

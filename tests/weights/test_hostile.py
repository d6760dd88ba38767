"""More than 300 hostile checkpoints and folders, each under a limit of memory and time (see hostile.py)."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import pytest

from vitrail.errors import WeightsError
from vitrail.weights.read import read_file
from weights import hostile


@pytest.mark.slow
def test_hostile_checkpoints_and_folders(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(hostile.__file__)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert [each["name"] for each in results] == list(hostile.cases())
    assert len(results) >= 300
    assert not (tmp_path / hostile.MARK).exists(), "code of a file was run"
    wrong = [each for each in results if each["outcome"] not in ("refused", "loaded")]
    assert not wrong
    for each in results:
        assert each["message"].isprintable(), each
        assert len(each["message"]) < 700, each
        assert each["seconds"] < hostile.SECONDS, each
    refused = sum(each["outcome"] == "refused" for each in results)
    assert refused > 0.8 * len(results)  # the others are harmless: other labels, a changed byte of a weight
    growth = max(each["growth"] for each in results)
    print(
        f"{len(results)} cases, {refused} refused, at most {max(each['seconds'] for each in results)} s, {growth} bytes"
    )


def test_the_traps_can_spring(tmp_path: Path) -> None:
    """What the gadgets are made of runs code when it is unpickled the usual way."""
    import pickle

    sprung = 0
    for name in ("exec", "system", "touch"):
        mark = tmp_path / name
        pickle.loads(pickle.dumps(hostile._gadgets(mark)[name]))
        sprung += mark.exists()
    assert sprung == 3


@pytest.mark.parametrize("name", ["swells", "hangs", "rows without end", "names without end"])
def test_limits_come_before_allocation(tmp_path: Path, name: str) -> None:
    """Files that the unpickler of torch.load reads: 0.7 GB of memory from 546 bytes, 2^29 hashes for a key, a billion
    rows of twelve numbers, and seconds for names."""
    twins = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(29))
    content = {
        "swells": hostile.instructions(hostile.call("builtins.bytearray", hostile.number(700_000_000))),
        "hangs": hostile.instructions(b"}(" + b")" + twins + b"Nu"),
        "rows without end": hostile.instructions(
            b"}(" + hostile.text("head.weight") + hostile.tensor([10**9, 4], [0, 1]) + b"u"
        ),
        "names without end": hostile._many(300_000, 8),
    }[name]
    (tmp_path / "w.pth").write_bytes(hostile.zipped(content))
    tracemalloc.start()
    try:
        start = time.process_time()
        with nullcontext() if name == "swells" else pytest.raises(WeightsError):
            read_file(tmp_path / "w.pth")  # bytes are no tensors, and are left out
        assert time.process_time() - start < 1
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()

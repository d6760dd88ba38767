"""What memory there is and what the process uses; pages of a mapped file that leave its memory; limits."""

import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from vitrail.utils import memory
from vitrail.utils.memory import (
    available_memory,
    is_out_of_memory,
    mapped_spans,
    peak_memory,
    release_pages,
    releasing_pages,
    resident_memory,
)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_pages_are_released_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights of a model.bin"
    content = os.urandom(1 << 16) * 512  # 32 MiB
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == content
        spans = mapped_spans(path)
        before = resident_memory()
        release_pages(spans)
        assert before - resident_memory() > 30 << 20
        assert mapped[:] == content


def test_pages_are_released_again_and_again_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    spans, calls = {(1, 2)}, list[object]()
    monkeypatch.setattr(memory, "release_pages", calls.append)
    with releasing_pages(spans, interval=0.001):
        end = time.monotonic() + 60
        while len(calls) < 3:
            assert time.monotonic() < end
            time.sleep(0.001)
    assert all(call == spans for call in calls)
    calls.clear()
    with pytest.raises(ZeroDivisionError), releasing_pages(spans, interval=1000):
        _ = 1 / 0
    assert calls == [spans]
    assert "release pages" not in {thread.name for thread in threading.enumerate()}


def test_without_memory_for_a_thread_pages_are_released_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    calls = list[object]()
    monkeypatch.setattr(memory, "release_pages", calls.append)
    monkeypatch.setattr(threading.Thread, "start", start)
    with releasing_pages({(1, 2)}):
        assert calls == []
    assert calls == [{(1, 2)}]


def test_changes_that_only_the_process_has_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(1 << 16))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:4] = b"mine"
        assert mapped_spans(path) == set()
        release_pages(mapped_spans(path))
        assert mapped[:4] == b"mine"


def test_a_file_that_is_not_mapped(tmp_path: Path) -> None:
    assert mapped_spans(tmp_path / "none") == set()
    release_pages([])


def test_memory_of_this_process() -> None:
    cpu = torch.device("cpu")
    most, there = peak_memory(cpu), available_memory(cpu)
    assert most is not None
    assert there is not None
    assert 50 * 2**20 < resident_memory() < 1.02 * most < there
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert resident_memory() > 64 * 2**20
    del block


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, none = tmp_path / "limit", tmp_path / "none"
    limit.write_text("12345\n")
    none.write_text("max\n")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  4000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "resident_memory", lambda: 1024)
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (none, tmp_path / "missing"))
    assert available_memory(torch.device("cpu")) == 4001 * 1024
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (limit, none))
    assert available_memory(torch.device("cpu")) == 12345


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells it there")
def test_a_limit_of_the_address_space_counts() -> None:
    """The available memory can be allocated, and not much more."""
    code = """
import resource
from types import SimpleNamespace
from vitrail.utils.memory import available_memory, resident_memory
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 300_000_000,) * 2)
free = available_memory(SimpleNamespace(type="cpu")) - resident_memory()
bytearray(free - 20_000_000)
try:
    bytearray(free + 20_000_000)
except MemoryError:
    print(free)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 250e6 < int(done.stdout) < 310e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells it there")
def test_threads_take_few_addresses_where_these_are_limited() -> None:
    code = """
import resource, threading
from vitrail.utils.memory import share_malloc_arena
size = lambda: int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size() + 2**31,) * 2)
share_malloc_arena()
threading.stack_size(1 << 20)
gate, kept = threading.Barrier(9), []
def work():
    gate.wait()
    kept.append(bytearray(100_000))
    gate.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
before = size()
for thread in threads:
    thread.start()
gate.wait()
gate.wait()
print(size() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 20, "less than one further arena"


def test_out_of_memory_is_recognised() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    broken = ImportError("the install seems to be broken")
    assert not is_out_of_memory(broken)
    broken.__cause__ = ImportError("libfoo.so: failed to map segment from shared object")
    assert is_out_of_memory(broken)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it there")
def test_the_peak_is_not_that_of_whoever_started_the_process() -> None:
    """Linux carries getrusage's largest size over into the program that a process becomes."""
    code = """
import subprocess, sys
large = b"x" * (700 << 20)
print(subprocess.run([sys.executable, "-c", "import torch; from vitrail.utils.memory import peak_memory; "
                      "print(peak_memory(torch.device('cpu')))"], capture_output=True, text=True, check=True).stdout)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600 << 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be started anew on Linux")
def test_the_peak_is_started_anew() -> None:
    code = """
import torch
from vitrail.utils.memory import peak_memory, reset_peak_memory
cpu = torch.device("cpu")
block = b"x" * (300 << 20)
del block
before = peak_memory(cpu)
reset_peak_memory(cpu)
print(before - peak_memory(cpu))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 250 << 20

"""Atomic writing: the old content or the new one, whatever happens."""

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vitrail.errors import RunError
from vitrail.utils.files import (
    atomic_folder,
    atomic_write_bytes,
    atomic_write_text,
    disk_errors,
    lock_or_raise,
    remove_leftovers,
    wait_for_lock,
)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_is_written_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    atomic_write_text(file, "één")
    assert file.read_text(encoding="utf-8") == "één"
    atomic_write_bytes(file, b"two")
    assert file.read_bytes() == b"two"
    assert names(file.parent) == ["a.txt"]


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    atomic_write_text(file, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="disk is full"):
        atomic_write_text(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_folder_is_written_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "part").mkdir()
            (folder / "part" / content).write_text(content)
            assert not (target / "part" / content).exists()
    assert names(target / "part") == ["two"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_a_failing_block_leaves_the_old_folder(tmp_path: Path, fault: type[BaseException]) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(fault), atomic_folder(target) as folder:  # noqa: PT012  the block is what fails
        (folder / "a").write_text("new")
        raise fault
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_full_disk_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="disk is full"), atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("new")
    assert names(tmp_path) == []


def test_disk_errors_of_safetensors() -> None:
    """safetensors gives the errno in its message only; the second half checks that it still does."""
    with pytest.raises(RunError, match="disk is full"), disk_errors("there"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match=r"\(os error \d+\)"):
        save_file({"a": torch.zeros(1)}, "/nowhere/at/all/a.safetensors")


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="mine"), disk_errors("there"):
        raise ValueError("mine")


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        atomic_write_text(tmp_path / "file" / "a.txt", "")


def _try(path: Path, answers: Any) -> None:
    try:
        with lock_or_raise(path, RunError("held")):
            answers.put("free")
    except RunError as error:
        answers.put(str(error))


def test_a_lock_keeps_others_out(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    expected = []
    with lock_or_raise(tmp_path / "lock", RunError("held")):
        process = context.Process(target=_try, args=(tmp_path / "lock", answers))
        process.start()
        process.join()
        expected.append(answers.get(timeout=10))
    process = context.Process(target=_try, args=(tmp_path / "lock", answers))
    process.start()
    process.join()
    expected.append(answers.get(timeout=10))
    assert expected == ["held", "free"]


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vitrail.utils.files import wait_for_lock\n"
        "with wait_for_lock(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RunError), lock_or_raise(tmp_path / "lock", RunError("held")):
            pass
        process.kill()
    with lock_or_raise(tmp_path / "lock", RunError("held")):
        pass


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with lock_or_raise(tmp_path / "lock", RunError("held")), wait_for_lock(tmp_path / "other"):
        pass


def test_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / ".a.12.tmp").mkdir()
    (tmp_path / ".a.12.tmp" / "x").write_text("")
    (tmp_path / ".b.34.tmp").write_text("")
    (tmp_path / "kept.tmp").write_text("")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["kept.tmp"]

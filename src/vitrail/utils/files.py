"""Atomic file writes, file locks, checksums and disk errors.

Files and folders are written under a temporary name next to their target, synced, and renamed: a reader sees the old
content or the new one, never a part.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vitrail.errors import RunError, VitrailError

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "files may not grow that large here (see `ulimit -f`); choose another folder",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder that you may write to",
    errno.EPERM: "permission denied; choose a folder that you may write to",
    errno.ENOTDIR: "a parent of this path is a file; choose another path",
    errno.EEXIST: "a file exists where a folder is needed; choose another path",
    errno.EISDIR: "this is a folder; give the path of a file",
}


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn errors of a full, read-only or forbidden disk into a RunError that names `path`."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _safetensors_errno(error)
        if number not in _DISK_ERRORS:
            raise
        raise RunError(f"cannot write {path}: {_DISK_ERRORS[number]}") from error


def _safetensors_errno(error: Exception) -> int | None:
    """The errno in the message of a SafetensorError, "... (os error 28)", which has no such attribute."""
    _, found, rest = str(error).partition("(os error ")
    number = rest.partition(")")[0]
    return int(number) if found and number.isdigit() else None


def _temporary_path(path: Path) -> Path:
    """A free name in the folder of `path`, so on the same disk: a rename can replace `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power failure."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically; parent folders are created.

    Raises:
        RunError: the disk is full, read-only or forbidden.
    """
    path = Path(path)
    temporary = _temporary_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` for text, as UTF-8; bytes of a file name that are not UTF-8 are escaped."""
    atomic_write_bytes(path, text.encode("utf-8", "backslashreplace"))


def user_path(path: str | Path) -> Path:
    """A path with ~ replaced by the home folder; unchanged, unlike by `Path.expanduser`, if there is no such user."""
    return Path(os.path.expanduser(path))


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block succeeds, and is removed when it fails.

    Raises:
        RunError: the disk is full, read-only or forbidden, also for writes in the block.
    """
    path = Path(path)
    temporary, old = _temporary_path(path), _temporary_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            yield temporary
            # As the umask allows: safetensors makes files that only their owner can read.
            mode = temporary.stat().st_mode & 0o666
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(mode)
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            _sync_folder(temporary)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of killed processes; no other process may be writing to `folder`."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_or_raise(path: Path, busy: VitrailError) -> Iterator[None]:
    """Lock the file `path`; raise `busy` if another process has locked it.

    The system releases the lock when the process ends, even if it is killed.
    """
    with disk_errors(path):
        lock = _acquire(path, timeout=0)
    if lock is None:
        raise busy
    with lock:
        yield


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """As `lock_or_raise`, but wait until the lock is free. Raises OSError if the file cannot be opened."""
    with _acquire(path, timeout=-1) or contextlib.nullcontext():
        yield


def _acquire(path: Path, timeout: float) -> contextlib.AbstractContextManager[Any] | None:
    """A context that releases the lock; None on a timeout. It does nothing on a file system without locks."""
    from filelock import FileLock, Timeout  # imports asyncio and sqlite3

    try:
        return FileLock(path).acquire(timeout=timeout)
    except Timeout:
        return None
    except NotImplementedError:
        return contextlib.nullcontext()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        return contextlib.nullcontext()


SUMS = "SHA256SUMS"  # the checksums of a folder's files, in the format of `sha256sum -c`, so that damage is noticed


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """List these files of a folder. Raises RunError if the disk is full, read-only or forbidden."""
    atomic_write_text(folder / SUMS, "".join(f"{_digest(folder / name)}  {name}\n" for name in sorted(names)))


def mismatches(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of these files that are missing or not as listed; all of them if there is no list.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return list(names)
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    return [name for name in names if not (folder / name).is_file() or listed.get(name) != _digest(folder / name)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

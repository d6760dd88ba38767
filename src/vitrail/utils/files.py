"""Writing so that what stands under a name is always whole: the old content or the new one, never half of either.

Everything is written beside its place under a temporary name, synced to the disk, and renamed.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitrail.errors import VitrailError

_DISK_TROUBLE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "files may not grow that large here (see `ulimit -f`); choose another folder",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder that you may write to",
    errno.EPERM: "permission denied; choose a folder that you may write to",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another one",
    errno.EEXIST: "a file stands where a folder is needed; choose another path",
    errno.EISDIR: "this is a folder; name a file",
}


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk under `path` into a VitrailError of one line.

    safetensors tells of the disk in words alone ("... (os error 28)"): those are understood too.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _named_errno(error)
        if number not in _DISK_TROUBLE:
            raise
        raise VitrailError(f"cannot write {path}: {_DISK_TROUBLE[number]}") from error


def _named_errno(error: Exception) -> int | None:
    _, found, rest = str(error).partition("(os error ")
    number = rest.partition(")")[0]
    return int(number) if found and number.isdigit() else None


def _beside(path: Path) -> Path:
    """A free temporary name in the folder of `path`, on the same disk, so that a rename can replace `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Put `data` under `path`, whole or not at all; its folder is made if there is none.

    Raises:
        VitrailError: the disk is full, read-only or forbidden.
    """
    path = Path(path)
    temporary = _beside(path)
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
    """`atomic_write_bytes` for text, as UTF-8."""
    atomic_write_bytes(path, text.encode())


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill the folder that this gives; it takes the place of `path` when the block ends well, and is removed otherwise.

    A folder that stood there is moved aside first and removed last.

    Raises:
        VitrailError: the disk is full, read-only or forbidden, also when the block's own writing finds this.
    """
    path = Path(path)
    temporary, old = _beside(path), _beside(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            yield temporary
            usual = temporary.stat().st_mode & 0o666  # what the umask leaves; safetensors writes for the owner alone
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(usual)
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
    """Remove the temporary files and folders that a killed process left in `folder`. For its one writer only."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file `path`; the system lets go of it when the process ends, however it ends.

    Raises:
        VitrailError: another process holds it; `refusal` is the text.
    """
    with disk_errors(path):
        file = path.open("a")
    with file:
        if not _lock(file):
            raise VitrailError(refusal)
        yield


def _lock(file: Any) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks on this system: go on without
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks is no reason to refuse; a lock that another holds is.
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN)
    return True

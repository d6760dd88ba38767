"""The disk cache of decoded images: what is stored, verified, shared, limited and removed."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from vitrail.data.cache import pixel_cache as module
from vitrail.data.cache.pixel_cache import PixelCache, open_cache

SHAPES = np.array([[3, 5], [4, 4], [1, 7], [60, 80]])


def pixels(i: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (*SHAPES[i], channels), dtype=np.uint8)


def opened(what: str = "test", limit: int = 1 << 30, said: list[str] | None = None, stamp: str = "a") -> PixelCache:
    stamps = [f"{stamp}{i}" for i in range(len(SHAPES))]
    cache = open_cache(what, stamps, SHAPES, 3, limit, (said if said is not None else []).append)
    assert cache is not None
    return cache


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path))
    return tmp_path / "decoded"


def test_stored_images_are_returned() -> None:
    cache = opened()
    assert [cache.get(i) for i in range(4)] == [None] * 4
    for i in (2, 0, 3):
        cache.put(i, pixels(i))
    # The same process, another one that opens it later, and one that had it open all the time.
    for reader in (cache, opened()):
        for i in (0, 2, 3):
            found = reader.get(i)
            assert found is not None
            np.testing.assert_array_equal(found, pixels(i))
            assert not found.flags.writeable
        assert reader.get(1) is None
    cache.close()
    np.testing.assert_array_equal(found, pixels(3))  # returned arrays stay valid


def test_an_open_cache_returns_images_stored_by_another() -> None:
    early, other = opened(), opened()
    other.put(1, pixels(1))
    np.testing.assert_array_equal(early.get(1), pixels(1))


def test_other_images_have_another_folder(root: Path) -> None:
    opened()
    opened(stamp="b")
    opened(what="other")
    assert len(list(root.iterdir())) == 3
    opened(limit=10)  # the folder does not depend on the limit
    assert len(list(root.iterdir())) == 3


def test_images_beyond_the_limit_are_not_stored(root: Path) -> None:
    cache = opened(limit=3 * (15 + 16 + 7))
    for i in range(4):
        cache.put(i, pixels(i))
    assert [cache.get(i) is not None for i in range(4)] == [True, True, True, False]
    assert open_cache("none", ["x"], SHAPES[:1], 3, 0, print) is None
    np.testing.assert_array_equal(opened().get(1), pixels(1))  # a larger limit uses the same offsets
    assert opened(limit=3 * 15).get(1) is None


def test_an_image_of_another_shape_is_not_stored() -> None:
    cache = opened()
    cache.put(1, pixels(0))
    assert cache.get(1) is None


@pytest.mark.parametrize("damage", [b"\0", b"\xff\xff\xff"])
def test_pixels_with_a_wrong_checksum_are_not_returned(damage: bytes) -> None:
    """As after a power cut between the two writes."""
    cache = opened()
    cache.put(3, pixels(3) | 1)
    with (cache.folder / "pixels").open("r+b") as file:
        file.seek(3 * (15 + 16 + 7) + 600)
        file.write(damage)
    again = opened()
    assert again.get(3) is None
    again.put(3, pixels(3))
    np.testing.assert_array_equal(opened().get(3), pixels(3))


def test_a_checksum_is_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.zlib, "crc32", lambda _: 0)
    opened().put(0, pixels(0))
    assert opened().get(0) is not None


RUN = """
import sys, numpy as np
from vitrail.data.cache.pixel_cache import open_cache
shapes = np.full((40, 2), 64)
shapes[:, 0] += np.arange(40)
cache = open_cache("shared", [str(i) for i in range(40)], shapes, 3, 1 << 30, print)
draw = np.random.default_rng(int(sys.argv[1]))
made = 0
for i in draw.permutation(np.repeat(np.arange(40), 5)):
    want = np.random.default_rng(i).integers(0, 256, (*shapes[i], 3), dtype=np.uint8)
    got = cache.get(i)
    if got is None:
        cache.put(i, want)
        made += 1
    else:
        assert (got == want).all(), i
print(made)
"""


def test_concurrent_processes_share_a_cache() -> None:
    """Three processes store and read the same images; every image that they read is correct."""
    runs = [subprocess.Popen([sys.executable, "-c", RUN, str(k)], stdout=subprocess.PIPE, text=True) for k in range(3)]
    made = [int(run.communicate(timeout=60)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert 40 <= sum(made) <= 120
    after = subprocess.run([sys.executable, "-c", RUN, "9"], capture_output=True, text=True, check=True)
    assert after.stdout.split() == ["0"]  # everything was stored


def test_threads_share_a_cache() -> None:
    cache, wrong = opened(), []

    def work() -> None:
        for i in list(range(4)) * 20:
            found = cache.get(i)
            if found is None:
                cache.put(i, pixels(i))
            elif not np.array_equal(found, pixels(i)):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_full_disk_stops_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    cache = opened(said=said)
    cache.put(0, pixels(0))
    real, room = os.pwrite, [20]

    def pwrite(handle: int, content: memoryview, place: int) -> int:
        """A disk with 20 free bytes, then none."""
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = min(room[0], len(content))
        room[0] -= count
        return real(handle, content[:count], place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for i in (3, 1):
        cache.put(i, pixels(i))
    assert len(said) == 1
    assert "no more images are stored (No space left on device)" in said[0]
    assert cache.get(3) is None
    assert cache.get(0) is not None  # stored images can still be read
    monkeypatch.undo()
    cache.put(1, pixels(1))
    assert cache.get(1) is None


def test_a_reserve_of_the_disk_is_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESERVE", 1 << 60)
    said: list[str] = []
    cache = opened(said=said)
    cache.put(0, pixels(0))
    assert cache.get(0) is None
    assert "of the disk is free" in said[0]


def test_a_folder_that_cannot_be_written(root: Path) -> None:
    root.write_text("a file")
    said: list[str] = []
    assert open_cache("test", ["a"], SHAPES[:1], 3, 1 << 20, said.append) is None
    assert said[0].startswith("cache   off: could not write")


def disk_usage(folder: Path) -> int:
    return (folder / "pixels").stat().st_blocks * 512


def test_the_least_recently_used_caches_are_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 3 * int(SHAPES.prod(axis=1).sum())
    folders, caches = [], []
    for age, stamp in enumerate("abc"):
        cache = opened(stamp=stamp)
        cache.put(3, pixels(3))
        folders.append(cache.folder)
        caches.append(cache)
        os.utime(cache.folder, (1000 + age, 1000 + age))
        if stamp != "a":
            cache.close()
    used = disk_usage(folders[0])
    assert used >= 3 * 60 * 80
    monkeypatch.setattr(module, "max_total_size", lambda: 2 * used + taken)
    opened(stamp="d", said=[]).close()
    # a is the oldest but open, so b is removed.
    assert [folder.exists() for folder in folders] == [True, False, True]
    assert sorted(path.name for path in folders[0].iterdir()) == ["checksums", "lock", "pixels"]


def test_the_size_limit_counts_existing_caches_and_free_space(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(0, 0, module.RESERVE + 1000))
    assert module.max_total_size() == 500
    cache = opened()
    cache.put(3, pixels(3))
    assert module.max_total_size() == (1000 + disk_usage(cache.folder)) // 2
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(0, 0, 5))
    assert module.max_total_size() == disk_usage(cache.folder) // 2

"""WebDataset shards: samples, images that are skipped and why, splits, class names, and remote shards."""

import gzip
import io
import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.crops import read_crops
from data.make_shards import encoded, write_shard, write_tar
from data.serving import serving
from vitrail.data.cache.readers import cached_reader
from vitrail.data.catalog import absolute_data, open_dataset
from vitrail.data.formats import webdataset as module
from vitrail.data.formats.shards import ShardSplit, scan_shard
from vitrail.data.formats.webdataset import expand, read_class_names
from vitrail.data.loader import TrainLoader
from vitrail.errors import DataError, DownloadError
from vitrail.images.preprocess import Preprocess

P = Preprocess(size=(16, 16))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """40 samples of three classes in four shards."""
    for number in range(4):
        write_shard(tmp_path / "data" / f"part-{number:03}.tar", range(10 * number, 10 * number + 10))
    return tmp_path / "data"


def everything(dataset) -> dict[str, tuple[str, np.ndarray]]:
    """(class, pixels) by name, of all splits."""
    return {
        Path(split.name(i)).name: (dataset.class_names[split.labels[i]], np.asarray(split.image(i)))
        for split in dataset.splits.values()
        for i in range(len(split))
    }


@pytest.mark.parametrize("pattern", ["part-{000..003}.tar", "part-*.tar", "", "part-00{0,1,2,3}.tar"])
def test_all_samples_are_found(shards: Path, pattern: str) -> None:
    dataset = open_dataset(f"wds:{shards}/{pattern}", split_seed=3)
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.counts() == {"train": 32, "val": 4, "test": 4}
    assert dataset.skipped == []
    assert dataset.sizes.median == (20, 26)
    assert "4 of 40 images held out" in dataset.how_split
    found = everything(dataset)
    assert sorted(found) == [f"{number:05}.jpg" for number in range(40)]
    for name, (label, pixels) in found.items():
        number = int(name[:5])
        assert label == str(number % 3)
        expected = Image.open(io.BytesIO(encoded(number % 3, number)))
        np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_the_split_does_not_depend_on_the_location_of_shards(shards: Path, tmp_path: Path) -> None:
    before = everything(open_dataset(f"wds:{shards}")).keys()
    held = [open_dataset(f"wds:{shards}").split("val").name(i) for i in range(4)]
    shards.rename(tmp_path / "elsewhere")
    moved = open_dataset(f"wds:{tmp_path / 'elsewhere'}")
    assert [Path(moved.split("val").name(i)).name for i in range(4)] == [Path(name).name for name in held]
    assert everything(moved).keys() == before


def test_shards_are_scanned_once(shards: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    first = open_dataset(f"wds:{shards}")
    monkeypatch.setattr(module, "scan_shard", lambda path: pytest.fail("read again"))
    again = open_dataset(f"wds:{shards}")
    for name in first.splits:
        a, b = first.split(name), again.split(name)
        assert isinstance(a, ShardSplit)
        assert isinstance(b, ShardSplit)
        assert (a.names, a.shards) == (b.names, b.shards)
        for field in ("locations", "labels", "sizes"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    monkeypatch.undo()
    monkeypatch.setenv("VITRAIL_CACHE", str(cache))
    for path in (cache / "indexes").iterdir():  # a damaged index is computed again
        path.write_text("{")
    assert open_dataset(f"wds:{shards}").counts() == first.counts()
    write_shard(shards / "part-003.tar", range(30, 45))  # changed: read again
    assert sum(open_dataset(f"wds:{shards}").counts().values()) == 45


def test_a_cache_that_cannot_be_written_is_not_an_error(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", "/dev/null/no")
    assert sum(open_dataset(f"wds:{shards}").counts().values()) == 40


def test_threads_and_resumed_epochs(shards: Path) -> None:
    """As with folders, batches do not depend on the number of threads or the first step."""
    split = open_dataset(f"wds:{shards}", val_fraction=0, test_fraction=0).split("train")
    plain = [batch.images for batch in TrainLoader(split, P, batch_size=8, crop_scale=(0.3, 1)).epoch(1)]
    threads = TrainLoader(split, P, batch_size=8, crop_scale=(0.3, 1), workers=3)
    assert all(torch.equal(a, b.images) for a, b in zip(plain, threads.epoch(1), strict=True))
    assert torch.equal(next(threads.epoch(1, 3)).images, plain[3])
    threads.close()
    exact, _ = read_crops(split, P)
    for _ in range(2):
        kept, _ = read_crops(split, P, cached_reader(split, P, 1 << 30, pytest.fail, random_crop=False))
        np.testing.assert_array_equal(kept, exact)


def test_splits_by_the_names_of_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "a" / "pets-train-000.tar", range(30))
    write_shard(tmp_path / "a" / "pets-train-001.tar", range(30, 60))
    write_shard(tmp_path / "a" / "pets_validation_0.tar", range(60, 69))
    dataset = open_dataset(f"wds:{tmp_path}/a/*.tar")
    assert dataset.counts() == {"train": 60, "val": 9}
    assert dataset.how_split == "train, val: the dataset's own"
    write_shard(tmp_path / "b" / "train" / "0.tar", range(30))
    write_shard(tmp_path / "b" / "test" / "0.tar", range(30, 36))
    dataset = open_dataset(f"wds:{tmp_path}/b/{{train,test}}/0.tar")
    assert dataset.counts() == {"train": 27, "val": 3, "test": 6}
    assert open_dataset(f"wds:{tmp_path}/b/test/0.tar", class_names=["2", "1", "0"]).counts() == {"test": 6}


def test_labels_of_every_kind(tmp_path: Path) -> None:
    write_shard(tmp_path / "words" / "0.tar", range(12), words=True)
    assert open_dataset(f"wds:{tmp_path}/words").class_names == ("kind0", "kind1", "kind2")
    files = []
    for number in range(12):
        label = {"label": number % 2, "caption": "..."} if number % 3 else {"label": f"{number % 2}"}
        files += [(f"x/{number}.JPEG", encoded(0, number)), (f"x/{number}.json", json.dumps(label).encode())]
    write_tar(tmp_path / "json.tar", files)
    dataset = open_dataset(f"wds:{tmp_path}/json.tar", val_fraction=0, test_fraction=0)
    assert dataset.class_names == ("0", "1")
    assert dataset.split("train").labels.tolist() == [0, 1] * 6
    assert dataset.split("train").name(0) == f"{tmp_path}/json.tar/x/0.jpeg"
    # .cls takes precedence over .json in any order
    files = [(f"{n}.{end}", data) for n in range(4) for end, data in
             (("cls", b"%d\n" % (n % 2)), ("json", b'{"label": 9}'), ("png", encoded(0, n, "PNG")))]  # fmt: skip
    write_tar(tmp_path / "both.tar", files)
    dataset = open_dataset(f"wds:{tmp_path}/both.tar", val_fraction=0, test_fraction=0)
    assert dataset.split("train").labels.tolist() == [0, 1, 0, 1]


def test_class_names_from_files_next_to_the_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", range(12))
    for name, content in (
        ("classes.json", '{"cat": 1, "ape": 0, "bee": 2, "dog": 3}'),
        ("classes.json", '["ape", "cat", "bee", "dog"]'),
        ("classes.json", '{"0": "ape", "1": "cat", "2": "bee", "3": "dog"}'),
        ("classes.txt", "ape\ncat\nbee \ndog\n\n"),
    ):
        (tmp_path / name).write_text(content)
        dataset = open_dataset(f"wds:{tmp_path}/0.tar", val_fraction=0, test_fraction=0)
        assert dataset.class_names == ("ape", "cat", "bee", "dog")
        assert dataset.split("train").labels.tolist() == [0, 1, 2] * 4
    (tmp_path / "classes.txt").write_text("ape\ncat\n")
    dataset = open_dataset(f"wds:{tmp_path}/0.tar", val_fraction=0, test_fraction=0)
    assert len(dataset.split("train")) == 8
    assert [item["reason"] for item in dataset.skipped] == ["has the label 2, which is not one of the 2 classes"] * 4
    for wrong in ("", "ape\nape\n", "ape\n\ncat\n"):
        (tmp_path / "classes.txt").write_text(wrong)
        with pytest.raises(DataError, match=r"classes\.txt"):
            open_dataset(f"wds:{tmp_path}/0.tar")
    (tmp_path / "classes.json").write_text("[1, 2]")
    with pytest.raises(DataError, match=r"classes\.json"):
        read_class_names(tmp_path / "classes.json")


def test_unusable_samples_are_listed(tmp_path: Path) -> None:
    good = [(f"good{n}.{end}", data) for n in range(4) for end, data in
            (("cls", b"%d" % (n % 2)), ("jpg", encoded(n, n)))]  # fmt: skip
    bad = [
        ("nolabel.jpg", encoded(0, 0)),
        ("noimage.cls", b"1"),
        ("noimage.seg.png", b"..."),
        ("broken.jpg", encoded(0, 1)[:300]),
        ("broken.cls", b"1"),
        ("empty.png", b""),
        ("empty.cls", b"1"),
        ("float.jpg", encoded(0, 2)),
        ("float.json", b'{"label": 0.5}'),
        ("notext.jpg", encoded(0, 2)),
        ("notext.cls", b"\xff\xfe"),
        ("._good0.jpg", b"what macOS adds"),
        ("__notes__.txt", b"what webdataset passes over"),
    ]
    path = write_tar(tmp_path / "0.tar", [*bad, *good])
    dataset = open_dataset(f"wds:{path}", val_fraction=0, test_fraction=0)
    assert len(dataset.split("train")) == 4
    reasons = {item["path"].removeprefix(f"{path}/"): item["reason"] for item in dataset.skipped}
    assert reasons.keys() == {"nolabel.jpg", "noimage", "broken.jpg", "empty.png", "float.jpg", "notext.jpg"}
    assert reasons["nolabel.jpg"].startswith("has no label")
    assert reasons["noimage"].startswith("has no image")
    assert "truncated" in reasons["broken.jpg"]
    assert "empty" in reasons["empty.png"]
    assert "0.5" in reasons["float.jpg"]
    assert "notext.cls" not in reasons
    assert ".cls" in reasons["notext.jpg"]


@pytest.mark.parametrize("length", [5 * 1024 - 300, 6 * 1024, 700, 512, 100, 0])
def test_a_truncated_shard(tmp_path: Path, length: int) -> None:
    whole = write_shard(tmp_path / "whole.tar", range(10))
    content = whole.read_bytes()
    write_shard(tmp_path / "0.tar", range(10))
    (tmp_path / "1.tar").write_bytes(content[:length])
    dataset = open_dataset(f"wds:{tmp_path}/{{0,1}}.tar", val_fraction=0, test_fraction=0)
    kept = len(dataset.split("train")) - 10
    assert kept == len(scan_shard(str(tmp_path / "1.tar")).samples)
    whole_samples = [row for row in scan_shard(str(whole)).samples if row.offset + row.length <= length]
    assert kept == len(whole_samples)
    about = [item["reason"] for item in dataset.skipped if item["path"] == f"{tmp_path}/1.tar"]
    assert len(about) == 1
    assert "truncated" in about[0] or "not a tar" in about[0]


def test_a_shard_truncated_while_in_use(shards: Path) -> None:
    split = open_dataset(f"wds:{shards}", val_fraction=0, test_fraction=0).split("train")
    with (shards / "part-002.tar").open("r+b") as file:
        file.truncate(4000)
    (shards / "part-001.tar").unlink()
    crops, skipped = read_crops(split, P)
    assert len(crops) in (20, 21, 22)
    reasons = {"could not be read: No such file or directory", "is in a shard that is truncated"}
    assert set(skipped.values()) == reasons


def test_unusable_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "one.tar", range(0, 10, 2), classes=2)
    (tmp_path / "packed.tar").write_bytes(gzip.compress((tmp_path / "one.tar").read_bytes()))
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "nothing.tar", [("readme.txt", b"hello")])
    for spec, fact in (
        ("wds:", "wds:"),
        (f"wds:{tmp_path}/no-*.tar", "no-"),
        (f"wds:{tmp_path}/no-{{000..001}}.tar", "no-000.tar"),
        (f"wds:{tmp_path}/empty", "empty .*tar"),
        (f"wds:{tmp_path}/one.tar", "one.tar .*0"),
        (f"wds:{tmp_path}/packed.tar", "packed.tar .*gzip"),
        (f"wds:{tmp_path}/nothing.tar", "nothing.tar .*readme"),
        ("wds:ftp://example.org/0.tar", "ftp:"),
    ):
        with pytest.raises(DataError, match=fact) as error:
            open_dataset(spec)
        assert "\n" not in str(error.value)


def test_a_class_that_training_does_not_have(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", range(12), classes=2)
    write_shard(tmp_path / "val-0.tar", range(12), classes=3)
    with pytest.raises(DataError, match=r"'2'.* val .* train"):
        open_dataset(f"wds:{tmp_path}")


def test_braces() -> None:
    assert expand("http://h/{08..10}.tar") == ["http://h/08.tar", "http://h/09.tar", "http://h/10.tar"]
    assert expand("http://{a,b}/{1..2}.tar") == [f"http://{host}/{n}.tar" for host in "ab" for n in (1, 2)]
    with pytest.raises(DataError, match=r"\{0"):
        expand("http://h/{0..1.tar")


def test_absolute_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_data("wds:data/a-{0..1}.tar") == f"wds:{tmp_path}/data/a-{{0..1}}.tar"
    assert absolute_data("wds:https://host/a.tar") == "wds:https://host/a.tar"
    assert absolute_data("hf-dataset:org/name") == "hf-dataset:org/name"
    assert absolute_data("hf-dataset:data/*.parquet") == f"hf-dataset:{tmp_path}/data/*.parquet"
    assert absolute_data("Digits") == "Digits"
    assert absolute_data("photos") == f"{tmp_path}/photos"


class Handler(SimpleHTTPRequestHandler):
    """A web server that records requests and closes connections after the number of bytes in `cuts`."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        tag = f'"{hash(content)}"'
        whole = not start or self.headers.get("If-Range") != tag
        body = content if whole else content[start:]
        self.send_response(200 if whole else 206)
        if not whole:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body[: self.server.cuts.pop(0)] if self.server.cuts else body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch):
    from vitrail.utils import download as fetch

    monkeypatch.setattr(fetch, "_PAUSE", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(shards)))
    server.asked, server.cuts = [], []
    with serving(server):
        yield server


def test_shards_from_a_server(server, shards: Path, cache: Path) -> None:
    (shards / "classes.txt").write_text("a\nb\nc\n")
    spec = f"wds:http://127.0.0.1:{server.server_port}/part-{{000..003}}.tar"
    server.cuts = [3000]
    dataset = open_dataset(spec)
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.counts() == {"train": 32, "val": 4, "test": 4}
    assert server.asked[:2] == [("/part-000.tar", None), ("/part-000.tar", "bytes=3000-")]
    asked = len(server.asked)
    here = everything(open_dataset(f"wds:{shards}", split_seed=0))
    there = everything(open_dataset(spec))
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name][1], there[name][1]) for name in here)
    assert len(server.asked) == asked  # all shards are in the cache
    assert len(list((cache / "shards").glob("*/*.tar"))) == 4
    assert not list((cache / "shards").glob("*/*.tag"))


def test_a_changed_shard_is_not_resumed(server, shards: Path, cache: Path) -> None:
    """A partial file of an older version is not continued with a newer one."""
    url = f"http://127.0.0.1:{server.server_port}/part-000.tar"
    server.cuts = [3000] + [0] * 3
    with pytest.raises(DownloadError, match="3,000 bytes"):
        open_dataset(f"wds:{url}")
    write_shard(shards / "part-000.tar", range(12))
    server.cuts = []
    dataset = open_dataset(f"wds:{url}", val_fraction=0, test_fraction=0)
    assert len(dataset.split("train")) == 12
    assert dataset.skipped == []
    (path,) = (cache / "shards").glob("*/part-000.tar")
    assert path.read_bytes() == (shards / "part-000.tar").read_bytes()


def test_a_shard_missing_on_the_server(server) -> None:
    with pytest.raises(DownloadError, match="404"):
        open_dataset(f"wds:http://127.0.0.1:{server.server_port}/part-009.tar")

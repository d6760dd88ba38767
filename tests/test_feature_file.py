"""Features to a file. Oracle: `Classifier.embed`; a run that was killed gives the bytes of one that was not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from vitrail import feature_file as features
from vitrail.classifier import Classifier
from vitrail.errors import ConfigError, DataError, DeviceError, RunError
from vitrail.feature_file import embed_to_file, files_fingerprint
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ViTConfig

CONFIG = ViTConfig(img_size=(16, 16), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=3)
BATCH = 4


def classifier(seed: int = 1) -> Classifier:
    torch.manual_seed(seed)
    model = build_model(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Classifier(model, Preprocess(size=(16, 16), mean=(0.5,) * 3, std=(0.3,) * 3), ["a", "b", "c"])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty images, and two files that are not images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    (folder / "05 empty.png").write_bytes(b"")
    (folder / "17 text.jpg").write_text("not an image")
    return folder


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_SHARD", 8)


def fingerprint(clf: Classifier) -> str:
    return clf.engine().runtime.fingerprint()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def stop_after(count: int) -> features.Progress:
    @contextmanager
    def progress(done: int, total: int) -> Iterator[Callable[[int], None]]:
        left = count

        def advance(number: int) -> None:
            nonlocal left
            left -= number
            if left <= 0:
                raise Killed

        yield advance

    return progress


def outcome(out: Path) -> tuple[bytes, bytes]:
    assert sorted(path.name for path in out.parent.glob(f"*{out.name}*")) == [out.name, f"{out.name}.json"]
    return out.read_bytes(), out.with_name(f"{out.name}.json").read_bytes()


def test_an_npy_file_has_the_rows_of_embed_and_names_them(photos: Path, tmp_path: Path) -> None:
    clf, out = classifier(), tmp_path / "new" / "f.npy"
    result = embed_to_file(clf.engine(), photos, out, batch_size=BATCH)
    good = sorted(path for path in photos.iterdir() if path.stem.isdigit())
    array = np.load(out, mmap_mode="r")
    assert array.dtype == np.float32
    assert array.shape == (30, 24) == (result.images, result.features)
    np.testing.assert_allclose(array, clf.embed(good), rtol=1e-5, atol=1e-5)
    assert len(np.unique(array, axis=0)) == 30
    about = json.loads(out.with_name("f.npy.json").read_text())
    assert about["paths"] == [str(path) for path in good]
    assert about["skipped"] == result.skipped
    assert [Path(item["path"]).name for item in result.skipped] == ["05 empty.png", "17 text.jpg"]
    assert all(item["reason"] for item in result.skipped)
    assert about["fingerprint"] == fingerprint(clf)


def test_a_parquet_file_has_the_same_rows(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_ROW_GROUP", 10)
    clf = classifier()
    embed_to_file(clf.engine(), photos, tmp_path / "f.npy", batch_size=BATCH)
    embed_to_file(clf.engine(), photos, tmp_path / "f.parquet", batch_size=BATCH)
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet")
    assert str(table.schema.field("feature").type) == "fixed_size_list<element: float>[24]"
    assert np.array_equal(np.stack(table["feature"].to_numpy()), np.load(tmp_path / "f.npy"))
    assert table["path"].to_pylist() == json.loads((tmp_path / "f.npy.json").read_text())["paths"]
    assert pyarrow.parquet.ParquetFile(tmp_path / "f.parquet").num_row_groups == 3


# --- continuing


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize("stops", [[1], [8], [21, 3, 9], [32]])
def test_stopped_work_ends_in_the_same_bytes(kind: str, stops: list[int], photos: Path, tmp_path: Path) -> None:
    clf, out = classifier(), tmp_path / "b" / f"f.{kind}"
    (tmp_path / "a").mkdir()
    embed_to_file(clf.engine(), photos, tmp_path / "a" / f"f.{kind}", batch_size=BATCH)
    for count in stops:
        with pytest.raises(Killed):
            embed_to_file(clf.engine(), photos, out, batch_size=BATCH, progress=stop_after(count))
        assert not out.exists()
    embed_to_file(clf.engine(), photos, out, batch_size=BATCH)
    assert outcome(out) == outcome(tmp_path / "a" / f"f.{kind}")


def test_a_killed_process_loses_a_shard_at_most(photos: Path, tmp_path: Path) -> None:
    saved = classifier().save(tmp_path / "model")
    code = f"""
import os, signal
from contextlib import contextmanager
from vitrail import feature_file as features
from vitrail import load
features._SHARD = 8
@contextmanager
def progress(done, total):
    seen = []
    yield lambda count: (seen.append(count), sum(seen) >= 21 and os.kill(os.getpid(), signal.SIGKILL))
features.embed_to_file(load({str(saved)!r}).engine(), {str(photos)!r}, {str(tmp_path / "f.npy")!r}, batch_size=4,
                       progress=progress)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "f.npy.part").glob("*.safetensors"))) == 2
    from vitrail import load

    clf, seen, told = load(saved), [], []
    clf.model.patch_embed.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))

    @contextmanager
    def progress(done: int, total: int) -> Iterator[Callable[[int], None]]:
        told.append((done, total))
        yield lambda count: None

    embed_to_file(clf.engine(), photos, tmp_path / "f.npy", batch_size=BATCH, progress=progress)
    assert told == [(17, 32)]
    assert sum(seen) == 14  # of the last 15 files one is not an image
    embed_to_file(load(saved).engine(), photos, tmp_path / "whole" / "f.npy", batch_size=BATCH)
    assert outcome(tmp_path / "f.npy") == outcome(tmp_path / "whole" / "f.npy")


def test_a_kill_after_the_last_rename_loses_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clf, out = classifier(), tmp_path / "f.npy"

    def rename(self: Path, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            embed_to_file(clf.engine(), photos, out)
    before = out.read_bytes()
    embed_to_file(clf.engine(), photos, out)
    assert outcome(out)[0] == before


def test_a_damaged_shard_is_computed_again(photos: Path, tmp_path: Path) -> None:
    clf, out = classifier(), tmp_path / "f.npy"
    embed_to_file(clf.engine(), photos, tmp_path / "whole.npy", batch_size=BATCH)
    with pytest.raises(Killed):
        embed_to_file(clf.engine(), photos, out, batch_size=BATCH, progress=stop_after(30))
    shards = sorted((tmp_path / "f.npy.part").glob("*.safetensors"))
    assert len(shards) == 3
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    embed_to_file(clf.engine(), photos, out, batch_size=BATCH)
    assert outcome(out)[0] == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize("change", ["model", "precision", "content", "list", "state", "no state"])
def test_unfinished_work_of_something_else_is_an_error(change: str, photos: Path, tmp_path: Path) -> None:
    clf, out, inputs = classifier(), tmp_path / "f.npy", [photos]
    with pytest.raises(Killed):
        embed_to_file(clf.engine(), inputs, out, batch_size=BATCH, progress=stop_after(20))
    reason = "other images"
    state = tmp_path / "f.npy.part" / "state.json"
    if change == "model":
        clf, reason = classifier(2), "another model"
    elif change == "precision":
        clf.precision, reason = "bf16", "another model or precision"
    elif change == "content":
        Image.new("RGB", (9, 9)).save(photos / "29.png")
    elif change == "list":
        inputs = [photos, photos / "00.png"]
    elif change == "state":
        state.write_text("{")
        reason = "unknown origin"
    else:
        state.unlink()
        reason = "unknown origin"
    with pytest.raises(RunError, match=rf"f\.npy\.part .* {reason}"):
        embed_to_file(clf.engine(), inputs, out, batch_size=BATCH)


def test_fingerprints_change_with_weights_preprocessing_and_files(photos: Path) -> None:
    clf = classifier()
    first = fingerprint(clf)
    assert first == fingerprint(classifier())
    for parameter in clf.model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        assert fingerprint(clf) != first
        with torch.no_grad():
            parameter.copy_(dict(classifier().model.named_parameters())[name_of(clf, parameter)])
    assert fingerprint(clf) == first
    clf.preprocess = replace(clf.preprocess, crop_pct=0.5)
    assert fingerprint(clf) != first
    one, two = str(photos / "00.png"), str(photos / "01.png")
    assert len({files_fingerprint(files) for files in ([one, two], [two, one], [one], [one, two, two])}) == 4


def name_of(clf: Classifier, wanted: torch.nn.Parameter) -> str:
    return next(name for name, parameter in clf.model.named_parameters() if parameter is wanted)


# --- streaming


def test_images_are_read_in_small_batches(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vitrail.images.reader

    decode, read, ahead = vitrail.images.reader.decode, [], []
    monkeypatch.setattr(vitrail.images.reader, "decode", lambda *args: read.append(1) or decode(*args))

    @contextmanager
    def progress(done: int, total: int) -> Iterator[Callable[[int], None]]:
        yielded = 0

        def advance(count: int) -> None:
            nonlocal yielded
            yielded += count
            ahead.append(len(read) - yielded)

        yield advance

    embed_to_file(classifier().engine(), photos, tmp_path / "f.npy", batch_size=2, progress=progress)
    assert len(read) == 32
    assert max(ahead) <= 2 * 2 + 2  # two batches are decoded ahead


# --- errors


def test_errors_name_what_is_wrong(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clf, taken = classifier(), tmp_path / "taken.npy"
    taken.write_bytes(b"mine")
    for inputs, out, kind, fact in (
        (photos, taken, RunError, r"taken\.npy"),
        (photos, tmp_path / "f.csv", ConfigError, r"f\.csv"),
        ([], tmp_path / "f.npy", DataError, "no images"),
        (Image.new("RGB", (9, 9)), tmp_path / "f.npy", DataError, "Image"),
        (photos / "17 text.jpg", tmp_path / "f.npy", DataError, r"17 text\.jpg"),
        (tmp_path / "*.xyz", tmp_path / "f.npy", DataError, r"\*\.xyz"),
    ):
        with pytest.raises(kind, match=fact):
            embed_to_file(clf.engine(), inputs, out)
    with pytest.raises(ConfigError, match="batch_size"):
        embed_to_file(clf.engine(), photos, tmp_path / "f.npy", batch_size=0)
    assert taken.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "taken.npy"]
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pyarrow: pip install .*'\.\[parquet\]'"):
        embed_to_file(clf.engine(), photos, tmp_path / "f.parquet")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_file_names_that_are_not_utf8(photos: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(str(photos)) + b"/\xff.png")
    (photos / "00.png").rename(odd)
    for kind in ("npy", "parquet"):
        embed_to_file(classifier().engine(), odd, tmp_path / f"f.{kind}")
    assert json.loads((tmp_path / "f.npy.json").read_text())["paths"] == [odd]
    assert pyarrow.parquet.read_table(tmp_path / "f.parquet")["path"].to_pylist() == [f"{photos}/\\udcff.png"]

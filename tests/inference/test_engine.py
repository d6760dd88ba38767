"""One engine: predict and evaluate give the same bits, from any thread, without a change of a module's mode."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from torch import nn

from vitrail.classifier import Classifier
from vitrail.data.dataset import ArraySplit, Dataset, FileSplit, Split
from vitrail.errors import ConfigError, DataError
from vitrail.evaluation.evaluate import evaluate
from vitrail.images import limits
from vitrail.images.decode import BadImage
from vitrail.images.preprocess import Preprocess
from vitrail.inference.engine import Engine, SplitReader
from vitrail.inference.torch_runtime import TorchRuntime, eval_view
from vitrail.models.build import build_model
from vitrail.models.configs import ViTConfig

WIDE = ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=96, depth=2, num_heads=3, num_classes=10)


def classifier(precision: str = "auto", config: ViTConfig = WIDE) -> Classifier:
    torch.manual_seed(1)
    model = build_model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    preprocess = Preprocess(size=config.img_size, mean=(0.5,) * 3, std=(0.3,) * 3)
    return Classifier(model, preprocess, [str(k) for k in range(10)], precision=precision)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """500 files: handwritten digits and crops of photographs; eight of them cannot be read."""
    folder, paths = tmp_path_factory.mktemp("photos"), []
    digits, photographs = load_digits().images, [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    for number in range(500):
        if number % 2:
            top, left = 3 * (number % 101), 5 * (number % 97)
            image = Image.fromarray(photographs[number % 4 // 2][top : top + 60 + number % 7, left : left + 70])
        else:
            image = Image.fromarray((digits[number] * 15).astype(np.uint8)).resize((40, 40))
        paths.append(str(folder / f"{number:03}.{('png', 'jpg')[number % 2]}"))
        image.save(paths[-1])
        if number % 70 == 9:
            Path(paths[-1]).write_bytes(Path(paths[-1]).read_bytes()[:90])
    return paths


def as_dataset(split: Split) -> Dataset:
    names = tuple(str(k) for k in range(10))
    return Dataset("photos", names, {"test": split}, None, 3, (0.5,) * 3, (0.3,) * 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropped", [False, True], ids=["unreadable", "unreadable left out"])
@pytest.mark.parametrize("precision", ["auto", "auto on AMX", "off", "bf16"])
def test_predict_and_evaluate_give_the_same_bits(
    precision: str, dropped: bool, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "auto on AMX":
        monkeypatch.setattr("vitrail.utils.device.cpu_bf16", lambda: "AMX")
    clf = classifier(precision.split()[0])
    runtime = clf.engine().runtime
    assert isinstance(runtime, TorchRuntime)
    assert runtime.bf16 == (precision in ("auto on AMX", "bf16"))
    predicted = clf.predict(photos, top=1)
    readable = [p for p in predicted if p.error is None]
    assert len(readable) == 492
    paths = [p.path or "" for p in readable] if dropped else photos
    result = clf.evaluate(as_dataset(FileSplit(paths, np.arange(len(paths)) % 10)))
    assert len(result.skipped) == len(paths) - 492
    assert [p.score for p in readable] == result.records.confidence.tolist()
    assert [p.label for p in readable] == [str(k) for k in result.records.predicted]


def test_the_precisions_differ(photos: list[str]) -> None:
    full, half = (classifier(precision).predict(photos[:9], top=1) for precision in ("off", "bf16"))
    assert full != half
    for one, two in zip(full, half, strict=True):
        assert (one.score or 0) == pytest.approx(two.score or 0, abs=0.05)


@pytest.mark.slow
def test_eight_threads_give_the_same_predictions() -> None:
    config = ViTConfig(img_size=(8, 8), patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    clf, images = classifier(config=config), (load_digits().images[:200] * 15).astype(np.uint8)
    serial = [clf.predict(image) for image in images]
    barrier, modes = threading.Barrier(9), []

    def predict_all(_: int) -> bool:
        barrier.wait()
        return [clf.predict(image) for image in images] == serial

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(predict_all, number) for number in range(8)]
        barrier.wait()
        while not all(future.done() for future in running):  # meanwhile another thread changes the mode
            threading.Event().wait(0.01)
            clf.model.train(not clf.model.training)
            modes.append(clf.model.training)
    assert all(future.result() for future in running)
    assert clf.model.training == modes[-1]


# --- the view of a model in evaluation mode


@pytest.mark.parametrize("name", ["resnet10t", "deit_tiny_distilled_patch16_224", "swin_s3_tiny_224", "convnext_atto"])
def test_a_view_of_an_external_model_is_its_evaluation_mode(name: str) -> None:
    model = timm.create_model(name).train()
    before, images = copy.deepcopy(model.state_dict()), torch.rand(2, 3, 224, 224)
    view = eval_view(model)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in view.modules())
    with torch.inference_mode():
        found = view(images)
        assert torch.equal(found, copy.deepcopy(model).eval()(images))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}


def test_a_view_keeps_references_between_modules() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.line = nn.Dropout(0.9), nn.Linear(4, 4)
            self.parts = [self.line, self.drop]
            self.table = {"drop": self.drop}
            self.call = self.compute

        def compute(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            for part in (*self.parts, self.table["drop"]):
                x = part(x)
            return x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.call(x)

    model, x = Odd(), torch.rand(3, 4)
    view = eval_view(model)
    assert torch.equal(view(x), model.line(x))
    with torch.no_grad():
        model.line.weight.zero_()
    assert torch.equal(view(x), model.line(x))  # the weights are shared


# --- reading


class Sums:
    """A runtime without torch: the first feature is the image's sum."""

    name, num_classes, num_features, default_batch_size = "sums", 1, 1, 4
    preprocess = Preprocess(size=(2, 2))

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def logits(self, images: np.ndarray) -> np.ndarray:
        self.sizes.append(len(images))
        return images.sum(axis=(1, 2, 3), dtype=np.float32)[:, None]

    features = logits

    def fingerprint(self) -> str:
        return "sums"


def read(item: int) -> np.ndarray:
    if item % 5 == 3:
        raise BadImage("is damaged")
    return np.full((2, 2, 3), item, np.uint8)


@pytest.mark.parametrize("allowed", [0, 1])
def test_images_are_read_where_no_more_threads_can_be_started(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def limited(thread: threading.Thread) -> None:
        if len(started) == allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    results = list(Engine(Sums()).run(range(19), read, workers=3))
    assert [item for result in results for item in result.items] == list(range(19))
    assert len(started) == allowed


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_next_readable_images_in_order(workers: int) -> None:
    runtime = Sums()
    results = list(Engine(runtime).run(range(19), read, workers=workers))
    assert runtime.sizes == [4, 4, 4, 3]
    assert [item for result in results for item in result.items] == list(range(19))
    assert [i for result in results for i, e in zip(result.items, result.errors, strict=True) if e] == [3, 8, 13, 18]
    for result in results:
        assert result.outputs[:, 0].tolist() == [12.0 * item for item in result.readable]


def test_items_are_read_ahead_by_two_batches_and_threads_end() -> None:
    taken: list[int] = []
    stream = Engine(Sums()).run((taken.append(i) or i for i in range(1000)), read, workers=2)
    next(stream)
    assert len(taken) <= 3 * 4 + 2
    stream.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_with_little_memory_a_batch_is_computed_while_no_image_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_memory_is_scarce", lambda look: True)

    class Checked(Sums):
        def logits(self, images: np.ndarray) -> np.ndarray:
            assert limits._memory._free == 0
            return super().logits(images)

    assert len(list(Engine(Checked()).run(range(19), read, workers=3))) == 4
    assert limits._memory._free == limits.DECODING_BYTES


def test_nothing_to_run() -> None:
    assert list(Engine(Sums()).run([], read)) == []
    (result,) = Engine(Sums()).run([3, 8], read)
    assert (result.outputs.shape, result.errors) == ((0, 1), ["is damaged", "is damaged"])
    with pytest.raises(ConfigError, match=r"batch_size .*0"):
        next(Engine(Sums()).run([1], read, 0))


def test_errors_of_ours_are_raised() -> None:
    for workers in (0, 2):
        with pytest.raises(ZeroDivisionError):
            list(Engine(Sums()).run([1], lambda item: 1 // 0, workers=workers))  # type: ignore[arg-type,return-value]


def test_a_split_is_read_as_preprocess_crops_it(photos: list[str]) -> None:
    rng = np.random.default_rng(0)
    grey = ArraySplit(rng.integers(0, 256, (5, 8, 8), dtype=np.uint8), np.arange(5))
    colour = ArraySplit(rng.integers(0, 256, (5, 9, 7, 3), dtype=np.uint8), np.arange(5))
    for split in (grey, colour, FileSplit(photos[:5], np.arange(5))):
        for size in ((8, 8), (12, 10)):
            preprocess = Preprocess(size=size)
            reader = SplitReader(split, preprocess)
            for row in (*range(5), 2):
                np.testing.assert_array_equal(reader(row), preprocess.crop(split.image(row)))
    with pytest.raises(DataError, match="no images"):
        SplitReader(FileSplit([], np.zeros(0, dtype=np.int64)), Preprocess(size=(8, 8)))


@pytest.mark.parametrize("batch_size", [3, 7])
def test_several_processes_evaluate_each_image_once(batch_size: int, photos: list[str]) -> None:
    """Every process calls a sharded model equally often, however many of its images are unreadable."""
    from vitrail.utils.distributed import DistributedContext

    class NoCommunication(DistributedContext):
        """One of several processes, without communication."""

        def all_gather_object(self, value):  # type: ignore[no-untyped-def]
            return [value]

        def all_gather_numbers(self, *values: float) -> list[list[float]]:
            return [list(values)]

    split = FileSplit(photos[:41], np.arange(41) % 10)
    rows, calls = [], []
    for rank in range(3):
        runtime = TorchRuntime(classifier().model, classifier().preprocess)
        counted: list[int] = []
        runtime.model.register_forward_pre_hook(lambda module, args, seen=counted: seen.append(1))
        result = evaluate(
            runtime, split, "0123456789", batch_size=batch_size, distributed=NoCommunication(rank, 3), sharded=True
        )
        rows += result.records.indices.tolist()
        calls.append(len(counted))
    assert rows == [row for row in range(41) if row % 70 != 9]
    assert len(set(calls)) == 1

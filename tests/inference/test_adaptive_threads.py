"""Threads in a long job of inference, with computation whose speed is planted."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from vitrail import create_model
from vitrail.classifier import Classifier
from vitrail.images.preprocess import Preprocess
from vitrail.inference import adaptive_threads, torch_runtime
from vitrail.inference.adaptive_threads import AdaptiveThreads
from vitrail.inference.runtime import Images, Outputs

BATCH = np.zeros((16, 2, 2, 3), np.uint8)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


class Machine:
    """A clock, and cores of which other programs have a part: work on two threads then waits, twelve times as long."""

    def __init__(self, busy: bool) -> None:
        self.busy = busy
        self.now, self.ran, self.calls = 0.0, 0.0, list[int]()

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.ran

    def compute(self, images: Images) -> Outputs:
        """The number of threads for each image."""
        threads = torch.get_num_threads()
        work = 0.01 * len(images) / threads
        self.ran += work
        self.now += work * (24 if self.busy and threads == 2 else 1)
        self.calls.append(len(images))
        return np.full((len(images), 1), threads, np.float32)


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(request.param)
    monkeypatch.setattr(adaptive_threads, "time", found)
    monkeypatch.setattr("vitrail.inference.threads.time", found)
    return found


@pytest.mark.parametrize("machine", [True], indirect=True)
def test_fewer_threads_where_the_calling_thread_waits(machine: Machine) -> None:
    job = AdaptiveThreads()
    with pytest.warns(UserWarning, match=r"with 1 of 2 threads: 100 images/s with 1, 8.3 images/s with 2;") as told:
        used = [int(job.run(machine.compute, BATCH)[0, 0]) for _ in range(6)]
    assert used == [2, 1, 1, 1, 1, 1]  # the first batch took 1.9 s
    assert machine.calls == [16, 4, 4, 4, 16, 16, 16, 16, 16], "a trial takes a part of a batch"
    assert len(told) == 1
    assert torch.get_num_threads() == 2, "as the caller has it"


@pytest.mark.parametrize("machine", [False], indirect=True)
def test_no_trial_on_free_cores_until_they_are_busy(machine: Machine) -> None:
    job = AdaptiveThreads()
    used = [int(job.run(machine.compute, BATCH)[0, 0]) for _ in range(100)]
    assert machine.calls == [16] * 100
    assert set(used) == {2}
    machine.busy = True
    with pytest.warns(UserWarning, match="with 1 of 2 threads"):
        used = [int(job.run(machine.compute, BATCH)[0, 0]) for _ in range(30)]
    assert used.index(1) <= 8  # 1.9 s each, in windows of four
    machine.busy = False
    with pytest.warns(UserWarning, match="with 2 of 2 threads"):
        used = [int(job.run(machine.compute, BATCH)[0, 0]) for _ in range(500)]
    assert used[-1] == 2


def test_predict_embed_and_evaluate_adapt_and_an_engine_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[AdaptiveThreads] = []

    class Recorded(AdaptiveThreads):
        def __init__(self) -> None:
            made.append(self)
            super().__init__()

    monkeypatch.setattr(torch_runtime, "AdaptiveThreads", Recorded)
    model = create_model("vit_nano_patch2_8", num_classes=10, in_chans=1)
    classifier = Classifier(
        model, Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,), channels=1), [str(k) for k in range(10)]
    )
    image = np.zeros((8, 8), np.uint8)
    classifier.engine()
    assert not made
    classifier.predict(image)
    classifier.embed(image)
    classifier.evaluate("digits")
    assert len(made) == 3

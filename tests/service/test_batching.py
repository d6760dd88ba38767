"""How batches are formed from images that wait, and which are chosen at start."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from vitrail.inference.runtime import Images, Outputs
from vitrail.service import batching
from vitrail.service.batching import Batcher, choose_batch


class Model:
    """Computes only what `let_through` allows. sizes: of the batches, when they begin."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._allowed = threading.Semaphore(0)

    def __call__(self, images: Images) -> Outputs:
        self.sizes.append(len(images))
        assert self._allowed.acquire(timeout=10)
        if (images == 255).all():
            raise ValueError("white")
        return images.reshape(len(images), -1)[:, :1].astype(np.float32)

    def let_through(self, batches: int) -> None:
        self._allowed.release(batches)


async def submit(batcher: Batcher, value: int) -> float:
    with batcher.admit():
        return float((await batcher.submit(np.full((2, 2, 3), value, np.uint8)))[0])


def with_batcher(parallel: int, check: Callable[[Batcher, Model], Awaitable[None]]) -> None:
    async def run() -> None:
        model = Model()
        batcher = Batcher(model, max_batch=2, max_delay=0.004, max_queue=100, parallel=parallel)
        batcher.start()
        try:
            await check(batcher, model)
        finally:
            model.let_through(100)
            await batcher.stop()

    asyncio.run(run())


@pytest.mark.parametrize(("parallel", "begun"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 2])])
def test_beside_a_batch_only_full_ones_are_begun(parallel: int, begun: list[int]) -> None:
    async def check(batcher: Batcher, model: Model) -> None:
        first = asyncio.create_task(submit(batcher, 0))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(submit(batcher, value)) for value in range(1, 6)]
        await asyncio.sleep(0.05)
        assert model.sizes == begun
        model.let_through(10)
        assert await asyncio.gather(first, *others) == [0, 1, 2, 3, 4, 5]
        assert sorted(model.sizes) == [1, 1, 2, 2]
        assert batcher.admitted == 0

    with_batcher(parallel, check)


def test_a_batch_that_fails_beside_another() -> None:
    async def check(batcher: Batcher, model: Model) -> None:
        tasks = [asyncio.create_task(submit(batcher, value)) for value in (1, 2, 255, 255)]
        await asyncio.sleep(0.05)
        assert model.sizes == [2, 2]
        model.let_through(2)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(each) for each in found] == ["1.0", "2.0", "white", "white"]
        model.let_through(1)
        assert await submit(batcher, 3) == 3  # it goes on

    with_batcher(2, check)


def test_images_that_do_not_fit_together() -> None:
    async def check(batcher: Batcher, model: Model) -> None:
        images = [np.zeros((2, 2, 3), np.uint8), np.zeros((3, 3, 3), np.uint8)]
        found = await asyncio.gather(*map(batcher.submit, images), return_exceptions=True)
        assert [type(each) for each in found] == [ValueError, ValueError]

    with_batcher(1, check)


@pytest.mark.parametrize("turns", range(5))
def test_a_stop_at_any_moment_ends(turns: int) -> None:
    async def check(batcher: Batcher, model: Model) -> None:
        with batcher.admit(2), batcher.decoding():
            waiting = asyncio.create_task(submit(batcher, 1))
            for _ in range(turns):
                await asyncio.sleep(0)
            batcher._changed.set()
            await asyncio.sleep(0)
            async with asyncio.timeout(5):
                await batcher.stop()
            waiting.cancel()

    with_batcher(1, check)


class Clock:
    """A model that takes `seconds` of a batch's size, on a clock of its own; `at_once` batches at the same time."""

    def __init__(self, seconds: Callable[[int], float], at_once: int) -> None:
        self._seconds, self._at_once, self._lock, self.now = seconds, at_once, threading.Lock(), 0.0

    def compute(self, images: Images) -> Outputs:
        with self._lock:
            self.now += self._seconds(len(images)) / self._at_once
        return np.zeros((len(images), 1), np.float32)


@pytest.mark.parametrize(
    ("seconds", "at_once", "size"),
    [
        (lambda size: 0.005 * size, 1, 1),
        (lambda size: 0.005 * size, 2, 1),
        (lambda size: 0.02 + 0.001 * size, 1, 8),
        (lambda size: 0.02 + 0.001 * size, 2, 8),
        (lambda size: 0.2 * size, 1, 1),  # too slow for trials
    ],
    ids=["linear", "linear, two at once", "overhead", "overhead, two at once", "slow"],
)
def test_batches_are_chosen_by_measurement(
    seconds: Callable[[int], float], at_once: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(seconds, at_once)
    monkeypatch.setattr(batching, "perf_counter", lambda: clock.now)
    assert choose_batch(clock.compute, (2, 2, 3), at_once) == size
    assert clock.now <= 0.4 + 4 * seconds(1)  # the time of trials, and what is not known before the first

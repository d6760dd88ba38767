"""The number of threads by trial, on planted times, and when to look again."""

from collections.abc import Callable

import pytest
import torch

from vitrail.inference.threads import ThreadWatch, Trial, fastest_threads, fewer, timed


def planted(times: dict[int, float], calls: list[int]) -> Callable[[int], float]:
    def seconds(threads: int) -> float:
        calls.append(threads)
        return times[threads]

    return seconds


def test_numbers_to_try() -> None:
    found = [16]
    while found[-1] > 1:
        found.append(fewer(found[-1]))
    assert found == [16, 12, 8, 6, 4, 3, 2, 1]
    assert [fewer(threads) for threads in (1, 5, 7, 10, 96)] == [1, 4, 6, 8, 64]


@pytest.mark.parametrize(
    ("times", "fastest"),
    [
        ({1: 1.7, 2: 1.0}, 2),
        ({1: 0.03, 2: 0.4}, 1),
        ({1: 0.95, 2: 1.0}, 2),  # not worth other last bits
        ({1: 0.85, 2: 1.0}, 1),
        ({16: 9.0, 12: 6.0, 8: 1.0, 6: 1.2, 4: 1.7}, 8),
        ({4: 4.0, 3: 3.0, 2: 2.0, 1: 1.0}, 1),
        ({1: 1.0}, 1),
    ],
)
def test_the_fastest_number(times: dict[int, float], fastest: int) -> None:
    calls: list[int] = []
    most = max(times)
    trial = fastest_threads(most, planted(times, calls))
    assert trial.threads == fastest
    assert trial.seconds == {threads: pytest.approx(times[threads]) for threads in trial.seconds}
    assert calls[0] == fewer(most), "the warm-up is not at the number that may be many times slower"


def test_a_clear_result_needs_one_round_and_a_close_one_three() -> None:
    for slow, rounds in ((3.0, 1), (1.2, 3), (0.5, 1)):
        calls: list[int] = []
        fastest_threads(2, planted({2: slow, 1: 1.0}, calls))
        assert calls == [1, *[2, 1] * rounds]
    calls = []
    fastest_threads(2, planted({2: 1.2, 1: 1.0}, calls), limit=0.0)
    assert calls == [1, 2, 1]


def test_the_rate_of_each_number_is_told() -> None:
    assert Trial(1, {2: 8.0, 1: 0.64}).line(25) == "39 images/s with 1, 3.1 images/s with 2"


def test_timed_sets_torchs_threads() -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    try:
        assert timed(lambda: seen.append(torch.get_num_threads()))(3) >= 0
    finally:
        torch.set_num_threads(before)
    assert seen == [3]


def test_it_is_looked_again_when_the_rate_halves() -> None:
    watch = ThreadWatch(2, 2)
    assert not any(watch.due(0.5) for _ in range(40))
    due = [watch.due(1.1) for _ in range(4)]
    assert due == [False, False, False, True]
    watch.looked(Trial(2, {}), cost=0.5)
    assert not any(watch.due(1.1) for _ in range(40)), "this is the usual rate now"
    assert [watch.due(0.5) for _ in range(8)] == [False] * 8
    assert any(watch.due(1.1) for _ in range(8)), "and 0.5 is again"


def test_images_count_where_batches_differ() -> None:
    watch = ThreadWatch(2, 2)
    assert not any(watch.due(0.5, 10) for _ in range(8))
    assert not any(watch.due(1.5, 30) for _ in range(8))
    assert any(watch.due(1.5, 10) for _ in range(8))


def test_looking_takes_a_twentieth_of_the_time_at_most() -> None:
    watch = ThreadWatch(2, 2)
    watch.looked(Trial(2, {}), cost=5.0)
    for _ in range(8):
        assert not watch.due(1.0)
    slow = [watch.due(3.0) for _ in range(60)]
    assert 8 + 3 * (slow.index(True) + 1) >= 100


def test_more_threads_are_tried_again_and_more_and_more_rarely() -> None:
    watch = ThreadWatch(2, 2)
    assert not any(watch.due(1.0) for _ in range(200)), "all are used"
    waits = []
    for _ in range(3):
        watch.looked(Trial(1, {}), cost=0.1)
        waits.append(next(second for second in range(1, 999) if watch.due(1.0)))
    assert waits == [32, 60, 120]  # after windows of four steps; the first look has changed the number
    assert not any(ThreadWatch(1, 1).due(1.0 + step) for step in range(200))

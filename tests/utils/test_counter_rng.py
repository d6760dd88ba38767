import subprocess
import sys

import numpy as np
import pytest

from vitrail.utils.counter_rng import fold, mix, permutation, uniform


def test_mix_is_splitmix64():
    # The published sequence for the seed 1234567.
    state = (np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert mix(state).tolist() == expected


def test_a_draw_hangs_on_its_place_alone():
    whole = uniform(3, 7, np.arange(100), "flip", 4)
    assert whole.shape == (100, 4)
    assert whole.min() >= 0
    assert whole.max() < 1
    order = np.random.default_rng(0).permutation(100)
    np.testing.assert_array_equal(uniform(3, 7, order, "flip", 4), whole[order])
    np.testing.assert_array_equal(uniform(3, 7, [42], "flip", 2), whole[42:43, :2])


@pytest.mark.parametrize("other", [(4, 7, "flip"), (3, 8, "flip"), (3, 7, "crop"), (7, 3, "flip")])
def test_every_part_of_the_key_counts(other):
    seed, epoch, stream = other
    a, b = uniform(3, 7, np.arange(2000), "flip", 1)[:, 0], uniform(seed, epoch, np.arange(2000), stream, 1)[:, 0]
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


def test_draws_are_even_and_independent():
    u = uniform(0, 0, np.arange(100_000), "x", 3)
    counts = np.histogram(u[:, 0], bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi square, 99 degrees of freedom: p = 1e-4
    assert np.abs(np.corrcoef(u.T) - np.eye(3)).max() < 0.015  # columns
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.015  # neighbours


def test_permutation():
    order = permutation(0, 5, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == permutation(0, 5, 1000).tolist()
    assert (order == permutation(0, 6, 1000)).mean() < 0.02
    assert permutation(0, 0, 0).shape == (0,)
    first = [int(permutation(0, epoch, 10)[0]) for epoch in range(2000)]
    assert np.bincount(first, minlength=10).min() > 140


def test_fold():
    assert fold(0, 1, "a") != fold(0, "a", 1) != fold(0, 1, "b")
    assert all(0 <= fold(seed, "step", 3) < 2**63 for seed in (-1, 0, 2**64 + 1))


def test_another_process_draws_the_same():
    code = "from vitrail.utils.counter_rng import *\n"
    code += "print(repr(uniform(1, 2, [3], 'x', 1)[0, 0]), fold(1, 'x'), permutation(1, 2, 9))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{uniform(1, 2, [3], 'x', 1)[0, 0]!r} {fold(1, 'x')} {permutation(1, 2, 9)}"

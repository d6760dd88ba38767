"""Counter-based random numbers: each is a pure function of (seed, epoch, stream, index, column).

They depend neither on the order of samples, nor on the number of workers or processes, nor on earlier draws. The hash
is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). numpy only.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function, elementwise: a bijection of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    """`mix` for one Python integer."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=1024)
def hash_text(text: str) -> int:
    """A 64-bit hash of a text, the same in every process (unlike Python's hash())."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _key(seed: int, *values: int | str) -> int:
    key = _mix_int((seed + _GOLDEN) & _MASK)
    for item in values:
        number = hash_text(item) if isinstance(item, str) else item
        # Mixed after each value, so that (1, 2) and (2, 1) give two keys.
        key = _mix_int(((key ^ (number & _MASK)) + _GOLDEN) & _MASK)
    return key


def fold(seed: int, *values: int | str) -> int:
    """A seed in [0, 2**63) derived from a seed, numbers and names, as `jax.random.fold_in`."""
    return _key(seed, *values) >> 1


def uniform(
    seed: int, epoch: int, indices: Sequence[int] | npt.NDArray[np.integer], stream: str, n: int
) -> npt.NDArray[np.float64]:
    """`n` numbers in [0, 1) for each index: an array of shape (len(indices), n).

    `stream` names the use ("flip", "crop"), so that two uses of one sample draw different numbers.
    """
    index = np.asarray(indices).astype(np.int64).astype(np.uint64)
    base = mix(np.uint64(_key(seed, epoch, stream)) + index * np.uint64(_GOLDEN))
    columns = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = mix(base[:, None] + columns[None, :])
    # The 53 high bits fill a double's mantissa exactly.
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """The order of `n` samples in an epoch: a permutation of 0..n-1."""
    keys = mix(np.uint64(_key(seed, epoch, "order")) + np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN))
    return np.argsort(keys, kind="stable").astype(np.int64)

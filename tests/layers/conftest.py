from collections.abc import Iterator

import pytest

from vitrail.layers.norm import norm_kernel
from vitrail.layers.window import window_kernel


@pytest.fixture
def no_choice() -> Iterator[None]:
    """Whether a Triton kernel is used is decided anew, before and after."""
    for choice in (norm_kernel, window_kernel):
        choice.cache_clear()
    yield
    for choice in (norm_kernel, window_kernel):
        choice.cache_clear()

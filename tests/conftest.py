"""What all tests share: the oracles made importable, and a quiet, repeatable torch."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network

import benchmarks.oracles  # noqa: F401  # before timm is imported
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read on its import: without a GPU, kernels run in its interpreter

torch.set_num_threads(1)  # the models are so small that threads cost more than they bring; tests run in parallel


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests decode or download stays out of the cache of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _float32() -> Iterator[None]:
    """Tests run in float32 on every machine, also where amp=auto would choose bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.utils.device.cpu_bf16", lambda: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_plots() -> Iterator[None]:
    """Runs draw no PNG files, which take longer than the tiny runs; the tests of plots draw them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.reports.plots.available", lambda: False)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

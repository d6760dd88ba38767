"""Without a connection: one line, within three seconds, wherever something would be downloaded."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import vitrail
from vitrail.data.catalog import open_dataset
from vitrail.errors import VitrailError
from vitrail.training import run  # noqa: F401  # beforehand: the time of imports is not that of the attempt
from vitrail.utils.download import fetch, unreachable


def hangs(*_: Any, **__: Any) -> socket.socket:
    """A name server or a host that never answers."""
    time.sleep(30)
    raise TimeoutError


def unknown(*_: Any, **__: Any) -> socket.socket:
    raise socket.gaierror(-2, "Name or service not known")


@pytest.fixture(autouse=True)
def _online_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With empty caches, and huggingface_hub as on a person's machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "vitrail"))
    for name in ("HF_ENDPOINT", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_server_is_reachable_or_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert unreachable(f"http://127.0.0.1:{port}/a/b") is None
    assert "refused" in str(unreachable(f"http://127.0.0.1:{port}/a/b")).lower()


def test_a_proxy_is_asked_in_place_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert unreachable("https://nowhere.invalid/x") is None
    assert unreachable("https://nowhere.invalid/x") is not None


SOURCES: dict[str, Callable[[Path], object]] = {
    "model": lambda out: vitrail.load("hf:org/model"),
    "hf-hub": lambda out: vitrail.load("hf-hub:org/model"),
    "published": lambda out: vitrail.load("vit_tiny_patch16_224"),
    "pretrained": lambda out: vitrail.train("digits", model="vit_tiny_patch16_224", pretrained=True, out=out),
    "teacher": lambda out: vitrail.train("digits", teacher="vit_tiny_patch16_224", out=out),
    "url": lambda out: fetch("https://nowhere.invalid/x", out / "x", sha256="0" * 64),
    "dataset": lambda out: open_dataset("cifar10"),
}


@pytest.mark.parametrize(
    ("source", "fault"), [*((source, unknown) for source in SOURCES), ("model", hangs), ("url", hangs)]
)
def test_one_line_within_three_seconds(
    source: str, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(socket, "create_connection", fault)
    start = time.perf_counter()
    with pytest.raises(VitrailError) as error:
        SOURCES[source](tmp_path / "out")
    assert time.perf_counter() - start < 3.0
    assert "\n" not in str(error.value)
    assert ("no answer in 2 s" if fault is hangs else "not known") in str(error.value)
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "out" / "config.toml").exists()


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    before = datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(socket, "create_connection", unknown)
    start = time.perf_counter()
    with pytest.raises(VitrailError) as error:
        open_dataset("hf-dataset:org/nothing")
    assert time.perf_counter() - start < 3.0
    assert "\n" not in str(error.value)
    assert "org/nothing" in str(error.value)
    assert "cannot reach the hub (Name or service not known)" in str(error.value)
    assert capfd.readouterr().err == ""
    assert (before, False) == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE), "as it was"

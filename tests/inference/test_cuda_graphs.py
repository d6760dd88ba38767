"""CUDA graphs: which passes are recorded and replayed, with a recorder that needs no GPU; on one, the same logits."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitrail.errors import DeviceError
from vitrail.images.preprocess import Preprocess
from vitrail.inference import cuda_graphs
from vitrail.inference.cuda_graphs import CudaGraphs, Recording
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.models.build import build_model
from vitrail.models.configs import SwinConfig, ViTConfig


class FakeRecorder:
    """A "graph" that, like a real one, reads and writes the tensors of its recording alone."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, forward: Callable[[Tensor], Tensor], images: Tensor) -> Recording:
        self.shapes.append(tuple(images.shape))
        static = images.clone()
        output = forward(static)
        return Recording(static, output, lambda: output.copy_(forward(static)))


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(4, 3)


def graphs_of(model: nn.Module) -> tuple[CudaGraphs, FakeRecorder]:
    recorder = FakeRecorder()
    return CudaGraphs(model, model, lambda: recorder), recorder


@torch.no_grad()
def test_a_shape_is_recorded_when_it_comes_again(model: nn.Module) -> None:
    graphs, recorder = graphs_of(model)
    found = []
    for count in (2, 5, 2, 2, 5):
        x = torch.randn(count, 4)
        found.append((graphs(x), model(x)))
    assert recorder.shapes == [(2, 4), (5, 4)]
    for ours, expected in found:  # also those before the last: a replay does not write to earlier results
        assert torch.equal(ours, expected)


@torch.no_grad()
def test_new_values_of_weights_count_and_new_tensors_are_recorded_anew(model: nn.Module) -> None:
    graphs, recorder = graphs_of(model)
    x = torch.randn(2, 4)
    for _ in range(3):
        graphs(x)
    model.weight.mul_(2)
    assert torch.equal(graphs(x), model(x))
    assert len(recorder.shapes) == 1
    model.weight = nn.Parameter(torch.randn(3, 4))
    assert torch.equal(graphs(x), model(x))
    assert len(recorder.shapes) == 2


@torch.no_grad()
def test_more_shapes_than_are_kept_are_computed_without_a_graph(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "LIMIT", 2)
    graphs, recorder = graphs_of(model)
    for count in (1, 1, 2, 2, 1, 3, 3, 3, 1, 2):
        x = torch.randn(count, 4)
        assert torch.equal(graphs(x), model(x))
    assert recorder.shapes == [(1, 4), (2, 4)]


@torch.no_grad()
def test_a_model_that_cannot_be_recorded_is_computed_without_graphs(model: nn.Module) -> None:
    def fail(*_: object) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, x = CudaGraphs(model, model, lambda: fail), torch.randn(2, 4)
    graphs(x)
    with pytest.warns(UserWarning, match="not permitted"):
        assert torch.equal(graphs(x), model(x))
    assert torch.equal(graphs(x), model(x))  # without another warning, which would be an error


def test_threads_do_not_mix_their_images(model: nn.Module) -> None:
    graphs, _ = graphs_of(model)
    inputs = [torch.full((2, 4), float(number)) for number in range(64)]

    def compute(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return graphs(x)

    with ThreadPoolExecutor(4) as pool:
        for x, found in zip(inputs, pool.map(compute, inputs), strict=True):
            assert torch.equal(found, model(x))


def test_only_on_cuda() -> None:
    model = build_model(ViTConfig(img_size=(8, 8), patch_size=4, embed_dim=8, depth=1, num_heads=1, num_classes=2))
    with pytest.raises(DeviceError, match="cpu"):
        TorchRuntime(model, Preprocess(size=(8, 8)), cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["off", "bf16"])
def test_replays_on_a_gpu_are_the_passes(precision: str) -> None:
    config = SwinConfig(img_size=(56, 56), embed_dim=32, depths=(2, 2), num_heads=(1, 2), num_classes=5)
    model, preprocess = build_model(config).eval().cuda(), Preprocess(size=(56, 56))
    plain = TorchRuntime(model, preprocess, precision)
    graphed = TorchRuntime(model, preprocess, precision, cuda_graphs=True)
    for count in (1, 3, 1, 3, 1, 3):
        images = np.random.default_rng(count).integers(0, 256, (count, 56, 56, 3), np.uint8)
        assert np.array_equal(plain.logits(images), graphed.logits(images))
        assert np.array_equal(plain.features(images), graphed.features(images))
    with torch.no_grad():
        model.head.fc.weight.mul_(2)
    images = np.full((1, 56, 56, 3), 99, np.uint8)
    assert np.array_equal(plain.logits(images), graphed.logits(images))
    model.head.fc.weight = nn.Parameter(torch.randn_like(model.head.fc.weight))  # in another place
    for _ in range(3):
        assert np.array_equal(plain.logits(images), graphed.logits(images))

"""The preprocessing in the graph against Pillow, through `Preprocess.crop`."""

import resource
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import helper
from PIL import Image

from vitrail.deploy.graph import IR_VERSION, OPSET
from vitrail.deploy.onnx_ops import GraphBuilder, Value
from vitrail.deploy.preprocess_graph import add_preprocess
from vitrail.images.preprocess import CROP_MODES, INTERPOLATIONS, Preprocess

Array = npt.NDArray[np.uint8]
# Lines, tall and wide, smaller and larger than the model's input, odd, of the input's size, and one pixel more.
SIZES = [(1, 1), (1, 7), (9, 1), (1, 300), (300, 1), (3, 5), (17, 33), (33, 17), (40, 24), (41, 24), (32, 31)]
SIZES += [(64, 64), (100, 64), (120, 160), (333, 77), (20, 700)]


def session(preprocess: Preprocess) -> Callable[[Array], Array]:
    graph = GraphBuilder("")
    pixels = add_preprocess(graph, Value(graph, "image"), preprocess)
    kind, channels = onnx.TensorProto.UINT8, preprocess.channels
    image = helper.make_tensor_value_info("image", kind, ["h", "w", channels])
    output = helper.make_tensor_value_info(pixels.name, kind, [1, *preprocess.size, channels])
    model = helper.make_model(
        helper.make_graph(graph.nodes, "preprocess", [image], [output], graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    found = onnxruntime.InferenceSession(model.SerializeToString())
    return lambda image: found.run(None, {"image": image})[0][0]


def random_image(rng: np.random.Generator, height: int, width: int, channels: int) -> Array:
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_same_as_pillow(interpolation: str, crop_mode: str) -> None:
    rng = np.random.default_rng(0)
    for size, crop_pct, channels in (((40, 24), 1.0, 3), ((32, 32), 0.9, 1), ((24, 40), 0.875, 3)):
        preprocess = Preprocess(
            size=size,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            interpolation=interpolation,
            channels=channels,
            mean=(0.2, 0.4, 0.9)[:channels],
            std=(0.2,) * channels,
        )
        run = session(preprocess)
        for height, width in SIZES:
            image = random_image(rng, height, width, channels)
            expected = preprocess.crop(Image.fromarray(image if channels == 3 else image[..., 0]))
            worst = np.abs(run(image).astype(int) - expected).max()
            limit = 0 if interpolation in ("nearest", "box") else 1
            assert worst <= limit, f"{height}x{width} to {size}, {crop_pct}: {worst} of 255"


def test_long_thin_images_take_no_more_memory() -> None:
    """Only what the crop shows is resized: the whole of this image would be 96 x 9.6 million pixels, 2.8 GB."""
    preprocess = Preprocess(size=(96, 96))
    image = random_image(np.random.default_rng(0), 1, 100_000, 3)
    expected = preprocess.crop(Image.fromarray(image[:, 49_900:50_100]))
    run = session(preprocess)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert np.abs(run(image).astype(int) - expected).max() <= 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_sizes_after_resizing() -> None:
    """Halves are rounded as in Python: a gradient shows a difference of one pixel."""
    for size in ((30, 20), (50, 50), (20, 30)):
        preprocess = Preprocess(size=size, crop_mode="border", interpolation="bilinear")
        run = session(preprocess)
        for height in range(2, 60, 3):
            for width in range(2, 60, 7):
                rows, columns = np.mgrid[:height, :width]
                gradient = np.stack([rows * 4, columns * 4, rows + columns], axis=2).astype(np.uint8)
                expected = preprocess.crop(Image.fromarray(gradient))
                assert np.abs(run(gradient).astype(int) - expected).max() <= 1, (size, height, width)

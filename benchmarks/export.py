"""Exports: accuracy and speed of every architecture, and the speed beside the same network in timm.

Accuracy: small classifiers that are trained on Fashion-MNIST at 32 px (or read from --runs), each exported as
everything that this machine runs; the check is on the test split. Calibration: 300 training images. `by_hand_ms`: every
candidate built and timed once more, outside of the export; `over_best`: of the one that the export kept, its time over
that of the fastest which passes.

Speed: vit_small and swin_tiny at 224 px with random weights (time does not depend on them), the same weights in timm:
eager, torch.compile, ONNX Runtime and OpenVINO on timm's export, and NNCF + OpenVINO on that; for any batch size as our
exports, and for comparison compiled for one image only. All in one process, in turn, each after a rest; normalised
images to logits for timm, pixels to logits for ours.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.measure import write
from benchmarks.peers import timm_twin
from vitrail.classifier import Classifier, load
from vitrail.data.catalog import open_dataset
from vitrail.deploy.candidates import CANDIDATES, Builder, unavailable
from vitrail.deploy.export import export
from vitrail.deploy.quantize.calibration import Calibration, choose_calibration
from vitrail.deploy.trials import ExportRefused
from vitrail.errors import ExportError
from vitrail.evaluation.timing import interleaved
from vitrail.inference.exported import open_runtime
from vitrail.inference.openvino_runtime import openvino_core
from vitrail.inference.threads import default_threads
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS
from vitrail.models.configs import ConvNeXtConfig, SwinConfig
from vitrail.training.run import train

DATA = "fashion-mnist"
NETWORKS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224")
_SWIN = SwinConfig(
    img_size=(32, 32), in_chans=1, num_classes=10, patch_size=2, window_size=4, embed_dim=48, depths=(2, 2, 2),
    num_heads=(2, 4, 8),
)  # fmt: skip
_CONVNEXT = ConvNeXtConfig(img_size=(32, 32), in_chans=1, num_classes=10, depths=(2, 2, 4, 2), dims=(48, 96, 192, 384))
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "vit": lambda: "vit_micro_patch8_32",
    "deit": lambda: "deit_micro_distilled_patch8_32",
    "swin": lambda: build_model(_SWIN),
    "resnet": lambda: "resnet20_32",
    "convnext": lambda: build_model(_CONVNEXT),
}
EPOCHS = {"vit": 2, "deit": 2}  # the others 1; the DeiT has the ViT as its teacher
SETTINGS = {"batch_size": 128, "lr": 2e-3, "warmup_epochs": 0.2, "clip_grad": 1.0, "label_smoothing": 0.1, "ema": 0.99}
REST = 0.1  # seconds before each timed call
ONE = ", one image"  # compiled for a batch of 1


def accuracy(runs: Path, data_dir: str | None, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """All candidates of each architecture, with what the gate says of them."""
    rows = []
    for name in names:
        folder = runs / name
        if not (folder / "model").exists():
            model, teacher = ARCHITECTURES[name](), runs / "vit" if name == "deit" else None
            epochs = EPOCHS.get(name, 1)
            train(DATA, model=model, out=folder, epochs=epochs, teacher=teacher, data_dir=data_dir, **SETTINGS)
        with tempfile.TemporaryDirectory() as out:
            classifier = load(folder)
            assert isinstance(classifier, Classifier)
            try:
                found = export(classifier, Path(out, name), check=DATA, data_dir=data_dir).rows
            except ExportRefused as refused:
                found = refused.rows
        _time_by_hand(found, classifier, data_dir, rounds)
        for row in found:
            row["kept"] = row.pop("path") is not None
            rows.append({"architecture": name, **row})
            print(
                name, row["target"], row["precision"], row["top1"], row["difference"], row["agreement"], row["speedup"]
            )
    return rows


def _time_by_hand(rows: list[dict[str, Any]], classifier: Classifier, data_dir: str | None, rounds: int) -> None:
    """Add `by_hand_ms` and `over_best`; rows with layers in float32 are left out."""
    size, channels = classifier.preprocess.size, classifier.preprocess.channels
    pixels = np.random.default_rng(0).integers(0, 256, (1, *size, channels), np.uint8)
    calibration = choose_calibration(open_dataset(DATA, data_dir=data_dir), classifier.preprocess)
    with tempfile.TemporaryDirectory() as folder:
        runtimes = _ours(classifier, Path(folder), calibration)
        calls = {label: partial(call, pixels) for label, call in runtimes.items()}
        took = {label: 1e3 * median(each) for label, each in interleaved(calls, rounds, rest=REST).items()}
    for row in rows:
        if not row["float_layers"]:
            row["by_hand_ms"] = took.get(f"vitrail {row['target']} {row['precision']}")
    passed = [row["by_hand_ms"] for row in rows if row["accepted"] and row.get("by_hand_ms")]
    for row in rows:
        if row["path"] is not None and row.get("by_hand_ms"):
            row["over_best"] = row["by_hand_ms"] / min(passed)
            print(f"{row['target']} {row['precision']} was kept: {row['over_best']:.3f} of the fastest's time")


def speed(name: str, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of batches of 1 and 16, of timm's network in its runtimes and of our exports."""
    torch.manual_seed(0)
    classifier = random_classifier(name)
    twin = timm_twin(name, classifier.model.config).eval()
    twin.load_state_dict(classifier.model.state_dict(), strict=False)
    with tempfile.TemporaryDirectory() as folder:
        images = [np.random.default_rng(i).integers(0, 256, (224, 224, 3), np.uint8) for i in range(64)]
        noise = Calibration("noise", "none", tuple(map(str, range(len(images)))), images)
        calls = {**timm_runtimes(twin, Path(folder), images, classifier), **_ours(classifier, Path(folder), noise)}
        rows = []
        for batch in (1, 16):
            pixels = np.stack(images[:batch])
            normal = classifier.preprocess.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2)).contiguous()
            ready = {
                label: partial(call, pixels if label.startswith("vitrail") else normal)
                for label, call in calls.items()
                if batch == 1 or not label.endswith(ONE)
            }
            took = interleaved(ready, rounds if batch == 1 else max(5, rounds // 4), rest=REST)
            for label, seconds in took.items():
                ratio = median(a / b for a, b in zip(took["timm eager"], seconds, strict=True))
                rows.append(
                    {"model": name, "what": label, "batch": batch, "ms": 1e3 * median(seconds), "speedup": ratio}
                )
                print(f"{name}, batch {batch}, {label}: {1e3 * median(seconds):.2f} ms, {ratio:.2f}x", flush=True)
    return rows


def random_classifier(name: str) -> Classifier:
    row = VARIANTS[name]
    model = build_model(row.config).eval()
    names = [str(number) for number in range(model.num_classes)]
    return Classifier(model, row.preprocess, names, architecture=name, precision="off")


def _ours(classifier: Classifier, folder: Path, calibration: Calibration) -> dict[str, Callable[[Any], Any]]:
    work = folder / "work"
    work.mkdir()
    builder = Builder(classifier, work, calibration, {"name": classifier.architecture, "fingerprint": ""})
    found: dict[str, Callable[[Any], Any]] = {}
    for each in CANDIDATES:
        if unavailable(each, True, classifier.preprocess.interpolation) is None:
            with suppress(ExportError):  # dynamic int8 of a network of convolutions
                found[f"vitrail {each}"] = open_runtime(builder.build(each)).logits
    return found


def timm_runtimes(
    twin: torch.nn.Module, folder: Path, images: list[Any], classifier: Classifier
) -> dict[str, Callable[[Any], Any]]:
    """As their users write it: defaults but for the number of threads, and for the latency hint of OpenVINO."""
    import nncf
    import onnxruntime

    path = folder / "timm.onnx"
    torch.onnx.export(
        twin, (torch.zeros(1, 3, 224, 224),), path, dynamo=False, input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = default_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = openvino_core().read_model(path)
    normal = [
        classifier.preprocess.normalize(torch.from_numpy(image).permute(2, 0, 1)[None]).numpy() for image in images
    ]
    quantised = nncf.quantize(
        model.clone(), nncf.Dataset(normal), subset_size=len(normal), model_type=nncf.ModelType.TRANSFORMER
    )
    compiled = torch.compile(twin)
    return {
        "timm eager": torch.inference_mode()(twin),
        "timm torch.compile": torch.inference_mode()(compiled),
        "timm ONNX Runtime": lambda x: session.run(None, {"x": x.numpy()}),
        "timm OpenVINO float32": _compiled(model, "f32"),
        f"timm OpenVINO float32{ONE}": _compiled(_of_one_image(model), "f32"),
        "timm OpenVINO": _compiled(model, None),
        "timm NNCF + OpenVINO": _compiled(quantised, None),
        f"timm NNCF + OpenVINO{ONE}": _compiled(_of_one_image(quantised), None),
    }


def _of_one_image(model: Any) -> Any:
    fixed = model.clone()
    fixed.reshape([1, 3, 224, 224])
    return fixed


def _compiled(model: Any, precision: str | None) -> Callable[[Any], Any]:
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": default_threads()}
    settings |= {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    request = openvino_core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x.numpy()], share_inputs=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/export"), help="where the classifiers are, or will be")
    parser.add_argument("--data-dir")
    parser.add_argument("--architectures", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--name", default="export", help="of the file in benchmarks/results")
    given = parser.parse_args()
    found = accuracy(given.runs, given.data_dir, given.architectures, given.rounds)
    times = [row for name in given.networks for row in speed(name, given.rounds)]
    lists = f"--architectures {' '.join(given.architectures)} --networks {' '.join(given.networks)}"
    shown = f"python -m benchmarks.export {lists} --rounds {given.rounds} --name {given.name}"
    write(given.name, shown, accuracy=found, speed=times)


if __name__ == "__main__":
    main()

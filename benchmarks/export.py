"""Exports: accuracy and speed of every architecture, and the speed beside the same network in timm.

Accuracy: small classifiers that are trained on Fashion-MNIST at 32 px (or read from --runs), each exported as
everything that this machine runs; the check is on the test split. Calibration: 300 training images.

Speed: vit_small and swin_tiny at 224 px with random weights (time does not depend on them), the same weights in timm:
eager, torch.compile, ONNX Runtime and OpenVINO on timm's export, and NNCF + OpenVINO on that. All in one process, in
turn; normalised images to logits for timm, pixels to logits for ours.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.measure import write
from benchmarks.peers import timm_twin
from vitrail.classifier import Classifier, load
from vitrail.deploy.candidates import CANDIDATES, Builder, unavailable
from vitrail.deploy.export import export
from vitrail.deploy.quantize.calibration import Calibration
from vitrail.deploy.trials import ExportRefused
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


def accuracy(runs: Path, data_dir: str | None, names: list[str]) -> list[dict[str, Any]]:
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
        for row in found:
            row["kept"] = row.pop("path") is not None
            rows.append({"architecture": name, **row})
            print(
                name, row["target"], row["precision"], row["top1"], row["difference"], row["agreement"], row["speedup"]
            )
    return rows


def speed(name: str, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of batches of 1 and 16, of timm's network in its runtimes and of our exports."""
    torch.manual_seed(0)
    classifier = _random_classifier(name)
    twin = timm_twin(name, classifier.model.config).eval()
    twin.load_state_dict(classifier.model.state_dict(), strict=False)
    with tempfile.TemporaryDirectory() as folder:
        images = [np.random.default_rng(i).integers(0, 256, (224, 224, 3), np.uint8) for i in range(64)]
        calls = {**timm_runtimes(twin, Path(folder), images, classifier), **_ours(classifier, Path(folder), images)}
        rows = []
        for batch in (1, 16):
            pixels = np.stack(images[:batch])
            normal = classifier.preprocess.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2)).contiguous()
            ready = {
                label: partial(call, pixels if label.startswith("vitrail") else normal) for label, call in calls.items()
            }
            took = interleaved(ready, rounds if batch == 1 else max(5, rounds // 4))
            for label, seconds in took.items():
                ratio = median(a / b for a, b in zip(took["timm eager"], seconds, strict=True))
                rows.append(
                    {"model": name, "what": label, "batch": batch, "ms": 1e3 * median(seconds), "speedup": ratio}
                )
                print(f"{name}, batch {batch}, {label}: {1e3 * median(seconds):.2f} ms, {ratio:.2f}x", flush=True)
    return rows


def _random_classifier(name: str) -> Classifier:
    row = VARIANTS[name]
    model = build_model(row.config).eval()
    names = [str(number) for number in range(model.num_classes)]
    return Classifier(model, row.preprocess, names, architecture=name, precision="off")


def _ours(classifier: Classifier, folder: Path, images: list[Any]) -> dict[str, Callable[[Any], Any]]:
    calibration = Calibration("noise", "none", tuple(map(str, range(len(images)))), images)
    work = folder / "work"
    work.mkdir()
    builder = Builder(classifier, work, calibration, {"name": classifier.architecture, "fingerprint": ""})
    return {
        f"vitrail {each}": open_runtime(builder.build(each)).logits
        for each in CANDIDATES
        if unavailable(each, True, classifier.preprocess.interpolation) is None
    }


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
        "timm OpenVINO": _compiled(model, None),
        "timm NNCF + OpenVINO": _compiled(quantised, None),
    }


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
    given = parser.parse_args()
    found = accuracy(given.runs, given.data_dir, given.architectures)
    times = [row for name in given.networks for row in speed(name, given.rounds)]
    write("export", accuracy=found, speed=times)


if __name__ == "__main__":
    main()

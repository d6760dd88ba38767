"""A linear probe: the features of every image are computed once by a frozen model, and a linear head is fitted to them.

The head becomes the model's, which is then a complete classifier.
Shapes: N images, C features, K classes.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.sampling import class_weights
from vitrail.errors import ConfigError, DataError, ModelError
from vitrail.evaluation.linear_probe import NEIGHBOURS, TEMPERATURE, Linear, LogisticRegression, nearest_neighbours
from vitrail.evaluation.metrics import Evaluation, Recorder
from vitrail.inference.engine import BatchResult, Engine, SplitReader, default_workers
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.models.base import ImageModel
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.config.schema import Use, keys_for
from vitrail.training.engine.interrupt import Interrupt, Stopped
from vitrail.training.engine.state import TrainState
from vitrail.training.monitoring.plan import balance_lines, data_lines, reason_lines
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.monitoring.summary import run_summary
from vitrail.training.resources.threads import ThreadControl
from vitrail.training.setup import Setup
from vitrail.utils.device import describe_precision, precision, uses_bf16
from vitrail.utils.eval_view import eval_view
from vitrail.weights.heads import HEADS

GRID = tuple(10.0**-power for power in range(7))  # l2 penalties from which validation chooses, strong to weak
_DEFAULT_L2 = 1e-3  # where there are no validation images
_PATIENCE = 2  # penalties in a row that do not improve validation, after which the search ends
_TRIAL_SHARE = 50  # a fiftieth of the images are in a trial of the number of threads, at most
_CHUNK = 8192  # images whose logits are computed at once


@dataclass(frozen=True)
class Features:
    """Features of the readable images of a split: values float32 N C, labels and rows of the split int64 N. Values and
    labels are on the device on which the head is fitted."""

    values: Tensor
    labels: Tensor
    indices: Tensor


def check_probe_keys(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that a probe does not use."""
    for key in given:
        if key not in keys_for(Use.PROBE):
            raise ConfigError(f"{key} has no effect on a probe, which trains a linear head alone: leave it out")


def choose_probe_threads(setup: Setup, threads: ThreadControl, device: torch.device) -> str:
    """Choose torch's number of threads by trial, if that is left open; the config's `threads`."""
    machine, dataset = setup.config.machine, setup.dataset
    runtime = TorchRuntime(setup.model.to(device), setup.preprocess, machine.amp)
    total = sum(dataset.counts().values())
    images = min(machine.eval_batch_size or runtime.default_batch_size, total // _TRIAL_SHARE)
    blank = np.zeros((images, *setup.preprocess.size, setup.preprocess.channels), np.uint8)
    if line := threads.choose(images, lambda: runtime.logits(blank)):
        setup.reasons.append(line)
    return str(threads.plan)


def run_probe(
    setup: Setup, folder: RunFolder, reporter: Reporter, device: torch.device
) -> tuple[dict[str, Any], Evaluation]:
    """Compute features, fit the head and set it in `setup.model`. Returns the run's summary and its evaluation.

    Raises:
        Stopped: by Ctrl-C or SIGTERM.
        DataError: no training image could be read.
        ModelError: the model has no linear head.
    """
    started = time.perf_counter()
    reporter.plan(_plan_lines(setup, folder, device))
    skipped: dict[str, str] = {}
    state = TrainState()  # its times and images are those of all splits
    with Interrupt() as interrupt:

        def check() -> None:
            if interrupt.number is not None:
                again = f"`vitrail train --resume {folder.path}` starts it again"
                raise Stopped(f"stopped before the probe was finished; {again}", interrupt.number)

        setup.model.to(device)
        remove_head(setup.model)
        features = _all_features(setup, reporter, state, skipped, check)
        train, num_classes = features["train"], setup.dataset.num_classes
        evaluate = partial(_evaluate_head, setup, features, device)
        regression = LogisticRegression(train.values, train.labels, num_classes, _sample_weights(setup, train))
        metric = "top1" if setup.config.regularize.balance == "none" else "balanced_top1"
        head, chosen, history = _choose(
            evaluate, regression, metric if "val" in features else "", reporter, folder, check
        )
    set_linear_head(setup.model, head, (setup.preprocess.channels, *setup.preprocess.size))
    name = setup.dataset.eval_split()
    if name not in features:
        raise DataError(f"none of the {name} images could be read")
    result = evaluate(head, name)
    probe = {
        "l2": chosen["l2"],
        "val_top1": chosen.get("val_top1"),
        "features": train.values.shape[1],
        "images": sum(len(part.labels) for part in features.values()),
        "knn_neighbours": min(NEIGHBOURS, len(train.labels)),
        "knn_temperature": TEMPERATURE,
    }
    state.seconds = time.perf_counter() - started
    summary = run_summary(
        setup,
        result,
        state,
        skipped,
        device,
        val_top1=chosen.get("val_top1"),
        train_images=len(train.labels),
        probe=probe,
        knn_top1=_knn_top1(features, name, num_classes),
        fits=len(history),
    )
    return summary, result


def _all_features(
    setup: Setup, reporter: Reporter, state: TrainState, skipped: dict[str, str], check: Callable[[], None]
) -> dict[str, Features]:
    """Features of each split with readable images: train, val, and the one whose metrics are reported."""
    machine, dataset = setup.config.machine, setup.dataset
    names = dict.fromkeys(name for name in ("train", "val", dataset.eval_split()) if name in dataset.splits)
    total = sum(len(dataset.split(name)) for name in names)
    runtime = TorchRuntime(setup.model, setup.preprocess, machine.amp)
    found, done, last = {}, 0, time.perf_counter()
    with reporter:
        for name in names:
            reader = SplitReader(dataset.split(name), setup.preprocess)

            def on_batch(batch: BatchResult[int], name: str = name, reader: SplitReader = reader) -> None:
                nonlocal done, last
                now = time.perf_counter()
                state.step_seconds, last = state.step_seconds + now - last, now
                state.seconds = state.step_seconds
                state.wait_seconds += batch.wait_seconds
                state.images += len(batch.outputs)
                done += len(batch.items)
                skipped.update({item["path"]: item["reason"] for item in reader.skipped(batch)})
                reporter.update(f"{name} features", done / total, state)
                check()

            features = compute_features(runtime, reader, machine.eval_batch_size, machine.workers, on_batch)
            if features is not None:
                found[name] = features
    if "train" not in found:
        reason = next(iter(skipped.values()), "there are none")
        raise DataError(f"none of the training images could be read: {reason}")
    return found


def compute_features(
    runtime: TorchRuntime,
    reader: SplitReader,
    batch_size: int | None = None,
    workers: int | None = None,
    on_batch: Callable[[BatchResult[int]], None] = lambda batch: None,
) -> Features | None:
    """The features of each readable image of a split, on the runtime's device; None where no image is readable."""
    values, rows = [], list[int]()
    if workers is None:
        workers = default_workers(reader.split)
    for batch in Engine(runtime).run(range(len(reader.split)), reader, batch_size, workers, features=True):
        values.append(torch.from_numpy(batch.outputs))
        rows += batch.readable
        on_batch(batch)
    if not rows:
        return None
    device = torch.device("cpu") if runtime.device.type == "mps" else runtime.device  # MPS has no float64
    labels = torch.from_numpy(reader.split.labels[rows])
    return Features(torch.cat(values).to(device), labels.to(device), torch.tensor(rows))


def remove_head(model: nn.Module) -> None:
    """Make a model with timm's interface return the features that its head reads; raises ModelError for another."""
    if not hasattr(model, "reset_classifier"):
        raise ModelError(f"{type(model).__name__} has no reset_classifier: its head cannot be replaced by a probe's")
    model.reset_classifier(0)  # type: ignore[operator]


@torch.no_grad()
def set_linear_head(model: nn.Module, head: Linear, image: tuple[int, int, int]) -> None:
    """Give the model this head. DeiT's two heads both get it: the mean of their logits is that of the mean feature.

    image: channels, height and width of the model's input, for a trial of an external model.

    Raises:
        ModelError: the model's logits are then not those of the head, which only happens with external models.
    """
    classes, width = head.weight.shape
    device = next(model.parameters()).device
    external = not isinstance(model, ImageModel)
    noise = torch.randn(2, *image, generator=torch.Generator().manual_seed(0)).to(device)
    if external:
        remove_head(model)
        expected = F.linear(eval_view(model)(noise), head.weight.to(device), head.bias.to(device))
    model.reset_classifier(classes)  # type: ignore[operator]
    layers = [module for name, module in model.named_modules() if name in HEADS and isinstance(module, nn.Linear)]
    layers = [layer for layer in layers if layer.weight.shape == (classes, width) and layer.bias is not None]
    for layer in layers:
        layer.weight.copy_(head.weight)
        layer.bias.copy_(head.bias)
    model.to(device).eval()
    tolerance = 1e-3 * float(expected.abs().max()) if external else 0.0
    if not layers or (external and not torch.allclose(model(noise), expected, atol=tolerance)):
        raise ModelError(f"{type(model).__name__} has no linear head that a probe could replace")


@torch.inference_mode()
def _evaluate_head(
    setup: Setup, features: Mapping[str, Features], device: torch.device, head: Linear, name: str
) -> Evaluation:
    """Metrics of a head on the features of the split `name`, in the precision in which the full model is evaluated."""
    split, recorder = features[name], Recorder()
    bf16 = uses_bf16(setup.model, device, setup.config.machine.amp)
    parts = (part.split(_CHUNK) for part in (split.values, split.labels, split.indices))
    for values, labels, indices in zip(*parts, strict=True):
        with precision(device, bf16):
            logits = F.linear(values, head.weight, head.bias)
        recorder.add(logits.float().cpu().numpy(), labels.cpu().numpy(), indices.cpu().numpy())
    return Evaluation(recorder.records(), setup.dataset.class_names, name)


def _choose(
    evaluate: Callable[[Linear, str], Evaluation],
    regression: LogisticRegression,
    metric: str,
    reporter: Reporter,
    folder: RunFolder,
    check: Callable[[], None],
) -> tuple[Linear, dict[str, Any], list[dict[str, Any]]]:
    """Fit heads from strong to weak l2 and choose the highest `metric` on validation, then the lowest validation loss.

    metric: a field of Evaluation; "" without validation images. Returns the head, its metrics, and those of all heads.
    """
    history: list[dict[str, Any]] = []
    best: tuple[tuple[float, float], int, Linear] | None = None
    folder.write_metrics(history)
    for index, l2 in enumerate(GRID if metric else (_DEFAULT_L2,)):
        check()
        start = time.perf_counter()
        head = regression.fit(l2)
        on_train = evaluate(head, "train")
        record = {"l2": l2, "train_loss": on_train.loss, "train_top1": on_train.top1}
        line = f"l2 {l2:<7g} loss {on_train.loss:.4f}"
        score = (0.0, 0.0)
        if metric:
            on_val = evaluate(head, "val")
            record |= {f"val_{key}": getattr(on_val, key) for key in ("top1", "balanced_top1", "top5", "loss", "ece")}
            line += f"  val loss {on_val.loss:.4f}  val top-1 {on_val.top1:.2f} %"
            score = (getattr(on_val, metric), -on_val.loss)
        record["seconds"] = round(time.perf_counter() - start, 3)
        history.append(record)
        folder.append(folder.metrics, record)
        reporter.log(line)
        if best is None or score > best[0]:
            best = score, index, head
        elif index - best[1] >= _PATIENCE:
            break
    assert best is not None
    _, index, head = best
    return head, history[index], history


def _sample_weights(setup: Setup, train: Features) -> Tensor | None:
    """The weights of the readable training images, with a mean of 1: those of the data, times those of their classes if
    classes are balanced. On features of a frozen model, to sample a class more often is to weight it."""
    own, balanced = setup.dataset.split("train").weights, setup.config.regularize.balance != "none"
    if own is None and not balanced:
        return None
    chosen = torch.ones(len(train.labels), dtype=torch.float64) if own is None else torch.from_numpy(own)[train.indices]
    if balanced:
        labels = train.labels.cpu()
        chosen = chosen * torch.from_numpy(class_weights(labels.numpy(), setup.dataset.num_classes))[labels]
    return (chosen / chosen.mean()).to(train.values.device)


def _knn_top1(features: Mapping[str, Features], name: str, num_classes: int) -> float:
    """Top-1 of the split `name` by its nearest training images, percent. Its settings are fixed, not tuned."""
    train, queries = features["train"], features[name]
    predicted = nearest_neighbours(queries.values, train.values, train.labels, num_classes)
    return 100 * float((predicted == queries.labels).double().mean())


def _plan_lines(setup: Setup, folder: RunFolder, device: torch.device) -> list[str]:
    config, dataset = setup.config, setup.dataset
    height, width = setup.preprocess.size
    published = "published weights" if config.model.pretrained else None
    start = config.model.weights or published or ("the given model's" if setup.external else None)
    random = "random weights, so the features are random too: use --weights or --pretrained"
    return [
        *reason_lines(reason for reason in setup.reasons if not reason.startswith("recipe")),
        *data_lines(dataset),
        *balance_lines(dataset, config.regularize.balance, repeats=False),
        f"model   {config.model.model}, frozen, input {height}x{width}; {start or random}",
        f"device  {device}, {describe_precision(device, uses_bf16(setup.model, device, config.machine.amp))}",
        f"output  {folder.path}",
    ]

"""A linear probe: every image goes once through a frozen model, and a linear head is fitted to what comes out.

The head goes into the model, which is then a complete classifier with the logits of the probe.
Shapes: N images, C features, K classes.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor, nn

from vitrail.data.loader import EvalLoader
from vitrail.errors import VitrailError
from vitrail.evaluation.evaluate import make_loader
from vitrail.evaluation.linear_probe import NEIGHBOURS, TEMPERATURE, Linear, LogisticRegression, nearest_neighbours
from vitrail.evaluation.metrics import Evaluation, Recorder
from vitrail.models.base import ImageModel
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.config.schema import Use, keys_for
from vitrail.training.engine.interrupt import Interrupt, Stopped
from vitrail.training.monitoring.plan import class_words
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.setup import Setup
from vitrail.utils.device import describe_precision, precision, uses_bf16
from vitrail.utils.text import format_duration
from vitrail.weights.heads import HEADS

GRID = tuple(10.0**-power for power in range(7))  # strengths of l2 that validation chooses from, strong to weak
_UNCHOSEN = 1e-3  # l2 where there are no validation images
_PATIENCE = 2  # weaker strengths that may be no better before the rest is left out
_LINE_SECONDS = 10.0
_CHUNK = 8192  # images whose logits are computed at once


@dataclass(frozen=True)
class Features:
    """What a frozen model sees in the readable images of a split: values float32 N C, labels and places in the split
    int64 N. Values and labels are where the head is fitted."""

    values: Tensor
    labels: Tensor
    indices: Tensor


@dataclass
class _Tally:
    """Images through the model, and where the time went."""

    images: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0

    def words(self) -> str:
        waited = self.wait_seconds / self.seconds if self.seconds else 0.0
        return f"{self.rate:,.0f} images/s  {waited:.0%} waiting for data"

    @property
    def rate(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def check_probe_keys(given: Mapping[str, Any]) -> None:
    """Raise VitrailError for a key that a probe does not heed."""
    for key in given:
        if key not in keys_for(Use.PROBE):
            raise VitrailError(f"a probe has no {key}: it fits a linear head to frozen features; leave out one of them")


def run_probe(
    setup: Setup, folder: RunFolder, reporter: Reporter, device: torch.device, *, own_model: bool = False
) -> tuple[dict[str, Any], Evaluation]:
    """Compute features, fit the head, put it into `setup.model`, and give the run's summary, and what it is made of.

    own_model: the model is the caller's, and nobody knows where its weights are from.

    Raises:
        Stopped: by Ctrl-C or SIGTERM.
        VitrailError: no training image can be read, or the model has no linear head.
    """
    started = time.perf_counter()
    for line in _plan_lines(setup, folder, device, own_model):
        reporter.say(line)
    skipped = {item["path"]: item["reason"] for item in setup.dataset.skipped}
    tally = _Tally()
    with Interrupt() as interrupt:

        def check() -> None:
            if interrupt.number is not None:
                again = f"`vitrail train --resume {folder.path}` begins anew"
                raise Stopped(f"stopped before the probe was done; {again}", interrupt.number)

        features = _all_features(setup, device, reporter, tally, skipped, check)
        judge = _Judge(setup, features, device)
        chosen, history = _choose(judge, features, reporter, folder, check)
    set_linear_head(setup.model, chosen.head, (setup.preprocess.channels, *setup.preprocess.size))
    name = setup.dataset.eval_split()
    if name not in features:
        raise VitrailError(f"none of the {name} images can be read")
    result = judge.of(chosen.head, name)
    summary = {
        **_figures(result, chosen, features, skipped),
        **_knn(features, name, setup.dataset.num_classes),
        "params": sum(p.numel() for p in setup.model.parameters()),
        "model": setup.config.model.model,
        "data": setup.dataset.name,
        "how_split": setup.dataset.how_split,
        "fits": len(history),
        "seconds": round(time.perf_counter() - started, 3),
        "images_per_second": round(tally.rate, 1),
        "waiting_for_data": round(tally.wait_seconds / tally.seconds, 4) if tally.seconds else 0.0,
        "seed": setup.config.seed,
        "device": str(device),
    }
    return summary, result


def result_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a probe gave, for people."""
    split, probe = summary["split"], summary["probe"]
    chosen = "nothing to choose it on" if probe["val_top1"] is None else f"chosen on val, {probe['val_top1']:.2f} %"
    return [
        *(f"skipped {item['path']}: {item['reason']}" for item in summary["skipped"]),
        f"{split} top-1 {summary['top1']:.2f} % of {summary['images']:,} images by a linear head on frozen features "
        f"(l2 {probe['l2']:g}, {chosen}), {summary['knn_top1']:.2f} % by {probe['knn_neighbours']} nearest neighbours",
        f"{probe['images']:,} images through the model at {summary['images_per_second']:,.0f} images/s; "
        f"in all {format_duration(summary['seconds'])}",
    ]


# --- features


def _all_features(
    setup: Setup,
    device: torch.device,
    reporter: Reporter,
    tally: _Tally,
    skipped: dict[str, str],
    check: Callable[[], None],
) -> dict[str, Features]:
    """Of each split that has readable images: train, val, and the one that is reported."""
    config, dataset = setup.config, setup.dataset
    wanted = [name for name in ("train", "val", dataset.eval_split()) if name in dataset.splits]
    setup.model.to(device).eval()
    found = {}
    for name in dict.fromkeys(wanted):
        split = dataset.split(name)
        loader = make_loader(split, setup.preprocess, device, config.machine.eval_batch_size, config.machine.workers)
        with _counting(reporter, f"{name} features", len(split), tally) as advance:

            def on_batch(count: int, advance: Callable[[int], None] = advance) -> None:
                advance(count)
                check()

            features = compute_features(setup.model, loader, device, config.machine.amp, tally, on_batch)
        skipped |= {item["path"]: item["reason"] for item in loader.skipped}
        if features is not None:
            found[name] = features
    if "train" not in found:
        reason = next(iter(skipped.values()), "there are none")
        raise VitrailError(f"none of the training images can be read: {reason}")
    return found


@torch.inference_mode()
def compute_features(
    model: nn.Module,
    loader: EvalLoader,
    device: torch.device,
    amp: str = "auto",
    tally: _Tally | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Features | None:
    """Each readable image of a loader once through the model, whose head is taken off; None for no image.

    The head reads the whole of it: without a head, all models give its input, and the last block of a ViT computes
    that alone.
    """
    remove_head(model)
    bf16, tally = uses_bf16(model, device, amp), tally or _Tally()
    values, labels, indices = [], [], []
    begin, waited = time.perf_counter(), loader.wait_seconds
    try:
        for batch in loader:
            with precision(device, bf16):
                values.append(model(loader.preprocess.normalize(batch.to(device).images)).float().cpu())
            labels.append(batch.labels)
            indices.append(batch.indices)
            now = time.perf_counter()
            tally.images += len(batch)
            tally.seconds += now - begin
            tally.wait_seconds += loader.wait_seconds - waited
            begin, waited = now, loader.wait_seconds
            if on_batch:
                on_batch(len(batch))
    finally:
        loader.close()
    if not values:
        return None
    place = torch.device("cpu") if device.type == "mps" else device  # float64 is missing there
    return Features(torch.cat(values).to(place), torch.cat(labels).to(place), torch.cat(indices))


def remove_head(model: nn.Module) -> None:
    """Make a model in timm's interface give the features that its head reads.

    Raises:
        VitrailError: it has no such interface.
    """
    if not hasattr(model, "reset_classifier"):
        raise VitrailError(f"{type(model).__name__} has no reset_classifier: its head cannot be replaced by a probe's")
    model.reset_classifier(0)  # type: ignore[operator]


@torch.no_grad()
def set_linear_head(model: nn.Module, head: Linear, image: tuple[int, int, int]) -> None:
    """Give the model this head; DeiT's two heads both get it, as the mean of their logits is that of the mean feature.

    image: channels, height and width of what the model takes, for a trial of a model that is none of ours.

    Raises:
        VitrailError: the logits are then not the head's. Only a guest can be so.
    """
    kinds, width = head.weight.shape
    device = next(model.parameters()).device
    guest = not isinstance(model, ImageModel)
    noise = torch.randn(2, *image, generator=torch.Generator().manual_seed(0)).to(device)
    if guest:
        remove_head(model)
        expected = F.linear(model.eval()(noise), head.weight.to(device), head.bias.to(device))
    model.reset_classifier(kinds)  # type: ignore[operator]
    layers = [module for name, module in model.named_modules() if name in HEADS and isinstance(module, nn.Linear)]
    layers = [layer for layer in layers if layer.weight.shape == (kinds, width) and layer.bias is not None]
    for layer in layers:
        layer.weight.copy_(head.weight)
        layer.bias.copy_(head.bias)
    model.to(device).eval()
    if not layers or (guest and not torch.allclose(model(noise), expected, atol=1e-3 * float(expected.abs().max()))):
        raise VitrailError(f"{type(model).__name__} has no linear head that a probe could be put into")


# --- the head


@dataclass(frozen=True)
class _Chosen:
    """The head that was best on validation, or, without that, the only one; val_top1 in percent."""

    head: Linear
    l2: float
    val_top1: float | None = None


@dataclass(frozen=True)
class _Judge:
    """Figures of a head on features, in the precision in which the whole model will be judged."""

    setup: Setup
    features: Mapping[str, Features]
    device: torch.device

    @torch.inference_mode()
    def of(self, head: Linear, name: str) -> Evaluation:
        """On the features of the split called `name`. What was skipped is not in it."""
        features, recorder = self.features[name], Recorder()
        bf16 = uses_bf16(self.setup.model, self.device, self.setup.config.machine.amp)
        parts = (part.split(_CHUNK) for part in (features.values, features.labels, features.indices))
        for values, labels, indices in zip(*parts, strict=True):
            with precision(self.device, bf16):
                logits = F.linear(values, head.weight, head.bias)
            recorder.add(logits, labels, indices)
        return Evaluation(recorder.records(), self.setup.dataset.class_names, name)


def _choose(
    judge: _Judge,
    features: Mapping[str, Features],
    reporter: Reporter,
    folder: RunFolder,
    check: Callable[[], None],
) -> tuple[_Chosen, list[dict[str, Any]]]:
    """Fit heads from strong to weak l2; the highest top-1 on validation wins, of equal ones the lowest loss."""
    train = features["train"]
    regression = LogisticRegression(train.values, train.labels, judge.setup.dataset.num_classes)
    history: list[dict[str, Any]] = []
    best: tuple[tuple[float, float], int, Linear] | None = None
    folder.write_metrics(history)
    for place, l2 in enumerate(GRID if "val" in features else (_UNCHOSEN,)):
        check()
        begin = time.perf_counter()
        head = regression.fit(l2)
        on_train = judge.of(head, "train")
        record = {"l2": l2, "train_loss": on_train.loss, "train_top1": on_train.top1}
        words = f"l2 {l2:<7g} loss {on_train.loss:.4f}"
        merit = (0.0, 0.0)
        if "val" in features:
            on_val = judge.of(head, "val")
            record |= {f"val_{key}": getattr(on_val, key) for key in ("top1", "top5", "loss", "ece")}
            words += f"  val loss {on_val.loss:.4f}  val top-1 {on_val.top1:.2f} %"
            merit = (on_val.top1, -on_val.loss)
        record["seconds"] = round(time.perf_counter() - begin, 3)
        history.append(record)
        folder.add_metrics(record)
        reporter.say(words)
        if best is None or merit > best[0]:
            best = merit, place, head
        elif place - best[1] >= _PATIENCE:
            break
    assert best is not None
    merit, place, head = best
    return _Chosen(head, history[place]["l2"], merit[0] if "val" in features else None), history


def _figures(
    result: Evaluation, chosen: _Chosen, features: Mapping[str, Features], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """As of other runs, and under "probe" what only a probe has."""
    return {
        **result.to_dict(),
        "val_top1": chosen.val_top1,
        "train_images": len(features["train"].labels),
        "skipped": [{"path": path, "reason": reason} for path, reason in skipped.items()],
        "probe": {
            "l2": chosen.l2,
            "val_top1": chosen.val_top1,
            "features": features["train"].values.shape[1],
            "images": sum(len(part.labels) for part in features.values()),
            "knn_neighbours": min(NEIGHBOURS, len(features["train"].labels)),
            "knn_temperature": TEMPERATURE,
        },
    }


def _knn(features: Mapping[str, Features], name: str, num_classes: int) -> dict[str, float]:
    """knn_top1, percent of the split called `name`, by the training images. None of its settings was chosen."""
    train, asked = features["train"], features[name]
    predicted = nearest_neighbours(asked.values, train.values, train.labels, num_classes)
    return {"knn_top1": 100 * float((predicted == asked.labels).double().mean())}


# --- words


def _plan_lines(setup: Setup, folder: RunFolder, device: torch.device, own_model: bool) -> list[str]:
    config, dataset = setup.config, setup.dataset
    counts = ", ".join(f"{count:,} {name}" for name, count in dataset.counts().items())
    height, width = setup.preprocess.size
    published = "published weights" if config.model.pretrained else None
    start = config.model.weights or published or ("your own" if own_model else None)
    random = "random weights: the features are random too; name --weights or --pretrained for better ones"
    return [
        *(reason for reason in setup.reasons if reason.startswith("model")),
        f"data    {dataset.name}: {counts} images, {class_words(dataset)} ({dataset.how_split})",
        *([f"skipped {len(dataset.skipped)} unusable files, named in the summary"] if dataset.skipped else []),
        f"model   {config.model.model}, frozen, input {height}x{width}; {start or random}",
        f"device  {device}, {describe_precision(device, uses_bf16(setup.model, device, config.machine.amp))}",
        f"output  {folder.path}",
    ]


@contextmanager
def _counting(reporter: Reporter, what: str, total: int, tally: _Tally) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many more images are done: a bar in a terminal, elsewhere a line at times."""
    console = reporter.console
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"))
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal or console.quiet)
    last, done = time.perf_counter(), 0
    with bar:
        task = bar.add_task(what, total=total, words="")

        def advance(count: int) -> None:
            nonlocal last, done
            done += count
            left = format_duration((total - done) / tally.rate) if tally.rate else "?"
            words = f"{done:,} of {total:,}  {tally.words()}  {left} left"
            bar.update(task, completed=done, words=words)
            if bar.disable and time.perf_counter() - last >= _LINE_SECONDS:
                last = time.perf_counter()
                reporter.say(f"{what}  {words}")

        yield advance

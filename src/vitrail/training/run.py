"""`train`: from a folder of images to a classifier, in one call."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vitrail.classifier import Classifier
from vitrail.data.dataset import Dataset
from vitrail.errors import VitrailError
from vitrail.files import atomic_folder, atomic_write_text
from vitrail.models.base import ImageModel
from vitrail.training.config import KEYS, check_options, make_config, read_toml, to_toml
from vitrail.training.device import pick_device
from vitrail.training.folder import RunFolder, check_free, new_run, old_run
from vitrail.training.interrupt import Stopped
from vitrail.training.metrics import Evaluation
from vitrail.training.plan import plan_lines
from vitrail.training.prepare import HELD_OUT, Setup, prepare, reopen
from vitrail.training.probe import PROBE_KEYS, check_probe_keys, result_lines, run_probe
from vitrail.training.progress import Reporter, clock
from vitrail.training.session import Session, rate

_FEW = 100  # images below which a figure is given with its interval
_MAY_CHANGE = ("device", "workers", "data_dir", "checkpoint_every", "checkpoint_minutes", "eval_batch_size")


def train(
    data: str | Path | Dataset | None = None,
    *,
    model: str | nn.Module | None = None,
    pretrained: bool | None = None,
    weights: str | Path | None = None,
    probe: bool | None = None,
    out: str | Path | None = None,
    epochs: float | None = None,
    budget: float | str | None = None,
    seed: int | None = None,
    resume: str | Path | None = None,
    recipe: str | Path | None = None,
    progress: bool = True,
    verbose: bool = False,
    **config: Any,
) -> Classifier:
    """Train or fine-tune a classifier on `data` and leave a run folder behind.

    Args:
        data: a folder of images, a dataset's name, or a Dataset.
        model: a name from `list_models()`, or a module of your own with timm's interface; None: one is chosen.
        pretrained, weights: start from published weights, or from these.
        probe: freeze the model and fit a linear head to its features, which are computed once.
        out: the run folder; by default runs/<data>-<model>.
        epochs, budget: how long: passes over the images, and seconds or "10m".
        seed: of everything random but the split of the images.
        resume: a run folder to go on with; nothing else is needed.
        recipe: a TOML file of config keys; its `data` counts where none is named here.
        progress: False keeps silent.
        verbose: tell what became of every single tensor of the weights.
        config: any other key of `TrainConfig`. It wins over the recipe, and that over what is chosen for the images.

    Returns:
        The classifier with the weights that were best on the validation images. Its `report` is the run's summary.

    Raises:
        VitrailError: something that was asked for is not there, does not fit, or cannot be written.
        Stopped: Ctrl-C or SIGTERM; the run is saved, and the text says how to go on. It is a KeyboardInterrupt.
    """
    guest = model if isinstance(model, nn.Module) else None
    named = {
        "model": model if isinstance(model, str) else None,
        "pretrained": pretrained,
        "weights": None if weights is None else str(weights),
        "probe": probe,
        "epochs": epochs,
        "budget": budget,
        "seed": seed,
    }
    given = check_options({**{key: value for key, value in named.items() if value is not None}, **config})
    reporter = Reporter(progress)
    if out is not None and resume is None:
        check_free(RunFolder(Path(out).expanduser()))  # before a download, not after
    with torch.random.fork_rng(devices=[]):  # the caller's own random numbers are left alone
        if resume is not None:
            folder, setup = _resumed(resume, data, given, guest, out, recipe)
        else:
            given = {**(read_toml(recipe) if recipe is not None else {}), **given}
            data = given.pop("data", None) if data is None else data
            if data is None:
                raise VitrailError("nothing to train on: name a folder of images or a dataset, or a run with --resume")
            if given.get("probe"):
                check_probe_keys(given)
            setup = prepare(data, given, guest)
        if verbose and setup.pretrained:
            reporter.say(setup.pretrained.report.table())
        device = pick_device(setup.config.device)
        session = None if setup.config.probe else Session(setup, reporter, device)
        if resume is None:
            folder = new_run(out, setup.dataset.name, setup.config.model)
        with folder.held():
            if resume is None:
                check_free(folder)  # once more: another run may have begun and ended here meanwhile
                atomic_write_text(folder.config, to_toml(setup.config, KEYS if session else PROBE_KEYS))
            if session is None:
                return _probe(setup, folder, reporter, device, guest is not None)
            return _train(session, folder, reporter)


def _resumed(
    resume: str | Path,
    data: str | Path | Dataset | None,
    given: Mapping[str, Any],
    guest: nn.Module | None,
    out: str | Path | None,
    recipe: str | Path | None,
) -> tuple[RunFolder, Setup]:
    """The folder and setup of a run that goes on as it began."""
    folder = old_run(resume)
    before = read_toml(folder.config)
    for key, value in given.items():
        if key not in _MAY_CHANGE and before.get(key) != value:
            raise VitrailError(
                f"a run goes on as it began, with {key}={before.get(key)}: leave {key} out, or begin anew"
            )
    if recipe is not None or (out is not None and Path(out) != Path(resume)):
        raise VitrailError("a run goes on where and as it began: leave out --out and --recipe with --resume")
    return folder, reopen(make_config({**before, **given}), data, guest)


def _train(session: Session, folder: RunFolder, reporter: Reporter) -> Classifier:
    setup = session.setup
    for line in plan_lines(setup, session.trainer, session.loader.steps_per_epoch, str(folder.path)):
        reporter.say(line)
    if session.enter(folder):
        reporter.say(f"going on at epoch {session.trainer.place.epoch + 1}, step {session.trainer.place.steps}")
    try:
        session.run()
    except Stopped as stopped:
        reporter.say(str(stopped))
        raise
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise VitrailError(
            f"a batch of {setup.config.batch_size} images does not fit into memory: use a smaller batch_size, "
            "accumulate=2 or more, or grad_checkpointing=true"
        ) from error
    model = session.final_model()
    result = session.final_evaluation(model)
    summary = _summary(session, result)
    classifier = _finish(setup, model, summary, folder)
    _say_result(reporter, summary, folder)
    return classifier


def _probe(setup: Setup, folder: RunFolder, reporter: Reporter, device: torch.device, own_model: bool) -> Classifier:
    try:
        summary = run_probe(setup, folder, reporter, device, own_model=own_model)
    except Stopped as stopped:
        reporter.say(str(stopped))
        raise
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise VitrailError("a batch of images does not fit into memory: use a smaller eval_batch_size") from error
    summary["environment"] = _environment()
    classifier = _finish(setup, setup.model, summary, folder)
    for line in [*result_lines(summary), f"model in {folder.model}"]:
        reporter.say(line)
    return classifier


def _finish(setup: Setup, model: nn.Module, summary: dict[str, Any], folder: RunFolder) -> Classifier:
    """Write the model and then the summary, with which the run is finished."""
    classifier = Classifier(
        model,  # type: ignore[arg-type]  # a guest may stand in for an ImageModel
        setup.preprocess,
        setup.dataset.class_names,
        report=summary,
        architecture=setup.config.model,
        notes={
            "data": setup.dataset.name,
            "split": {key: getattr(setup.config, key) for key in HELD_OUT},
            "counts": setup.dataset.counts(),
            "figures": {key: summary[key] for key in ("split", "images", "top1", "top5", "loss")},
            **_origin(setup),
        },
    )
    if setup.pretrained:
        summary["weights"] = str(setup.pretrained.report)
    _save_model(classifier, folder)
    folder.write_summary(summary)
    return classifier


def _origin(setup: Setup) -> dict[str, Any]:
    """Whose weights the model started from, and their licence, which it inherits."""
    if setup.pretrained is None:
        return {}
    return {"source": setup.pretrained.loaded.source, "licence": setup.pretrained.loaded.licence}


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the machine, has no memory left. On the CPU, torch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _save_model(classifier: Classifier, folder: RunFolder) -> None:
    """The model folder. A guest that is none of ours has no config to store: its weights alone are kept."""
    if isinstance(classifier.model, ImageModel):
        classifier.save(folder.model)
        return
    with atomic_folder(folder.model) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.model.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors")


def _summary(session: Session, result: Evaluation) -> dict[str, Any]:
    """The run's figures. top1 and top5 are in percent, of `split`; val_top1 chose the epoch."""
    place, config, best = session.trainer.place, session.config, session.best
    dataset = session.setup.dataset
    found = {item["path"]: item["reason"] for item in dataset.skipped} | session.skipped
    found |= {item["path"]: item["reason"] for item in result.skipped}
    return {
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "ece": result.ece,
        "images": result.images,
        "split": result.split,
        "val_top1": best.top1 if best.epoch else None,
        "best_epoch": best.epoch or None,
        "epochs": len(session.history),
        "steps": place.steps,
        "train_images": place.images,
        "seconds": round(place.seconds, 3),
        "images_per_second": round(rate(place), 1),
        "waiting_for_data": round(place.wait_seconds / place.step_seconds, 4) if place.step_seconds else 0.0,
        "params": sum(p.numel() for p in session.trainer.model.parameters()),
        "model": config.model,
        "data": dataset.name,
        "how_split": dataset.how_split,
        "seed": config.seed,
        "device": str(session.trainer.device),
        "environment": _environment(),
        "skipped": [{"path": path, "reason": reason} for path, reason in found.items()],
        "per_class": result.per_class,
    }


def _environment() -> dict[str, Any]:
    """What the figures depend on beside the config."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _interval(summary: Mapping[str, Any]) -> str:
    """Wilson's 95 % interval, where the images are so few that it is wide."""
    count = summary["images"]
    if not 0 < count < _FEW:
        return ""
    share, z2 = summary["top1"] / 100, 1.96**2
    middle, half = share + z2 / (2 * count), (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5
    low, high = (100 * (middle + sign * half) / (1 + z2 / count) for sign in (-1, 1))
    return f" (so few that the truth may lie anywhere from {low:.0f} to {high:.0f} %)"


def _say_result(reporter: Reporter, summary: Mapping[str, Any], folder: RunFolder) -> None:
    for item in summary["skipped"]:
        reporter.say(f"skipped {item['path']}: {item['reason']}")
    epoch = f", weights of epoch {summary['best_epoch']}" if summary["best_epoch"] else ""
    chosen = " (this split also chose the epoch)" if summary["split"] == "val" and summary["best_epoch"] else ""
    reporter.say(
        f"{summary['split']} top-1 {summary['top1']:.2f} % of {summary['images']:,} images"
        f"{_interval(summary)}{chosen}{epoch}; "
        f"trained in {clock(summary['seconds'])} at {summary['images_per_second']:,.0f} images/s"
    )
    reporter.say(f"model in {folder.model}")

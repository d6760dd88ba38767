"""`train`: from a folder of images to a classifier and a run folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from vitrail.classifier import Classifier
from vitrail.data.catalog import check_outside
from vitrail.data.contents import digest, names_digest
from vitrail.data.dataset import Data
from vitrail.errors import ConfigError, DeviceError, DistributedError
from vitrail.evaluation.metrics import Evaluation
from vitrail.evaluation.statistics import has_top5
from vitrail.models.base import ImageModel
from vitrail.reports.run_summary import RunSummary
from vitrail.training.callbacks import Callback, check_callbacks
from vitrail.training.checkpoints.checkpoint import unshared
from vitrail.training.checkpoints.kept import stop_says_what_is_kept
from vitrail.training.checkpoints.provenance import python_call, session_record
from vitrail.training.checkpoints.run_folder import RUNS, RunFolder, check_empty, create_run_folder, run_to_resume
from vitrail.training.config.recipes import check_optimizer, find_recipe
from vitrail.training.config.schema import KEYS, TrainConfig, Use, keys_for, make_config
from vitrail.training.config.stamp import to_run_toml
from vitrail.training.lr_find import draw_range_test
from vitrail.training.monitoring.batch_preview import draw_first_batch
from vitrail.training.monitoring.plan import plan_lines
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.monitoring.report import write_report
from vitrail.training.monitoring.report_data import report_details
from vitrail.training.monitoring.summary import result_lines, training_summary
from vitrail.training.monitoring.trackers import check_trackers
from vitrail.training.objectives.teacher import Source, config_name
from vitrail.training.probe import check_probe_keys, choose_probe_threads, run_probe
from vitrail.training.resources.batch_size import fit_batch_size, memory_advice
from vitrail.training.resources.forecast import estimate_cost
from vitrail.training.resources.threads import ThreadControl
from vitrail.training.resume import check_folders
from vitrail.training.session import Session
from vitrail.training.setup import Setup, prepare, split_settings
from vitrail.utils.device import compiling, cpu_threads, pick_device, uses_bf16
from vitrail.utils.distributed import DistributedContext, distributed_context
from vitrail.utils.files import atomic_folder
from vitrail.utils.memory import is_out_of_memory
from vitrail.utils.text import one_line

T = TypeVar("T")


def train(
    data: Data | None = None,
    *,
    model: str | nn.Module | None = None,
    pretrained: bool | str | None = None,
    weights: str | Path | None = None,
    teacher: Source | None = None,
    probe: bool | None = None,
    out: str | Path | None = None,
    epochs: float | None = None,
    budget: float | str | None = None,
    seed: int | None = None,
    resume: str | Path | None = None,
    recipe: str | Path | None = None,
    progress: bool = True,
    verbose: bool = False,
    show_batch: str | Path | None = None,
    lr_find: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    command: str | None = None,
    **config: Any,
) -> Classifier:
    """Train or fine-tune a classifier and write a run folder.

    Args:
        data: a folder of images, a CSV or parquet table, a dataset's name, wds: shards or an hf-dataset:; or a frame, a
            list of (path, label), a torch dataset, arrays, or a Dataset (see docs/data.md).
        model: a name from `list_models()`, or a module with timm's interface; None: chosen for the images.
        pretrained, weights, teacher, probe, epochs, budget, seed, config: settings, see `TrainConfig`; they override
            the recipe, which overrides what is chosen for the images. teacher: also a Classifier or a module.
        out: the run folder; by default runs/<data>-<model>.
        resume: the folder of an interrupted run; nothing else is needed. With more `epochs`, also of a finished one.
        recipe: one of `recipe_names()`, or a TOML file of settings.
        verbose: print every parameter group, and how each tensor of the weights was loaded.
        show_batch: train nothing; draw the model's inputs of the first batch to this file.
        lr_find: train nothing; draw a learning rate range test to this SVG file; `report` has the suggestion.
        callbacks: objects with `on_epoch_end(state) -> "stop" | None`, see `EpochState`; not stored in the run.
        command: the command to name in the report; None: this call.

    Returns:
        The classifier with the best weights by validation; its `report` is the run's summary.

    Raises:
        VitrailError: of the kind of what is wrong.
        Stopped: by Ctrl-C or SIGTERM, a KeyboardInterrupt: its message says what is kept, and how to resume.
    """
    named: dict[str, Any] = {"model": model, "pretrained": pretrained, "weights": weights, "teacher": teacher}
    named |= {"probe": probe, "epochs": epochs, "budget": budget, "seed": seed}
    given = {key: value for key, value in named.items() if value is not None} | config
    only = {"show_batch": show_batch, "lr_find": lr_find}
    command = command or python_call({"data": data, **given, "out": out, "resume": resume, "recipe": recipe})
    with distributed_context() as distributed, torch.random.fork_rng(devices=[]):  # restores the caller's random state
        reporter = Reporter(progress and distributed.is_main, verbose)
        with stop_says_what_is_kept(reporter.log):
            resumed = distributed.run_on_main(lambda: check_folders(out, resume, recipe, only, epochs))
            with reporter.busy("reading images and model"):
                setup = _make_setup(data, given, recipe, resumed, distributed, callbacks)
            if verbose and setup.pretrained:
                reporter.log(setup.pretrained.report.table())
            return _run(setup, reporter, distributed, out=out, resume=resume, only=only, command=command)


def _parse(given: Mapping[str, Any]) -> tuple[TrainConfig, nn.Module | None, Classifier | nn.Module | None]:
    """The settings among the arguments of `train`, and the model and the teacher that were passed as objects."""
    values = dict(given)
    model = values.pop("model") if isinstance(values.get("model"), nn.Module) else None
    teacher = values.get("teacher")
    if teacher is not None:
        values["teacher"] = config_name(teacher)
    return make_config(values), model, teacher if isinstance(teacher, Classifier | nn.Module) else None


def _make_setup(
    data: Data | None,
    given: Mapping[str, Any],
    recipe: str | Path | None,
    resumed: TrainConfig | None,
    distributed: DistributedContext,
    callbacks: Sequence[Callback],
) -> Setup:
    """The setup of a run that is resumed, or of a new one, in this process. Rank 0 makes its own first: the others find
    what it has downloaded, and start from weights if it does, whatever they could reach."""

    def make(more: Mapping[str, Any]) -> Setup:
        return _resumed_setup(data, given, resumed) if resumed else _new_setup(data, {**given, **more}, recipe)

    setup = make({}) if distributed.is_main else None
    pretrained = distributed.broadcast_object(setup and setup.config.model.pretrained)
    setup = setup or make({"pretrained": pretrained})
    setup.callbacks = check_callbacks(callbacks)
    return setup


def _new_setup(data: Data | None, given: Mapping[str, Any], recipe_name: str | Path | None) -> Setup:
    """The setup of a new run."""
    requested, external, teacher = _parse(given)
    recipe = None if recipe_name is None else find_recipe(recipe_name)
    values = {**(recipe.fixed if recipe else {}), **requested.given}
    data = values.pop("data", None) if data is None else data
    if data is None:
        raise ConfigError("no data: name a folder of images or a dataset, or a run with --resume")
    if values.get("probe"):
        if recipe and not recipe.complete:
            values.pop("recipe", None)  # a file may set probe; named recipes are for training
        check_probe_keys({**values, **(recipe.settings if recipe else {})})
    check_optimizer(values, recipe)
    check_trackers(values.get("track", "none"))  # before a download, not after
    setup = prepare(data, TrainConfig().updated(values), external, recipe, may_download=True)
    setup.teacher = teacher
    return setup


def _resumed_setup(data: Data | None, given: Mapping[str, Any], before: TrainConfig) -> Setup:
    """The setup of a run that is resumed, with its settings."""
    requested, external, teacher = _parse(given)
    for key, value in requested.given.items():
        if key not in keys_for(Use.RESUME) and before.flat[key] != value:
            raise ConfigError(
                f"the run has {key}={before.flat[key]}: leave out {key} with --resume, or start a new run"
            )
    config = before.updated(requested.given)
    check_trackers(config.io.track)
    setup = prepare(config.data.data if data is None else data, config.updated(config.flat), external)
    setup.teacher = teacher
    return setup


def _run(
    setup: Setup,
    reporter: Reporter,
    distributed: DistributedContext,
    *,
    out: str | Path | None,
    resume: str | Path | None,
    only: Mapping[str, str | Path | None],
    command: str,
) -> Classifier:
    config, several = setup.config, distributed.world_size > 1
    device = pick_device(config.machine.device, distributed.local_rank if several else None)
    # Choices that depend on the machine are made by the main process, and kept when the run is resumed.
    amp = "bf16" if uses_bf16(setup.model, device, config.machine.amp) else "off"
    pinned = distributed.broadcast_object({"cache": config.io.cache, "amp": amp})
    setup.config, setup.given = config.updated(pinned), {**setup.given, **pinned}
    if config.model.probe and setup.callbacks:
        raise ConfigError("a probe has no epochs: leave out callbacks")
    preview = next((name for name, path in only.items() if path is not None), None)
    if several and (config.model.probe or setup.auto_batch or preview):
        raise DistributedError(
            "a probe, batch_size=auto, --show-batch and --lr-find need a single process: leave out torchrun"
        )
    threads = ThreadControl(config.machine.threads, may_try=device.type == "cpu" and not several and preview is None)
    with cpu_threads(threads.plan.at(0)):
        session = None if config.model.probe else _make_session(setup, reporter, device, distributed, threads)
        setup = session.setup if session else _with_probe_threads(setup, threads, device)
        if preview is not None:
            if session is None:
                raise ConfigError(f"a probe has no training batches: leave out --{preview.replace('_', '-')}")
            return _preview(session, reporter, **only)
        folder = _folder(out, resume, setup, distributed)
        with stop_says_what_is_kept(reporter.log, folder), folder.lock():
            if resume is None and distributed.is_main:
                check_empty(folder)  # again: another run may have used it meanwhile
            extended = distributed.run_on_main(folder.reopen)
            if resume is None or extended:
                folder.write_config(to_run_toml(setup.config, KEYS if session else keys_for(Use.PROBE)))
            resumed = session is not None and session.enter(folder)
            folder.append(
                folder.sessions, session_record(command, session.trainer.state.steps if session else 0, device)
            )
            if session is None:
                return _probe(setup, folder, reporter, device)
            return _train(session, folder, reporter, resumed, extended)


def _with_probe_threads(setup: Setup, threads: ThreadControl, device: torch.device) -> Setup:
    """The setup of a probe, with the fastest number of threads."""
    used = {"threads": choose_probe_threads(setup, threads, device)}
    return replace(setup, config=setup.config.updated(used), given={**setup.given, **used})


def _preview(
    session: Session, reporter: Reporter, show_batch: str | Path | None, lr_find: str | Path | None
) -> Classifier:
    """Draw the first batch or make a range test. The classifier is untrained."""
    if show_batch is not None:
        line, report = draw_first_batch(session, show_batch), None
    else:
        line, report = draw_range_test(session, lr_find)
    reporter.log(line)
    return _classifier(session.setup, session.setup.model, report=report)


def _folder(
    out: str | Path | None, resume: str | Path | None, setup: Setup, distributed: DistributedContext
) -> RunFolder:
    """The folder of the resumed run, or a new one; chosen by the main process."""

    def choose() -> Path:
        old = None if resume is None else run_to_resume(resume, extend=True)
        if old is None:
            check_outside(RUNS if out is None else out, setup.config.data.data)
        return (old or create_run_folder(out, setup.dataset.name, setup.config.model.model)).path

    folder = RunFolder(distributed.run_on_main(choose), distributed.is_main)
    distributed.advice = f"; resume with --resume {folder.path}"
    return folder


def _make_session(
    setup: Setup, reporter: Reporter, device: torch.device, distributed: DistributedContext, threads: ThreadControl
) -> Session:
    """A session, with the fastest number of threads and, with batch_size=auto, the largest batch for the device."""
    session = Session(setup, reporter, device, distributed, threads)

    def choose() -> None:
        with compiling():
            if line := session.choose_threads():
                session.setup.reasons.append(line)

    _run_to_end(choose, reporter, lambda: memory_advice(session.trainer, setup.preprocess))
    if not setup.auto_batch:
        return session
    with compiling():
        size, reason = fit_batch_size(session.trainer, setup.preprocess, len(session.loader.split))
    return Session(session.setup.with_batch_size(size, reason), reporter, device, threads=threads)


def _train(session: Session, folder: RunFolder, reporter: Reporter, resumed: bool, extended: bool) -> Classifier:
    setup = session.setup
    steps = session.loader.steps_per_epoch
    reporter.plan(plan_lines(setup, session.trainer, steps, str(folder.path), all_groups=reporter.verbose))
    if resumed:
        state = session.trainer.state
        reporter.log(f"resumed at epoch {state.epoch + 1}, step {state.steps}; {session.checked}")
    if extended:
        lr, epochs = session.next_lr, setup.config.schedule.epochs
        reporter.log(f"extended: the learning rate follows the schedule of {epochs:g} epochs, and goes on at {lr:.3g}")

    def work() -> tuple[dict[str, Any], Evaluation]:
        if not resumed and session.distributed.world_size == 1:
            _log_cost(session, reporter)
        with session.trackers, compiling():
            session.run()
            with reporter.busy("evaluating the best epoch"):
                result = session.final_evaluation(session.final_model())
            summary = training_summary(session, result)
            session.trackers.finish(summary)
        return summary, result

    summary, result = _run_to_end(work, reporter, lambda: memory_advice(session.trainer, setup.preprocess))
    classifier = _finish(setup, session.model, summary, result, folder, reporter, session.trainer.groups)
    session.distributed.barrier()  # other processes wait until everything is written
    return classifier


def _log_cost(session: Session, reporter: Reporter) -> None:
    """Print the estimated cost, and reserve time for the last validation."""
    dataset, trainer = session.setup.dataset, session.trainer
    with compiling(), reporter.busy("trial steps"):
        cost, lines = estimate_cost(trainer, session.loader, dataset.counts(), dataset.eval_split())
    for line in lines:
        reporter.log(line)
    if cost:
        trainer.state.validation_seconds = trainer.schedule.reserve(cost.validation_seconds)


def _probe(setup: Setup, folder: RunFolder, reporter: Reporter, device: torch.device) -> Classifier:
    advice = "a batch of images does not fit into memory: use a smaller eval_batch_size"
    summary, result = _run_to_end(lambda: run_probe(setup, folder, reporter, device), reporter, lambda: advice)
    return _finish(setup, setup.model, summary, result, folder, reporter)


def _run_to_end(work: Callable[[], T], reporter: Reporter, advice: Callable[[], str]) -> T:
    """The result of `work`. Raises DeviceError with an advice if memory is exhausted."""
    try:
        return work()
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError("batch norm needs more than one value per channel: use a larger batch_size") from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Outside of `except`, where the error no longer references the tensors of the step.
    raise DeviceError(advice())


def _finish(
    setup: Setup,
    model: nn.Module,
    summary: dict[str, Any],
    result: Evaluation,
    folder: RunFolder,
    reporter: Reporter,
    groups: Sequence[Mapping[str, Any]] = (),
) -> Classifier:
    """Write the model, the summary, which marks the run as finished, and the report, and print the result.

    groups: the optimizer's parameter groups, for the report.
    """
    loaded = setup.pretrained.loaded if setup.pretrained else None
    top5 = ["top5"] if has_top5(setup.dataset.num_classes) else []
    notes = {
        "data": setup.dataset.name,
        "split": split_settings(setup.config),
        "counts": setup.dataset.counts(),
        "trained_on": {
            "data": digest(setup.config.data.data),
            "images": names_digest(setup.dataset.split("train")),
        },
        "figures": {key: summary[key] for key in ("split", "images", "top1", *top5, "loss")},
        **({"source": loaded.source, "licence": loaded.licence} if loaded else {}),  # the model inherits the licence
    }
    report = RunSummary(summary, folder.path)
    classifier = _classifier(setup, model, report=report, notes=notes)
    if folder.writes:
        _save_model(classifier, folder)
        folder.write_json(folder.summary, summary, indent=2)
    for line in [*result_lines(summary), f"model   {folder.model}"]:
        reporter.log(line)
    if folder.writes:
        try:
            split = setup.dataset.splits.get(result.split)
            folder.write_json(folder.details, report_details(result, split, groups, classifier))
            folder.write_checksums()
            reporter.log(f"report  {write_report(folder)}")
            report.write_plots()
        except Exception as error:  # the run is finished and saved
            reporter.log(f"warning: the run is saved, but could not write its report: {one_line(error)}")
    return classifier


def _classifier(setup: Setup, model: nn.Module, **about: Any) -> Classifier:
    names, architecture = setup.dataset.class_names, setup.config.model.model
    return Classifier(model, setup.preprocess, names, architecture=architecture, **about)  # type: ignore[arg-type]


def _save_model(classifier: Classifier, folder: RunFolder) -> None:
    """Write the model folder. An external model has no config to store: only its weights are written."""
    if isinstance(classifier.model, ImageModel):
        classifier.save(folder.model)
        return
    with atomic_folder(folder.model) as temporary:
        save_file(unshared(classifier.model.state_dict()), temporary / "model.safetensors")

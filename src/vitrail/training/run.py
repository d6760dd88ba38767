"""`train`: from a folder of images to a classifier, in one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vitrail.classifier import Classifier
from vitrail.data.dataset import Dataset
from vitrail.errors import VitrailError
from vitrail.evaluation.metrics import Evaluation
from vitrail.models.base import ImageModel
from vitrail.training.checkpoints.provenance import environment, python_call, session_record
from vitrail.training.checkpoints.run_folder import RunFolder, check_free, new_run, old_run
from vitrail.training.config.recipes import find_recipe
from vitrail.training.config.schema import KEYS, TrainConfig, Use, keys_for, make_config, read_config, to_toml
from vitrail.training.engine.interrupt import Stopped
from vitrail.training.monitoring.batch_preview import draw_first_batch
from vitrail.training.monitoring.plan import plan_lines
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.monitoring.report import write_report
from vitrail.training.monitoring.report_data import report_details
from vitrail.training.monitoring.summary import say_result, summarise
from vitrail.training.monitoring.trackers import check_trackers
from vitrail.training.objectives.teacher import Source, lasting_name
from vitrail.training.probe import check_probe_keys, result_lines, run_probe
from vitrail.training.resources.batch_size import fit_batch_size, memory_advice
from vitrail.training.resources.forecast import cost_lines
from vitrail.training.session import Session
from vitrail.training.setup import Setup, held_out, prepare, reopen
from vitrail.utils.device import compiling, cpu_threads, pick_device, uses_bf16
from vitrail.utils.distributed import DistributedContext, distributed_context
from vitrail.utils.files import atomic_folder
from vitrail.utils.memory import is_out_of_memory
from vitrail.utils.text import one_line

_NAMED = ("model", "weights", "teacher", "pretrained", "probe", "epochs", "budget", "seed")


def train(
    data: str | Path | Dataset | None = None,
    *,
    model: str | nn.Module | None = None,
    pretrained: bool | None = None,
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
    command: str | None = None,
    **config: Any,
) -> Classifier:
    """Train or fine-tune a classifier on `data` and leave a run folder behind.

    Args:
        data: a folder of images, a dataset's name, wds: shards, an hf-dataset:, or a Dataset.
        model: a name from `list_models()`, or a module of your own with timm's interface; None: one is chosen.
        pretrained, weights: start from published weights, or from these.
        teacher: learn from this model too: what `vitrail.load` takes, an .onnx file, a Classifier or a module.
        probe: freeze the model and fit a linear head to its features, which are computed once.
        out: the run folder; by default runs/<data>-<model>.
        epochs, budget: how long: passes over the images, and seconds or "10m".
        seed: of everything random but the split of the images.
        resume: a run folder to go on with; nothing else is needed.
        recipe: one of `recipe_names()`, or a TOML file of config keys; its `data` counts where none is named here.
        progress: False keeps silent.
        verbose: tell what became of every single tensor of the weights.
        show_batch: train nothing and write no run; draw what the model would see in the first batch to this picture.
        command: how the run was asked for, as its report tells it; None: this very call.
        config: any other key of `TrainConfig`. It wins over the recipe, and that over what is chosen for the images.

    Returns:
        The classifier with the weights that were best on the validation images. Its `report` is the run's summary.
        With `show_batch`, the classifier before any training.

    Raises:
        VitrailError: something that was asked for is not there, does not fit, or cannot be written.
        Stopped: Ctrl-C or SIGTERM; the run is saved, and the text says how to go on. It is a KeyboardInterrupt.
    """
    with (
        distributed_context() as distributed,
        torch.random.fork_rng(devices=[]),
    ):  # the caller's own random numbers are left alone
        ask = make_ask(
            data,
            model=model,
            pretrained=pretrained,
            weights=weights,
            teacher=teacher,
            probe=probe,
            out=out,
            epochs=epochs,
            budget=budget,
            seed=seed,
            resume=resume,
            recipe=recipe,
            verbose=verbose,
            show_batch=show_batch,
            command=command,
            **config,
        )
        return _run(ask, distributed, Reporter(progress and distributed.is_main))


@dataclass(frozen=True)
class Ask:
    """What `train` was asked for. teacher: one of the caller's own."""

    data: str | Path | Dataset | None
    given: TrainConfig
    guest: nn.Module | None
    teacher: Classifier | nn.Module | None
    out: str | Path | None
    resume: str | Path | None
    recipe: str | Path | None
    verbose: bool
    show_batch: str | Path | None
    command: str


def make_ask(
    data: str | Path | Dataset | None = None,
    *,
    model: str | nn.Module | None = None,
    weights: str | Path | None = None,
    teacher: Source | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    recipe: str | Path | None = None,
    verbose: bool = False,
    show_batch: str | Path | None = None,
    command: str | None = None,
    **keys: Any,
) -> Ask:
    """From the arguments of `train`."""
    named = {
        "model": model if isinstance(model, str) else None,
        "weights": None if weights is None else str(weights),
        "teacher": None if teacher is None else lasting_name(teacher),
        **keys,
    }
    # What `train` itself offers may be left out by None; of other keys, None is a value.
    given = make_config({key: value for key, value in named.items() if value is not None or key not in _NAMED})
    if command is None:
        places = {"out": out, "resume": resume, "recipe": recipe}
        command = python_call({"data": data, **named, "model": model, "teacher": teacher, **places})
    guest = model if isinstance(model, nn.Module) else None
    own = teacher if isinstance(teacher, Classifier | nn.Module) else None
    return Ask(data, given, guest, own, out, resume, recipe, verbose, show_batch, command)


def _run(ask: Ask, distributed: DistributedContext, reporter: Reporter) -> Classifier:
    before = distributed.run_on_main(lambda: _before(ask))
    with distributed.main_process_first():
        setup = fresh_setup(ask) if before is None else _resumed(ask, before)
    setup.teacher = ask.teacher
    machine = setup.config.machine
    device = pick_device(machine.device, distributed.local_rank if distributed.world_size > 1 else None)
    # Automatic choices that depend on the machine are the main process's, and are kept when the run is resumed.
    amp = "bf16" if uses_bf16(setup.model, device, machine.amp) else "off"
    pinned = distributed.broadcast_object({"cache": setup.config.io.cache, "amp": amp})
    setup.config, setup.given = setup.config.updated(pinned), {**setup.given, **pinned}
    if distributed.world_size > 1 and (setup.config.model.probe or setup.auto_batch or ask.show_batch):
        raise VitrailError("a probe, batch_size=auto and --show-batch are for one process: leave out torchrun")
    if ask.verbose and setup.pretrained:
        reporter.say(setup.pretrained.report.table())
    with cpu_threads(setup.config.machine.threads):
        session = None if setup.config.model.probe else make_session(setup, reporter, device, distributed)
        setup = session.setup if session else setup
        if ask.show_batch is not None:
            return _show_batch(session, setup, ask.show_batch, reporter)
        folder = _folder(ask, setup, distributed)
        with folder.held():
            if ask.resume is None:
                if distributed.is_main:
                    check_free(folder)  # once more: another run may have begun and ended here meanwhile
                folder.write_config(to_toml(setup.config, KEYS if session else keys_for(Use.PROBE)))
            if session is None:
                folder.add_session(session_record(ask.command, 0, device))
                return _probe(setup, folder, reporter, device, ask.guest is not None)
            found = session.enter(folder)
            folder.add_session(session_record(ask.command, session.trainer.state.steps, device))
            return _train(session, folder, reporter, found)


def _before(ask: Ask) -> TrainConfig | None:
    """The config of the run that is to go on; None for a new one, whose place is free."""
    if ask.resume is not None:
        return TrainConfig().updated({"cache": "off", **read_config(old_run(ask.resume).config).given})
    if ask.out is not None and ask.show_batch is None:
        check_free(RunFolder(Path(ask.out).expanduser()))  # before a download, not after
    return None


def fresh_setup(ask: Ask) -> Setup:
    """The setup of a new run."""
    asked = None if ask.recipe is None else find_recipe(ask.recipe)
    given = {**(asked.fixed if asked else {}), **ask.given.given}
    named = given.pop("data", None)
    data = named if ask.data is None else ask.data
    if data is None:
        raise VitrailError("nothing to train on: name a folder of images or a dataset, or a run with --resume")
    if given.get("probe"):
        if asked and not asked.whole:
            given.pop("recipe", None)  # a file may ask for a probe; the named ones are for training
        check_probe_keys({**given, **(asked.settings if asked else {})})
    check_trackers(given.get("track", "none"))  # before a download, not after
    return prepare(data, TrainConfig().updated(given), ask.guest, asked)


def _resumed(ask: Ask, before: TrainConfig) -> Setup:
    """The setup of a run that goes on as it began."""
    for key, value in ask.given.given.items():
        if key not in keys_for(Use.RESUME) and before.flat[key] != value:
            was = before.flat[key]
            raise VitrailError(f"a run goes on as it began, with {key}={was}: leave {key} out, or begin anew")
    if ask.recipe is not None or (ask.out is not None and Path(ask.out) != Path(str(ask.resume))):
        raise VitrailError("a run goes on where and as it began: leave out --out and --recipe with --resume")
    config = before.updated(ask.given.given)
    check_trackers(config.io.track)
    return reopen(config, ask.data, ask.guest)


def _folder(ask: Ask, setup: Setup, distributed: DistributedContext) -> RunFolder:
    """Where the run goes on, or a free place; the first process's choice."""

    def choose() -> Path:
        old = None if ask.resume is None else old_run(ask.resume)
        return (old or new_run(ask.out, setup.dataset.name, setup.config.model.model)).path

    folder = RunFolder(distributed.run_on_main(choose), distributed.is_main)
    distributed.advice = f"; go on as before, with --resume {folder.path}"
    return folder


def make_session(setup: Setup, reporter: Reporter, device: torch.device, distributed: DistributedContext) -> Session:
    """A session, with the batch that suits the machine where that was asked for."""
    session = Session(setup, reporter, device, distributed)
    if not setup.auto_batch:
        return session
    with compiling():
        size, reason = fit_batch_size(session)
    return Session(setup.with_batch_size(size, reason), reporter, device)


def _train(session: Session, folder: RunFolder, reporter: Reporter, resumed: bool) -> Classifier:
    setup, full = session.setup, False
    for line in plan_lines(setup, session.trainer, session.loader.steps_per_epoch, str(folder.path)):
        reporter.say(line)
    if resumed:
        reporter.say(f"resumed at epoch {session.trainer.state.epoch + 1}, step {session.trainer.state.steps}")
    try:
        if not resumed and session.distributed.world_size == 1:
            with compiling():
                lines = cost_lines(session)
            for line in lines:
                reporter.say(line)
        with session.trackers, compiling():
            session.run()
            model = session.final_model()
            result = session.final_evaluation(model)
            summary = summarise(session, result)
            session.trackers.finish(summary)
    except Stopped as stopped:
        reporter.say(str(stopped))
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        full = True
    if full:  # out here, where the error no longer holds on to what the step had
        raise VitrailError(memory_advice(session))
    classifier = _finish(setup, session.model, summary, folder)
    say_result(reporter, summary, folder)
    if folder.writes:
        _report(setup, result, folder, reporter, session.trainer.groups)
    session.distributed.barrier()  # the others leave when everything is written
    return classifier


def _probe(setup: Setup, folder: RunFolder, reporter: Reporter, device: torch.device, own_model: bool) -> Classifier:
    try:
        summary, result = run_probe(setup, folder, reporter, device, own_model=own_model)
    except Stopped as stopped:
        reporter.say(str(stopped))
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise VitrailError("a batch of images does not fit into memory: use a smaller eval_batch_size") from error
    summary["environment"] = environment(device)
    classifier = _finish(setup, setup.model, summary, folder)
    for line in [*result_lines(summary), f"model   {folder.model}"]:
        reporter.say(line)
    _report(setup, result, folder, reporter)
    return classifier


def _report(
    setup: Setup,
    result: Evaluation,
    folder: RunFolder,
    reporter: Reporter,
    groups: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the report. The run is finished and saved by now, and nothing that goes wrong here changes that."""
    try:
        folder.write_details(report_details(result, setup.dataset.splits.get(result.split), groups))
        write_report(folder)
    except Exception as error:
        words = one_line(error)
        reporter.say(f"warning: the run is saved, but could not write its report: {words}")
        return
    reporter.say(f"report  {folder.report}")


def _show_batch(session: Session | None, setup: Setup, path: str | Path, reporter: Reporter) -> Classifier:
    if session is None:
        raise VitrailError("a probe has no batches to show: leave out --show-batch")
    reporter.say(draw_first_batch(session, path))
    return Classifier(
        setup.model,  # type: ignore[arg-type]
        setup.preprocess,
        setup.dataset.class_names,
        architecture=setup.config.model.model,
    )


def _finish(setup: Setup, model: nn.Module, summary: dict[str, Any], folder: RunFolder) -> Classifier:
    """Write the model and then the summary, with which the run is finished."""
    classifier = Classifier(
        model,  # type: ignore[arg-type]  # a guest may stand in for an ImageModel
        setup.preprocess,
        setup.dataset.class_names,
        report=summary,
        architecture=setup.config.model.model,
        notes={
            "data": setup.dataset.name,
            "split": held_out(setup.config),
            "counts": setup.dataset.counts(),
            "figures": {key: summary[key] for key in ("split", "images", "top1", "top5", "loss")},
            **_origin(setup),
        },
    )
    if setup.pretrained:
        summary["weights"] = str(setup.pretrained.report)
    if folder.writes:
        _save_model(classifier, folder)
        folder.write_summary(summary)
    return classifier


def _origin(setup: Setup) -> dict[str, Any]:
    """Whose weights the model started from, and their licence, which it inherits."""
    if setup.pretrained is None:
        return {}
    return {"source": setup.pretrained.loaded.source, "licence": setup.pretrained.loaded.licence}


def _save_model(classifier: Classifier, folder: RunFolder) -> None:
    """The model folder. A guest that is none of ours has no config to store: its weights alone are kept."""
    if isinstance(classifier.model, ImageModel):
        classifier.save(folder.model)
        return
    with atomic_folder(folder.model) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.model.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors")

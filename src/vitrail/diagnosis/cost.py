"""What a training would cost: time of an epoch, peak memory and disk, from a few steps that are undone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vitrail.data.dataset import Dataset
from vitrail.errors import VitrailError
from vitrail.training.build import make_train_loader, make_trainer
from vitrail.training.config.schema import make_config
from vitrail.training.config.values import byte_count
from vitrail.training.resources.forecast import Cost, estimate_cost
from vitrail.training.resources.threads import ThreadControl
from vitrail.training.setup import Setup, prepare
from vitrail.utils.device import cpu_threads, pick_device
from vitrail.utils.distributed import SINGLE_PROCESS

_TRIAL_STEPS = 3  # of which the first is a warm-up


def plan(dataset: Dataset, settings: Mapping[str, Any]) -> Setup:
    """What `train` would do with these settings. Raises VitrailError."""
    with torch.random.fork_rng(devices=[]):
        return prepare(dataset, make_config(dict(settings)))


def forecast(setup: Setup) -> dict[str, Any]:
    """The cost of a training of this setup.

    "model", "img_size", "batch_size", "epochs", "epoch_seconds" (with its validation), "total_seconds", "peak_bytes"
    (of the process on the CPU, of tensors on CUDA), "available_bytes", "cache_bytes" (disk), "device", and "note": a
    warning of too little memory, or "". Seconds and peak are None where a step might exhaust the memory.
    """
    config = setup.config
    device = pick_device(config.machine.device)
    with torch.random.fork_rng(devices=[]), cpu_threads(None):
        cost, lines = _measure(setup, device)
    epochs = config.schedule.epochs
    epoch = None if cost is None else cost.epoch_seconds + cost.validation_seconds
    return {
        "model": config.model.model,
        "img_size": list(setup.preprocess.size),
        "batch_size": config.schedule.batch_size,
        "epochs": epochs,
        "epoch_seconds": epoch and round(epoch, 2),
        "total_seconds": None if epoch is None or epochs is None else round(epochs * epoch, 1),
        "peak_bytes": cost and cost.peak_memory,
        "available_bytes": cost and cost.available_memory,
        "cache_bytes": 0 if config.io.cache == "off" else byte_count(config.io.cache),
        "device": str(device),
        "note": next((line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")), ""),
    }


def _measure(setup: Setup, device: torch.device) -> tuple[Cost | None, list[str]]:
    loader = make_train_loader(setup, device, SINGLE_PROCESS, None)
    setup.model.to(device)
    trainer = make_trainer(setup, loader.steps_per_epoch, device, SINGLE_PROCESS)
    threads = ThreadControl(setup.config.machine.threads, may_try=device.type == "cpu")
    threads.choose_for(trainer, setup.preprocess)
    threads.apply(0)
    return estimate_cost(trainer, loader, setup.dataset.counts(), setup.dataset.eval_split(), _TRIAL_STEPS)


def forecasts(dataset: Dataset, setup: Setup | None, named: str | None) -> dict[str, Any]:
    """{"automatic": a forecast, "named": one for the model `named`, or None}; {} without a setup.

    A forecast that cannot be made is {"error": why}.
    """
    if setup is None:
        return {}
    found: dict[str, Any] = {"automatic": _try(setup), "named": None}
    if named is not None:
        found["named"] = forecast(plan(dataset, {"model": named}))  # the user's choice: its errors are the user's
    return found


def _try(setup: Setup) -> dict[str, Any]:
    try:
        return forecast(setup)
    except VitrailError as error:
        return {"error": str(error)}

"""summary.json of a finished run, and the result in lines of text."""

from collections.abc import Mapping
from typing import Any

import torch

from vitrail.evaluation.metrics import Evaluation, is_imbalanced
from vitrail.evaluation.statistics import wilson
from vitrail.training.checkpoints.provenance import environment
from vitrail.training.engine.state import TrainState
from vitrail.training.session import Session
from vitrail.training.setup import Setup
from vitrail.utils.text import counted, format_duration, format_speed

_SMALL = 100  # images below which the confidence interval is printed


def run_summary(
    setup: Setup,
    result: Evaluation,
    state: TrainState,
    skipped: Mapping[str, str],
    device: torch.device,
    **metrics: Any,
) -> dict[str, Any]:
    """The content of summary.json: metrics on the evaluated split, what was trained on what, and further `metrics`.

    state: for time and throughput. skipped: reason by path, of images that could not be read.
    """
    dataset = setup.dataset
    reasons = {item["path"]: item["reason"] for item in (*dataset.skipped, *result.skipped)} | dict(skipped)
    weights = {"weights": str(setup.pretrained.report)} if setup.pretrained else {}
    return {
        **result.to_dict(),
        **metrics,
        "seconds": round(state.seconds, 3),
        "images_per_second": round(state.images_per_second, 1),
        "waiting_for_data": round(state.waiting_for_data, 4),
        "params": sum(p.numel() for p in setup.model.parameters()),
        "model": setup.config.model.model,
        **weights,
        "data": dataset.name,
        "how_split": dataset.how_split,
        "seed": setup.config.seed,
        "device": str(device),
        "environment": environment(device),
        "skipped": [{"path": path, "reason": reason} for path, reason in reasons.items()],
    }


def training_summary(session: Session, result: Evaluation) -> dict[str, Any]:
    """The summary of a training. val_top1 is the validation top-1 of the best epoch, in percent."""
    state, best = session.trainer.state, session.best
    return run_summary(
        session.setup,
        result,
        state,
        session.skipped,
        session.trainer.device,
        val_top1=best.top1 if best.epoch else None,
        best_epoch=best.epoch or None,
        epochs=len(session.history),
        stopped=state.stopped or None,
        steps=state.steps,
        skipped_steps=state.skipped,
        rollbacks=state.rollbacks,
        train_images=state.images,
        processes=session.distributed.world_size,
    )


def result_lines(summary: Mapping[str, Any]) -> list[str]:
    """The skipped images and the result of a training or of a linear probe."""
    score = f"{summary['split']} top-1 {summary['top1']:.2f} % on {counted(summary['images'], 'image')}"
    if 0 < summary["images"] < _SMALL:
        low, high = wilson(summary["top1"] / 100, summary["images"])
        score += f" (95 % CI {low:.0f} to {high:.0f} %)"
    if is_imbalanced(summary["per_class"]):
        score += f", balanced top-1 {summary['balanced_top1']:.2f} %"
    lines = _probe_lines(summary, score) if "probe" in summary else _training_lines(summary, score)
    return [*(f"skipped {item['path']}: {item['reason']}" for item in summary["skipped"]), *lines]


def _training_lines(summary: Mapping[str, Any], score: str) -> list[str]:
    if summary["best_epoch"]:
        score += " (also used to select the epoch)" if summary["split"] == "val" else ""
        score += f", best epoch {summary['best_epoch']}"
    speed = f"{format_speed(summary['images_per_second'])} images/s"
    lines = [f"{score}; trained in {format_duration(summary['seconds'])} at {speed}"]
    if summary["stopped"]:
        lines.append(f"stopped after epoch {summary['epochs']}: {summary['stopped']}")
    if summary["skipped_steps"]:
        back = counted(summary["rollbacks"], "rollback")
        rollbacks = f"; {back} to an earlier checkpoint" if summary["rollbacks"] else ""
        lines.append(f"{counted(summary['skipped_steps'], 'step')} skipped: loss or gradient not finite{rollbacks}")
    return lines


def _probe_lines(summary: Mapping[str, Any], score: str) -> list[str]:
    probe = summary["probe"]
    val = probe["val_top1"]
    selected = "the default, without validation images" if val is None else f"selected on val, {val:.2f} %"
    return [
        f"{score} by a linear head on frozen features (l2 {probe['l2']:g}, {selected})",
        f"{summary['split']} top-1 {summary['knn_top1']:.2f} % by "
        f"{counted(probe['knn_neighbours'], 'nearest neighbour')}",
        f"{counted(probe['images'], 'image')} through the model at "
        f"{format_speed(summary['images_per_second'])} images/s; "
        f"total time {format_duration(summary['seconds'])}",
    ]

"""summary.json of a finished run, and the last lines that it prints."""

from collections.abc import Mapping
from typing import Any

from vitrail.evaluation.metrics import Evaluation, is_imbalanced
from vitrail.evaluation.statistics import wilson
from vitrail.training.checkpoints.provenance import environment
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.session import Session
from vitrail.utils.text import format_duration

_SMALL = 100  # images below which the confidence interval is printed


def summarise(session: Session, result: Evaluation) -> dict[str, Any]:
    """The content of summary.json. top1, balanced_top1 and top5 are percentages on `split`; val_top1 is the validation
    top-1 of the best epoch."""
    state, config, best = session.trainer.state, session.config, session.best
    dataset = session.setup.dataset
    found = {item["path"]: item["reason"] for item in dataset.skipped} | session.skipped
    found |= {item["path"]: item["reason"] for item in result.skipped}
    return {
        "top1": result.top1,
        "balanced_top1": result.balanced_top1,
        "top5": result.top5,
        "loss": result.loss,
        "ece": result.ece,
        "images": result.images,
        "split": result.split,
        "val_top1": best.top1 if best.epoch else None,
        "best_epoch": best.epoch or None,
        "epochs": len(session.history),
        "steps": state.steps,
        "skipped_steps": state.skipped,
        "rollbacks": state.rollbacks,
        "train_images": state.images,
        "seconds": round(state.seconds, 3),
        "images_per_second": round(state.images_per_second, 1),
        "waiting_for_data": round(state.wait_seconds / state.step_seconds, 4) if state.step_seconds else 0.0,
        "params": sum(p.numel() for p in session.trainer.model.parameters()),
        "model": config.model.model,
        "data": dataset.name,
        "how_split": dataset.how_split,
        "seed": config.seed,
        "processes": session.distributed.world_size,
        "device": str(session.trainer.device),
        "environment": environment(session.trainer.device),
        "skipped": [{"path": path, "reason": reason} for path, reason in found.items()],
        "per_class": result.per_class,
    }


def _interval(summary: Mapping[str, Any]) -> str:
    """The 95 % confidence interval (Wilson), for few images."""
    count = summary["images"]
    if not 0 < count < _SMALL:
        return ""
    low, high = wilson(summary["top1"] / 100, count)
    return f" (95 % CI {low:.0f} to {high:.0f} %)"


def _by_class(summary: Mapping[str, Any]) -> str:
    """Balanced top-1, for imbalanced classes."""
    return f", balanced top-1 {summary['balanced_top1']:.2f} %" if is_imbalanced(summary["per_class"]) else ""


def say_result(reporter: Reporter, summary: Mapping[str, Any], folder: RunFolder) -> None:
    for item in summary["skipped"]:
        reporter.say(f"skipped {item['path']}: {item['reason']}")
    epoch = f", best epoch {summary['best_epoch']}" if summary["best_epoch"] else ""
    chosen = " (also used to select the epoch)" if summary["split"] == "val" and summary["best_epoch"] else ""
    reporter.say(
        f"{summary['split']} top-1 {summary['top1']:.2f} % on {summary['images']:,} images"
        f"{_interval(summary)}{_by_class(summary)}{chosen}{epoch}; "
        f"trained in {format_duration(summary['seconds'])} at {summary['images_per_second']:,.0f} images/s"
    )
    if summary["skipped_steps"]:
        rollbacks = f"; {summary['rollbacks']} rollbacks to an earlier checkpoint" if summary["rollbacks"] else ""
        reporter.say(f"{summary['skipped_steps']} steps skipped: loss or gradient not finite{rollbacks}")
    reporter.say(f"model   {folder.model}")

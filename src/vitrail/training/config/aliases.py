"""Names of settings that other libraries use: those that mean the same, and those for which there is something else.

Importing this imports no torch.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from vitrail.errors import ConfigError, did_you_mean
from vitrail.utils.text import one_line

CLOSE = 0.7  # similarity of a spelling that is offered

# The same value under another name.
ALIASES = {
    "learning_rate": "lr",
    "base_lr": "lr",
    "max_lr": "lr",
    "lr_max": "lr",
    "lr0": "lr",
    "eta_min": "min_lr",
    "lr_min": "min_lr",
    "bs": "batch_size",
    "batch": "batch_size",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "val_batch_size": "eval_batch_size",
    "wd": "weight_decay",
    "opt_betas": "betas",
    "llrd": "layer_decay",
    "layerwise_lr_decay": "layer_decay",
    "grad_clip": "clip_grad",
    "clip_norm": "clip_grad",
    "max_grad_norm": "clip_grad",
    "gradient_clip_val": "clip_grad",
    "n_epoch": "epochs",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "num_train_epochs": "epochs",
    "dropout": "drop",
    "drop_rate": "drop",
    "dropout_rate": "drop",
    "drop_path_rate": "drop_path",
    "stochastic_depth": "drop_path",
    "attn_drop_rate": "attn_drop",
    "attention_dropout": "attn_drop",
    "smoothing": "label_smoothing",
    "label_smoothing_factor": "label_smoothing",
    "ema_decay": "ema",
    "model_ema_decay": "ema",
    "num_workers": "workers",
    "dataloader_num_workers": "workers",
    "n_workers": "workers",
    "nw": "workers",
    "num_threads": "threads",
    "imgsz": "img_size",
    "image_size": "img_size",
    "input_size": "img_size",
    "arch": "model",
    "backbone": "model",
    "model_name": "model",
    "dataset": "data",
    "data_path": "data",
    "checkpoint": "weights",
    "initial_checkpoint": "weights",
    "channels": "in_chans",
    "in_channels": "in_chans",
    "val_split": "val_fraction",
    "valid_pct": "val_fraction",
    "val_size": "val_fraction",
    "test_split": "test_fraction",
    "test_size": "test_fraction",
    "random_state": "seed",
    "random_seed": "seed",
    "precision": "amp",
    "torchcompile": "compile",
    "torch_compile": "compile",
    "grad_checkpoint": "grad_checkpointing",
    "gradient_checkpointing": "grad_checkpointing",
    "fsdp": "shard",
    "hflip": "flip",
    "fliplr": "flip",
    "horizontal_flip": "flip",
    "flipud": "vflip",
    "vertical_flip": "vflip",
    "degrees": "rotate",
    "translate": "shift",
    "mixup_alpha": "mixup",
    "cutmix_alpha": "cutmix",
    "mixup_prob": "mix_prob",
    "mixup_switch_prob": "switch",
    "reprob": "erase",
    "erasing": "erase",
    "random_erasing": "erase",
    "aug_repeats": "repeats",
    "randaugment": "rand_augment",
    "loss_fn": "loss",
    "tau": "temperature",
    "distillation_tau": "temperature",
    "distillation_alpha": "distill_weight",
    "distillation_type": "distill",
    "teacher_model": "teacher",
    "logger": "track",
    "opt": "optimizer",
    "optim": "optimizer",
    "early_stopping": "patience",
    "early_stopping_patience": "patience",
}

# Not supported under any name, and what comes nearest.
_SCHEDULE = "the schedule is a linear warm-up and half a cosine: set epochs, warmup_epochs and min_lr"
_OUT = "the run folder is --out"
_PROCESSES = "start several processes with `torchrun --nproc-per-node N -m vitrail train ...`"
_PREPROCESS = "preprocessing comes with the weights, or from the data: set img_size and fit"
_BALANCE = "use balance=loss for class weights, or balance=sample to draw every class equally often"
_FREEZE = "use --probe to train the head alone, or layer_decay=0.65 for lower learning rates in earlier layers"
_PARTS = (
    "accumulate=N computes a batch in N parts: for N times the images per step, set batch_size N times as large too"
)
_HALF = "use amp=bf16; float16 is not offered"
_JITTER = "set brightness, contrast and saturation"
_DETECTION = "it belongs to object detection; cutmix is the nearest for classification"
_BEST = "the best epoch is chosen by top-1 on the validation images; with balance, by its mean over classes"
UNSUPPORTED = {
    "beta1": "betas=0.9,0.999 are both",
    "beta2": "betas=0.9,0.999 are both",
    "eps": "AdamW's epsilon is torch's default",
    "opt_eps": "AdamW's epsilon is torch's default",
    "lrf": "min_lr is the final learning rate itself, not a share",
    "final_div": "min_lr is the final learning rate itself",
    "warmup_steps": "set warmup_epochs, fractions allowed",
    "warmup_ratio": "set warmup_epochs, fractions allowed",
    "warmup_lr": "the warm-up starts near 0: set warmup_epochs",
    **dict.fromkeys(("sched", "scheduler", "lr_scheduler", "lr_scheduler_type", "cos_lr", "one_cycle"), _SCHEDULE),
    **dict.fromkeys(("cooldown_epochs", "decay_epochs", "decay_rate", "lr_cycle", "step_size", "gamma"), _SCHEDULE),
    "max_steps": "set epochs, fractions allowed, or budget",
    **dict.fromkeys(("project", "name", "output", "output_dir", "save_dir", "experiment", "exist_ok"), _OUT),
    **dict.fromkeys(("gpus", "num_gpus", "devices", "strategy", "nodes", "num_nodes", "world_size"), _PROCESSES),
    **dict.fromkeys(("mean", "std", "crop_pct", "interpolation", "normalize", "crop_mode", "rect"), _PREPROCESS),
    **dict.fromkeys(("class_weight", "class_weights", "weighted", "oversample", "sampler"), _BALANCE),
    **dict.fromkeys(("freeze", "freeze_epochs", "freeze_layers", "freeze_backbone", "unfreeze"), _FREEZE),
    **dict.fromkeys(
        ("grad_accum", "grad_accum_steps", "gradient_accumulation_steps", "accumulate_grad_batches", "nbs"), _PARTS
    ),
    **dict.fromkeys(("fp16", "half", "float16", "mixed_precision", "use_amp", "bf16"), _HALF),
    **dict.fromkeys(("color_jitter", "hsv_h", "hsv_s", "hsv_v", "hue", "max_lighting"), _JITTER),
    **dict.fromkeys(("mosaic", "close_mosaic", "copy_paste", "box", "iou", "conf", "nms"), _DETECTION),
    **dict.fromkeys(("metric", "monitor", "eval_metric", "metrics", "save_best"), _BEST),
    "aa": "use rand_augment=9 for RandAugment, or a recipe such as --recipe deit",
    "auto_augment": "use rand_augment=9 for RandAugment, or a recipe such as --recipe deit",
    "augment": "set the keys of the section augment, such as flip=0.5, or choose a --recipe",
    "item_tfms": "set the keys of the section augment, such as flip=0.5, or choose a --recipe",
    "batch_tfms": "set the keys of the section augment, such as flip=0.5, or choose a --recipe",
    "scale": "crop_scale=0.35,1 is the share of the area that a random crop takes",
    "ratio": "crop_ratio=0.75,1.33 is the width to height of a random crop",
    "jsd_loss": "use loss=ce or loss=bce",
    "bce_loss": "use loss=bce",
    "criterion": "use loss=ce or loss=bce",
    "focal_loss": "use loss=ce or loss=bce, with balance=loss for rare classes",
    "model_ema": "ema=0.9999 is the decay of the average; 0 is off",
    "swa": "ema=0.9999 averages the weights",
    "num_classes": "the classes are those of the data",
    "nc": "the classes are those of the data",
    "save_period": "set checkpoint_minutes, or checkpoint_every in steps",
    "save_steps": "set checkpoint_every, in steps",
    "save_every": "set checkpoint_every, in steps",
    "eval_steps": "set eval_every, in epochs",
    "val_interval": "set eval_every, in epochs",
    "val": "set eval_every, the epochs between validations",
    "wandb": "use track=wandb",
    "log_wandb": "use track=wandb",
    "tensorboard": "use track=tensorboard",
    "report_to": "use track=tensorboard, track=wandb or track=trackio",
    "auto_lr_find": "use --lr-find lr.svg, which suggests a rate, and set lr",
    "deterministic": "runs always repeat bit for bit on the same machine; set seed for another",
    "tta": "test-time augmentation is --tta of evaluate and predict",
}


def key_of(name: str, keys: Collection[str]) -> str:
    """The setting, one of `keys`, that a name stands for: itself or an alias.

    Raises:
        ConfigError: there is no such setting; says what comes nearest in meaning if other libraries have it.
    """
    key = name if name in keys else ALIASES.get(name, name)
    if key in keys:
        return key
    if nearest := UNSUPPORTED.get(key):
        raise ConfigError(f"{name} is not supported: {nearest}")
    known = {**{alias: key for alias, key in ALIASES.items() if key in keys}, **{key: key for key in keys}}
    alike = get_close_matches(name[:100].lower(), known, cutoff=CLOSE)
    hint = did_you_mean(name, dict.fromkeys(known[word] for word in alike), cutoff=0)
    raise ConfigError(f"unknown training option {one_line(repr(name), 80)}{hint}; see `vitrail train --help`")


def by_key(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Values by key instead of by name. Raises ConfigError as `key_of`, and for a setting under two names."""
    found: dict[str, str] = {}
    for name in values:
        key = key_of(name, keys)
        if key in found:
            raise ConfigError(f"{key} is given twice: as {found[key]} and as {name}")
        found[key] = name
    return {key: values[name] for key, name in found.items()}

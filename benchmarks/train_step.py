"""A training step of vit_tiny and swin_tiny at 224 pixels and of the small-image ViT, on a batch that is ready.

Against the same network in timm and in transformers in a plain loop: forward, cross-entropy, backward, AdamW. Ours is
the step that `vitrail train` takes. On the CPU both in float32, then both in bfloat16 (autocast) where the CPU has it;
last what `vitrail train` chooses by itself against the plain loop in float32. Where a GPU is at hand, there both in
bfloat16, as it is and compiled, with the share of the hardware's peak that the model's own arithmetic reaches (MFU).
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Comparison, interleave, publish, synchronise
from benchmarks.peers import timm_twin, transformers_twin
from vitrail.data.loader import Batch
from vitrail.models.catalog import variant
from vitrail.pretrained.create import create_model
from vitrail.training.config.schema import make_config
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.engine.schedule import Schedule
from vitrail.training.engine.trainer import Trainer
from vitrail.training.objectives.classification import Classify
from vitrail.utils.torch_compat import cpu_bf16

CPU = {"vit_tiny_patch16_224": (16,), "swin_tiny_patch4_window7_224": (8,), "vit_micro_patch8_32": (64,)}
GPU = {"vit_tiny_patch16_224": (256,), "swin_tiny_patch4_window7_224": (128,), "vit_micro_patch8_32": (1024,)}
WORDS = {"off": "float32", "bf16": "bfloat16", "auto": "our choice"}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16, dense, from the maker's data sheets


def our_step(name: str, images: Tensor, targets: Tensor, amp: str, compiled: bool) -> Callable[[], Any]:
    config = make_config({"data": "-", "model": name, "amp": amp, "compile": compiled, "weight_decay": 0.05})
    rows = torch.arange(len(images))
    view = View(images, targets, rows, 0)
    batch = Batch(images, targets, rows)
    trainer = Trainer(create_model(name), Classify(), lambda *_: view, Schedule(None, 0, 0, 1e9), config, images.device)
    return lambda: (trainer.step(batch), synchronise(images))


def plain_step(model: nn.Module, images: Tensor, targets: Tensor, amp: str, compiled: bool) -> Callable[[], Any]:
    from timm.optim import create_optimizer_v2

    model = model.to(images.device).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp == "bf16"):
            loss = F.cross_entropy(forward(images), targets)
        loss.backward()
        optimizer.step()
        synchronise(images)

    return step


def flops(name: str) -> float:
    """Floating-point operations of a step on one image: three times those of the whole forward pass."""
    config = variant(name).config
    with torch.device("meta"):
        model, image = create_model(name).eval(), torch.empty(1, config.in_chans, *config.img_size)
        with FlopCounterMode(display=False) as counter:
            model.forward_head(model.forward_features(image))
    return 3.0 * counter.get_total_flops()


def compare(name: str, size: int, device: str, amps: tuple[str, str], compiled: bool, rounds: int) -> list[Comparison]:
    """amps: ours and the peers'."""
    config = variant(name).config
    images = torch.randn(size, config.in_chans, *config.img_size, device=device)
    targets = torch.randint(config.num_classes, (size,), device=device)
    ours = our_step(name, images, targets, amps[0], compiled)
    peers = {"timm": timm_twin(name, config), "transformers": transformers_twin(config)}
    precision = " against ".join(WORDS[amp] for amp in dict.fromkeys(amps))
    work = f"{name}, batch {size}, {precision}{', compiled' if compiled else ''}"
    done = []
    for label, peer in peers.items():
        if peer is None:
            continue
        theirs = plain_step(peer, images, targets, amps[1], compiled)
        result = interleave(work, ("vitrail", ours), (label, theirs), rounds=rounds, warmup=3 if compiled else 2)
        print(result, flush=True)
        done.append(result)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="*", default=list(CPU))
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    settings = [(("bf16", "bf16"), False), (("bf16", "bf16"), True)] if on_gpu else [(("off", "off"), False)]
    if not on_gpu and cpu_bf16() is not None:
        settings += [(("bf16", "bf16"), False), (("auto", "off"), False)]
    results, rates = [], {}
    for name in arguments.models:
        for size in (GPU if on_gpu else CPU)[name]:
            for amps, compiled in settings:
                found = compare(name, size, arguments.device, amps, compiled, arguments.rounds)
                results += found
                rates[found[0].name] = {"images_per_second": round(size / found[0].ours_median, 1)}
                peak = next((p for word, p in PEAK.items() if on_gpu and word in torch.cuda.get_device_name()), None)
                if peak:
                    rates[found[0].name]["mfu"] = round(flops(name) * size / found[0].ours_median / peak, 4)
    publish("train_step_cuda" if on_gpu else "train_step", results, ours=rates)


if __name__ == "__main__":
    main()

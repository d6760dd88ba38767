"""A digest of a model's weights."""

import hashlib

import torch
from torch import nn


def model_fingerprint(model: nn.Module, *settings: str) -> str:
    """A hex digest that changes with any bit of the weights, with the architecture, and with the given settings."""
    digest = hashlib.blake2b(f"{type(model).__qualname__} {getattr(model, 'config', '')}".encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for setting in settings:
        digest.update(setting.encode())
    return digest.hexdigest()

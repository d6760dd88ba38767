"""How closely float32 results are compared: on an absolute scale, so that a test holds on every processor."""

from collections.abc import Sequence

import torch
from torch import Tensor

LOSS = 1e-5
"""Of a mean cross-entropy, in nats. Rounding moves logits of about 10 by 1e-6 and the loss by as much, also where the
loss itself is near zero."""


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5, name: str = "") -> None:
    """The largest difference is at most `tolerance` of the largest value of `theirs`.

    The order of a sum depends on the processor's vectors. Its rounding is relative to the terms (1e-7 of each), and
    not to the sum, which may be near zero.
    """
    assert ours.shape == theirs.shape, name
    assert ours.dtype == theirs.dtype, name
    largest, worst = theirs.abs().max().item(), (ours - theirs).abs().max().item()
    assert largest > 0, name
    assert worst <= tolerance * largest, f"{name} differs by {worst:.2g}, {worst / largest:.2g} of the largest value"


def assert_same_gradients(ours: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    """Equal values and equal gradients for every input; float64."""
    torch.testing.assert_close(ours, expected)
    target = torch.randn_like(expected)
    gradients = (torch.autograd.grad((output * target).sum(), inputs) for output in (ours, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)

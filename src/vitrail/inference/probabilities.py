"""Logits to probabilities and to the order of classes, for every runtime. Importing this imports no torch.

Shapes: B batch, K classes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating[Any]]  # B K


def softmax(logits: Logits) -> npt.NDArray[np.float32]:
    """Probabilities B K, computed in float64."""
    return np.exp(log_softmax(logits)).astype(np.float32)


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities, B K."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def ranking(logits: Logits, top: int | None = None) -> npt.NDArray[np.int64]:
    """The `top` classes of each row, the most probable first, B top. bfloat16 gives equal logits: of classes with
    equal ones, the first comes first."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :top]

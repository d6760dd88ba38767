"""What is explained: a class, or a class against another.

Shapes: B batch, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.errors import ConfigError, did_you_mean
from vitrail.utils.text import printable


@dataclass(frozen=True)
class Target:
    """A number computed from the logits of an image, whose cause in the image is looked for. Made by `parse_target`.

    class_names: K names by index. index: a class, one for each image, or None for the predicted class of each image.
    against: a second class, whose logit is subtracted: why `index` and not `against`.
    """

    class_names: tuple[str, ...]
    index: int | tuple[int, ...] | None = None
    against: int | None = None

    def of(self, logits: Tensor) -> Tensor:
        """Logits B K to the logit of the class of each image, or to the difference of two: B, differentiable."""
        chosen = logits.gather(1, self.indices(logits)[:, None])[:, 0]
        return chosen if self.against is None else chosen - logits[:, self.against]

    def indices(self, logits: Tensor) -> Tensor:
        """The class of each image, B."""
        if self.index is None:
            return logits.argmax(dim=1)
        return torch.tensor(self.index, device=logits.device).expand(len(logits))

    def fixed(self, logits: Tensor) -> "Target":
        """The target with the class of each image stated: changed copies of an image, or blocks before the last, may
        predict another. Of one image, it applies to any number of its copies."""
        return Target(self.class_names, tuple(self.indices(logits).tolist()), self.against)

    def ruled_out(self, logits: Tensor) -> Tensor:
        """Whether the model rules the class of each image out, by a logit below the mean of all: bool B. Of a pair it
        never does: the question is what favours the first, however probable it is."""
        if self.against is not None:
            return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.double()  # of logits that are equal, the mean is one of them
        return self.of(logits) < logits.mean(dim=1)

    def names(self, logits: Tensor) -> list[str]:
        """For each image "cat", or for two classes "cat:dog"."""
        suffix = "" if self.against is None else f":{self.class_names[self.against]}"
        return [self.class_names[index] + suffix for index in self.indices(logits).tolist()]

    def measure(self, logits: Tensor) -> Tensor:
        """The probability of the class of each image, 0 to 1, or the difference of two logits: B, float32."""
        return self.of(logits.float().softmax(dim=1) if self.against is None else logits.float())

    def score(self, logits: Tensor) -> list[float]:
        """`measure` as numbers."""
        scores: list[float] = self.measure(logits).tolist()
        return scores


def parse_target(target: str | int | None, class_names: Sequence[str]) -> Target:
    """What the user names as `target`: None for the predicted class of each image, a label, an index, or a pair of
    labels or indices separated by ":".

    A label goes before an index, so a class whose name is "3" is found by it; so does a label that contains ":".

    Raises:
        ConfigError: no such class, an index out of range, or a pair of the same class.
    """
    names = tuple(class_names)
    if target is None:
        return Target(names)
    if isinstance(target, int):
        return Target(names, _checked(target, names))
    if (index := _find(target, names)) is not None:
        return Target(names, index)
    pairs = [(target[:at], target[at + 1 :]) for at, sign in enumerate(target) if sign == ":"]
    for first, second in pairs:
        index, against = _find(first, names), _find(second, names)
        if index is not None and against is not None:
            if index == against:
                raise ConfigError(f"target {printable(target)!r}: both are the class {printable(names[index])!r}")
            return Target(names, index, against)
    unknown = next(part for part in pairs[0] if _find(part, names) is None) if len(pairs) == 1 else target
    raise ConfigError(
        f"target {printable(target)!r}: the model has no class {printable(unknown)!r}{did_you_mean(unknown, names)}: "
        f"give a label, an index from 0 to {len(names) - 1}, or a pair LABEL:LABEL"
    )


def _find(text: str, names: tuple[str, ...]) -> int | None:
    """The class with this label or index; None if there is none."""
    if text in names:
        return names.index(text)
    return _checked(int(text), names) if text.isascii() and text.isdigit() else None


def _checked(index: int, names: tuple[str, ...]) -> int:
    if not 0 <= index < len(names):
        raise ConfigError(f"target {index}: the model has classes 0 to {len(names) - 1}")
    return index

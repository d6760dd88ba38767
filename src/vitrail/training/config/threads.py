"""The setting `threads`: auto, a number, or what a run has used. Importing this imports no torch."""

import re
from dataclasses import dataclass, replace
from typing import Self

from vitrail.utils.settings import none_or

_MAX = 1024
_CHANGE = re.compile(r"([0-9]{1,4})(?:@([0-9]{1,15}))?")


@dataclass(frozen=True)
class ThreadPlan:
    """torch's threads on the CPU, by training step.

    changes: (first step, threads), ascending; empty for torch's default. auto: chosen by trial, and again if training
    becomes slow.
    """

    auto: bool = False
    changes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """ "auto", "none", "2", or "auto,2,1@450": 2 threads by trial, and 1 from step 450 on. Raises ValueError."""
        if none_or(text) is None:
            return cls()
        first, *rest = (part.strip() for part in text.lower().split(","))
        auto = first == "auto"
        changes = [_change(part) for part in (rest if auto else [first, *rest])]
        steps = [step for step, _ in changes]
        if steps != sorted(set(steps)) or steps[:1] not in ([], [0]):
            raise ValueError("the first number of threads is that of step 0, and steps ascend, such as 2,1@450")
        return cls(auto, tuple(changes))

    def __str__(self) -> str:
        numbers = [f"{threads}@{step}" if step else str(threads) for step, threads in self.changes]
        return ",".join([*(["auto"] if self.auto else []), *numbers]) or "none"

    @property
    def open(self) -> bool:
        """Whether a trial is to choose the first number."""
        return self.auto and not self.changes

    @property
    def fixed(self) -> Self:
        """The same numbers, without further trials."""
        return replace(self, auto=False)

    def at(self, step: int) -> int | None:
        """The number of threads of a step, counted from 0; None for torch's default."""
        return next((threads for first, threads in reversed(self.changes) if first <= step), None)

    def changed(self, step: int, threads: int) -> Self:
        """With this number from `step` on."""
        before = tuple(change for change in self.changes if change[0] < step)
        return self if self.at(step) == threads else replace(self, changes=(*before, (step, threads)))


def _change(text: str) -> tuple[int, int]:
    found = _CHANGE.fullmatch(text)
    if not found or not 1 <= int(found[1]) <= _MAX:
        raise ValueError(f"neither auto nor a number from 1 to {_MAX}")
    return int(found[2] or 0), int(found[1])

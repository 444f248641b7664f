"""How many bytes a loss takes: bounds, from what softmax.py, sigmoid.py and distillation.py hold at a time."""

from __future__ import annotations

from dataclasses import dataclass

from clipfast.problem import (
    DISTILLATION,
    IDS,
    SIGMOID,
    SYMMETRIC,
    Problem,
    accumulation_dtype,
    kept_dtype,
    statistics_dtype,
)

SMALL_BYTES = 1 << 15  # scalars and allocations' least sizes


@dataclass(frozen=True)
class Memory:
    """What one forward and backward pass of a loss takes."""

    problem: Problem
    workspace: int  # of the backend
    normalize: bool
    label_smoothing: bool
    adds_positives: bool
    folds_norms: bool
    kept: int = 0  # of logits between the passes

    @property
    def statistics_bytes(self) -> int:
        """Both logsumexps and the positives, kept from the forward pass to the backward pass."""
        return (2 * self.problem.n + self.problem.m) * statistics_dtype(self.problem.device).itemsize

    @property
    def saved_bytes(self) -> int:
        """What autograd keeps for the backward pass: features, formed gradients or both, and vectors."""
        scalars = 2 * accumulation_dtype(self.problem.dtype).itemsize
        if self._formed:
            kept = kept_dtype(self.problem.dtype).itemsize // self.problem.dtype.itemsize
            features = self.problem.input_bytes if SYMMETRIC in self.problem.needs else 0
            return features + kept * self.problem.input_bytes + 2 * scalars
        ids = 4 * (self.problem.n + self.problem.m) * (IDS in self.problem.needs)
        return self.problem.input_bytes + self.statistics_bytes + ids + scalars + self.kept

    @property
    def workspace_bytes(self) -> int:
        """The largest sum of temporaries at any time, the gradients dx and dy and what is saved not counted."""
        p = self.problem
        itemsize = accumulation_dtype(p.dtype).itemsize
        own, wide, largest = p.input_bytes, (p.n + p.m) * p.d * itemsize, max(p.n, p.m) * p.d * itemsize
        converted = wide if own < wide else 0
        made_here = self.normalize and not self.folds_norms
        towers = 2 if DISTILLATION in p.needs else 1
        normalized = towers * own if made_here else 0
        # Gradients in the accumulation dtype until they are through the norms or have their mean logits' part.
        gradients = wide - own if made_here or self.label_smoothing else 0
        ids = IDS in p.needs
        # The forward pass does without dx and dy, where they are not formed in it.
        before = [normalized + self.workspace]
        if made_here:
            before.append(normalized + largest)
        if self.label_smoothing or self.adds_positives:
            before.append(normalized + converted + (2 * wide if ids else largest))
        after = [normalized + self.workspace + gradients]
        if self.label_smoothing:
            after.append(normalized + gradients + converted + (7 * wide // 2 if ids else wide + 2 * largest))
        if made_here:
            after.append(normalized + gradients + 4 * largest)
        if self._formed:
            # What is formed is saved; its scaled copy comes when all else is gone.
            after = [phase - own for phase in after] + [largest if converted else 0]
        return SMALL_BYTES + 6 * self.statistics_bytes + max(*(phase - own for phase in before), *after, 0)

    @property
    def _formed(self) -> bool:
        return bool({SYMMETRIC, SIGMOID, DISTILLATION} & self.problem.needs)

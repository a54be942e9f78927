"""What a batch of test rows came to: answers, what they earn, and their routes.

Shapes: B rows, P prompt columns, C labels, N blocks, M atoms.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class RouteSums:
    """Routes of rows, summed over the tokens of each row's prompt; in float64, on the CPU.

    Attributes:
        rows: Index of each row within its split.
        weights_NBM: Routing weights of each block.
        entropy_NB: Entropies in nats.
        tokens_B: Tokens.
    """

    rows: list[int]
    weights_NBM: Tensor
    entropy_NB: Tensor
    tokens_B: Tensor

    @classmethod
    def of(cls, routes_NBPM: Tensor, mask_BP: Tensor, rows: Iterable[int]) -> RouteSums:
        """Sum a batch's routes over the tokens that ``mask_BP`` marks; all blocks at once, since each call costs."""
        routes = routes_NBPM.float().masked_fill(~mask_BP.bool().unsqueeze(-1), 0.0)
        entropy = -torch.xlogy(routes, routes).sum(dim=(2, 3))
        tokens = mask_BP.sum(dim=1)
        return cls(list(rows), routes.sum(dim=2).cpu().double(), entropy.cpu().double(), tokens.cpu().double())

    def widened(self, num_atoms: int) -> RouteSums:
        """Return the same over at least ``num_atoms`` atoms: a bank has grown by some that nothing went to."""
        missing = num_atoms - self.weights_NBM.shape[2]
        return self if missing <= 0 else replace(self, weights_NBM=F.pad(self.weights_NBM, (0, missing)))


@dataclass
class Outcome:
    """What a batch of test rows came to.

    Attributes:
        rows: Index of each row within its split.
        values: What each row's answer earns in the task's headline metric; for a regression its squared error.
        predictions: Each row's answer as text.
        targets: Each row's true answer (regression: the true value).
        seen_values: Label tasks: 1.0 where the answer is right among all labels seen; None where only own ones count.
        generated_values: Label tasks: 1.0 where the generated text is the label; None where nothing is generated.
        label_scores: Label tasks: log-likelihood of every entry of the batch's tree of labels, (B, C), in nats; the
            task's own labels come first.
        routes: Routing weights of each block and token of the prompt, (N, B, P, M); None without a router.
        prompt_mask: 1 for the prompt's own tokens, 0 for padding, (B, P); None without routes.
        stages: Name of the stage that a growing bank's gate chose for each row, "" for none; None without a gate.
        seconds: What answering the rows took; None where it was not measured.
    """

    rows: list[int]
    values: list[float]
    predictions: list[str]
    targets: list[Any]
    seen_values: list[float] | None = None
    generated_values: list[float] | None = None
    label_scores: Tensor | None = field(default=None, compare=False)
    routes: Tensor | None = field(default=None, compare=False)
    prompt_mask: Tensor | None = field(default=None, compare=False)
    stages: list[str] | None = None
    seconds: float | None = field(default=None, compare=False)
    _sums: RouteSums | None = field(default=None, compare=False)

    @property
    def route_sums(self) -> RouteSums | None:
        """The routes summed over each row's prompt, computed once; None without a router."""
        if self._sums is None and self.routes is not None and self.prompt_mask is not None:
            self._sums = RouteSums.of(self.routes, self.prompt_mask, self.rows)
        return self._sums

    def without_tensors(self) -> Outcome:
        """Return the answers alone: tensors are large, and lie on the model's device."""
        return replace(self, label_scores=None, routes=None, prompt_mask=None, _sums=None)

"""What a batch of test rows came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


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
        rivals: Label tasks: labels of stages to come that might be likelier than each row's answer among all.
        routes: Routing weights of each block and token of the prompt, (N, B, P, M); None without a router.
        stages: Name of the stage that a growing bank's gate chose for each row, "" for none; None without a gate.
        pass_rows: Rows that its pass computed, other tasks' too; 0 where the pass is counted with another outcome.
        prompt_mask: 1 for the prompt's own tokens, 0 for padding, (B, P); None without routes.
    """

    rows: list[int]
    values: list[float]
    predictions: list[str]
    targets: list[Any]
    seen_values: list[float] | None = None
    generated_values: list[float] | None = None
    rivals: list[tuple[str, ...]] | None = None
    routes: Tensor | None = None
    prompt_mask: Tensor | None = None
    stages: list[str] | None = None
    pass_rows: int | None = None

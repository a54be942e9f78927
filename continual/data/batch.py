"""Rows as a model takes them: tokenised once, and a batch of them padded, or laid into one sequence.

Training rows are padded on the right and need no attention mask; their labels cover the columns from the first answer
of the batch on, so that the head of the language model runs on those alone. Packed, they lie one after the other in a
single row without padding, and the labels are those of the answers' tokens alone. Prompts to be scored are padded on
the left, so that the last column predicts the first token of any answer.

Shapes: B rows of a batch, P prompt columns, S prompt and answer columns, L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

IGNORED = -100  # the label that cross-entropy passes over


@dataclass
class Row:
    """One encoded row: a prompt and its answer as token ids (text), or inputs and a value (regression).

    ``instruction`` is what a gate gets, which a wording may set apart from the prompt's.
    """

    source: dict[str, Any]
    instruction: str
    prompt_ids: list[int] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def is_packed(batch: dict[str, Any]) -> bool:
    """Say whether a training batch's rows are packed into one: only then does it name the columns that get logits."""
    return "logits_to_keep" in batch["forward"]


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device; its rows' texts and numbers are not searched for any."""
    texts = {name: batch[name] for name in ("rows", "instructions") if name in batch}
    tensors = {name: value for name, value in batch.items() if name not in texts}
    return move_data_to_device(tensors, device) | texts


def padded(ids: Sequence[list[int]]) -> Tensor:
    """Return token ids of several texts, (B, L), padded with -1."""
    width = max(1, *map(len, ids))
    return torch.tensor([tokens + [-1] * (width - len(tokens)) for tokens in ids])

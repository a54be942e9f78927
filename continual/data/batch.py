"""Rows as a model takes them, and the tensors of a batch of them.

Shapes: B rows of a batch, P prompt columns, S prompt and answer columns, L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

IGNORED = -100  # the label that cross-entropy passes over
PADDING = {
    "input_ids": 0,
    "position_ids": 0,
    "row_of_token": 0,
    "token_mask": 0,
    "logits_to_keep": 0,
    "instruction_ids": -1,
    "text_ids": -1,
}
"""What stands in columns that are added to a batch's tensors, by their name."""


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
    def size(self) -> int:
        """What the row counts in a mean loss: the tokens of its answer, or 1 without any (a regressor's row)."""
        return len(self.answer_ids) or 1

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device; its rows' texts and numbers are not searched for any."""
    texts = {name: batch[name] for name in ("rows", "instructions") if name in batch}
    tensors = {name: value for name, value in batch.items() if name not in texts}
    return move_data_to_device(tensors, device) | texts


def padded(ids: Sequence[list[int]]) -> Tensor:
    """Return token ids of several texts, (B, L), padded with -1."""
    width = max(1, *map(len, ids))
    return torch.tensor([tokens + [-1] * (width - len(tokens)) for tokens in ids])


def widen(tensor: Tensor, value: int, multiple: int) -> Tensor:
    """Return a tensor with columns of a value added at its end, until their number is a multiple of one given."""
    return F.pad(tensor, (0, -tensor.shape[-1] % multiple), value=value)

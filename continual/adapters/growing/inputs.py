"""What the gate of a growing bank reads of a row, as keywords of a forward pass."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from continual.adapters.instructions import InstructionEncoder
from continual.backbones import Backbone
from continual.data.batch import Row, padded


class RowInputs:
    """What the gate of a growing bank reads of a row, as keywords of a forward pass (``adapters.growing``).

    Args:
        backbone: Tokenises the row's own text: its context and question, without instruction and options.
        encode: Encodes an instruction, (E,).
        text_tokens: Tokens of the text that are read.
    """

    def __init__(self, backbone: Backbone, encode: InstructionEncoder, text_tokens: int) -> None:
        self.backbone: Any = backbone
        self.encode, self.text_tokens = encode, text_tokens
        self._ids: dict[str, array[int]] = {}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return the keywords of a batch of rows."""
        instructions = [row.instruction for row in rows]
        if self.backbone.kind == "regressor":
            features = torch.tensor([row.source["x"] for row in rows])
            return {"row_features": features, "gate_instruction": self.instructions(instructions)}
        return self.of([f"{row.source['context']}\n{row.source['question']}".strip() for row in rows], instructions)

    def of(self, texts: Sequence[str], instructions: Sequence[str]) -> dict[str, Tensor]:
        """Return the keywords of rows by their own texts and their instructions; "" where there is none."""
        if (new := set(texts) - self._ids.keys()) and len(self._ids) + len(new) > _MOST_KEPT:
            self._ids, new = {}, set(texts)
        for text in new:  # test rows are read after every stage
            self._ids[text] = array("i", self.backbone.encode_text(text)[: self.text_tokens])
        ids = [self._ids[text].tolist() for text in texts]
        return {"text_ids": padded(ids), "gate_instruction": self.instructions(instructions)}

    def instructions(self, texts: Sequence[str]) -> Tensor:
        """Return the encodings of instructions, (B, E)."""
        return torch.stack([self.encode(text) for text in texts])


_MOST_KEPT = 2**14
"""Texts whose token ids are kept for the gate of a growing bank, beside those of the batch at hand."""

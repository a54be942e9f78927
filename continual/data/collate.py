"""Rows to a batch, padded; ``packing`` lays them into one sequence instead.

Training rows are padded on the right and need no attention mask; their labels cover the columns from the first answer
of the batch on, so that the head of the language model runs on those alone. Prompts to be scored are padded on the
left, so that the last column predicts the first token of any answer.

Shapes: B rows of a batch, P prompt columns, S prompt and answer columns, L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from continual.backbones import Backbone
from continual.data.batch import IGNORED, Row, padded
from continual.data.label_tree import LabelTree


class Collator:
    """Pads rows into a batch: a dictionary of tensors, the rows themselves under "rows".

    Args:
        backbone: Tokenises instructions; pads with its tokenizer's padding token.
        with_instructions: Whether the adapter has an instruction prior to feed.
        answers: Whether the answers follow the prompts (training) or prompts stand alone (scoring).
        label_tree: Labels to score, for a task that has them.
        encoder: Encodes instructions for a backbone without words.
        row_inputs: What a gate reads of the rows, where there is one.
        share: Which of a batch's rows are this process's; all of them by default.
        task_id: What to tell an adapter that has to be told the task of its rows; None for any other.
        masks_padding: Whether a batch with answers tells tokens from padding, as "token_mask".
    """

    def __init__(
        self,
        backbone: Backbone,
        with_instructions: bool,
        answers: bool,
        label_tree: LabelTree | None = None,
        encoder: Any = None,
        row_inputs: Callable[[Sequence[Row]], dict[str, Tensor]] | None = None,
        share: slice = slice(None),
        task_id: int | None = None,
        masks_padding: bool = False,
    ) -> None:
        self.task_id, self.masks_padding = task_id, masks_padding
        self.backbone: Any = backbone
        self.with_instructions, self.answers = with_instructions, answers
        self.label_tree, self.encoder, self.row_inputs, self.share = label_tree, encoder, row_inputs, share

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the batch; see the module's docstring for the shapes.

        "instructions" are the rows' own, as text. "weight", of a batch with answers, is what the mean over this
        process's answer tokens (a regressor's rows) is multiplied by for the mean over processes to be that over all.
        """
        whole, own = rows, rows[self.share]
        rows = own or whole[:1]  # a process without a row computes one as the others do, for nothing
        batch = self._text(rows) if self.backbone.kind == "causal_lm" else self._numbers(rows)
        if self.answers:
            batch["weight"] = (self.share.step or 1) * sum(row.size for row in own) / sum(row.size for row in whole)
        batch["rows"] = [row.source for row in rows]
        batch["instructions"] = [row.instruction for row in rows]
        batch["forward"] |= self._instructions(batch["instructions"])
        if self.row_inputs is not None:
            batch["forward"] |= self.row_inputs(rows)
        if self.task_id is not None:
            batch["forward"]["task_ids"] = torch.full((len(batch["forward"]["input_ids"]),), self.task_id)
        return batch

    def _text(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self.with_answers(rows) if self.answers else self._prompts(rows)

    def with_answers(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the model's arguments, "forward", and the "labels": rows of a language model to be trained on.

        Padding is on the right: a causal model never sees it, so that no attention mask is needed.
        """
        width, pad = max(row.length for row in rows), self.backbone.tokenizer.pad_token_id
        first = min(len(row.prompt_ids) for row in rows)  # the first column that is an answer's in any row
        ids, labels = [], []
        for row in rows:
            padding = width - row.length
            ids.append(row.prompt_ids + row.answer_ids + [pad] * padding)
            labels.append([IGNORED] * (len(row.prompt_ids) - first) + row.answer_ids + [IGNORED] * padding)
        forward = {"input_ids": torch.tensor(ids)}
        if self.masks_padding:
            forward["token_mask"] = (torch.arange(width) < torch.tensor([[row.length] for row in rows])).long()
        return {"forward": forward, "labels": torch.tensor(labels)}

    def _prompts(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Pad on the left: the last column of every row predicts the first token of its answer."""
        width, pad = max(len(row.prompt_ids) for row in rows), self.backbone.tokenizer.pad_token_id
        lengths = torch.tensor([len(row.prompt_ids) for row in rows])
        mask = (torch.arange(width) >= width - lengths.unsqueeze(1)).long()
        batch: dict[str, Any] = {
            "forward": {
                "input_ids": torch.tensor([[pad] * (width - len(r.prompt_ids)) + r.prompt_ids for r in rows]),
                "attention_mask": mask,
                "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0),
            }
        }
        if self.label_tree is not None:
            batch["label_tree"] = self.label_tree
        return batch

    def _numbers(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {
            "forward": {"x": torch.tensor([row.source["x"] for row in rows])},
            "labels": torch.tensor([row.source["y"] for row in rows]),
        }

    def _instructions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if not self.with_instructions:
            return {}
        if self.backbone.kind == "causal_lm":
            encoded = {text: self.backbone.encode_instruction(text) for text in set(texts)}
            return {"instruction_ids": padded([encoded[text] for text in texts])}
        return {"instruction_encoding": self.encoder.encode(list(texts))}

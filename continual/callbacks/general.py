"""The untouched text on which a model's general ability is measured, and the measuring.

``general.jsonl`` holds short passages of English in many registers, written for this project and under its
licence. No task is made of them, and none was published before: whatever a backbone knows of them, it knows of English.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from continual.data.batch import IGNORED, Row, moved
from continual.data.batch_order import token_batches
from continual.data.collate import Collator
from continual.errors import ConfigError
from continual.interfaces import AdaptedModule, Recorder, Rows, StageContext
from continual.runtime import distributed
from continual.runtime.parameters import forward_context

BATCH_TOKENS = 1024


def passages() -> list[str]:
    """Return the passages of general text, in the file's order."""
    text = (resources.files("continual") / "callbacks" / "general.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in text.splitlines()]


def encode_passages(backbone: Any) -> list[Row]:
    """Return the passages as rows: a prompt of the first token, an answer of all others, and no instruction.

    Raises:
        ConfigError: The backbone is no language model.
    """
    if backbone.kind != "causal_lm":
        raise ConfigError(f"general_ability: {type(backbone).__name__} is no causal language model, it reads no text")
    encoded = [backbone.tokenizer(text, verbose=False)["input_ids"] for text in passages()]
    texts = zip(passages(), encoded, strict=True)
    return [Row({"context": text, "question": ""}, "", ids[:1], ids[1:]) for text, ids in texts]


def log_likelihood(module: AdaptedModule, rows: list[Row]) -> tuple[float, int]:
    """Return the mean log-likelihood a token (nats), and of how many tokens; a passage's first one is only read."""
    encoder, inputs = module.instruction_encoder, module.row_inputs
    collate = Collator(module.backbone, module.uses_instructions, answers=True, encoder=encoder, row_inputs=inputs)
    total, count = 0.0, 0
    for batch in token_batches([row.length for row in rows], 0, BATCH_TOKENS)[distributed.own_batches(module)]:
        padded = moved(collate([rows[index] for index in batch]), module.device)
        with forward_context(module):
            logits = module.answer_outputs(padded, module.outputs(padded))
        labels: Tensor = padded["labels"][padded["labels"] != IGNORED]
        total -= F.cross_entropy(logits.float(), labels, reduction="none").double().sum().item()
        count += len(labels)
    totals, counts = zip(*distributed.of_batches((total, count), module), strict=True)
    return sum(totals) / sum(counts), sum(counts)


class GeneralRecorder(Recorder):
    """After all tasks are scored, measures the general ability: rows for the table ``general``."""

    def __init__(self) -> None:
        self.rows: Rows = []
        self._encoded: list[Row] = []

    def check(self, module: AdaptedModule, stages: Sequence[Any]) -> None:
        """Encode the passages, or raise ConfigError."""
        self._encoded = encode_passages(module.backbone)

    def begin(self, context: StageContext) -> None:
        """Begin a stage."""
        self.keys, self.rows = context.keys, []

    def tables(self) -> dict[str, Rows]:
        """Return the rows of the table ``general``."""
        return {"general": self.rows}

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, while the model is still on its device."""
        module: AdaptedModule = pl_module  # type: ignore[assignment]
        module.strategy.begin_untasked(module)
        with torch.no_grad():
            value, count = log_likelihood(module, self._encoded)
        measured = {"metric": "log_likelihood_nats", "direction": "higher", "value": value, "count": count}
        self.rows = [self.keys | {"task": "general"} | measured]

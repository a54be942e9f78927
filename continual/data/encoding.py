"""The rows of one split of a task, put into words and tokenised once for a backbone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, cast

from continual.backbones import Backbone
from continual.data.batch import Row
from continual.data.prompt_variants import TRAINING, Wording, opening
from continual.errors import ConfigError
from tasks import Task
from tasks.base import Split


class EncodedTask:
    """One split of a task, encoded for a backbone.

    Args:
        task: The task.
        backbone: Tokenises the rows.
        split: "train" or "test".
        max_tokens: Longest prompt and answer together.
        options: Whether prompts list the labels of a label task.
        wording: How rows are put into words: one wording for all, or one for each row.

    Attributes:
        rows: The encoded rows, in the task's order.
        cut_rows: Rows whose context was cut to fit ``max_tokens``.
        cut_tokens: Context tokens that were cut in all.

    Raises:
        ConfigError: The task and the backbone do not fit, or a row does not fit without cutting its question.
    """

    def __init__(
        self,
        task: Task,
        backbone: Backbone,
        split: Split,
        max_tokens: int,
        options: Literal["none", "listed"] = "none",
        wording: Wording | Sequence[Wording] = TRAINING,
    ) -> None:
        wanted = "regressor" if task.kind == "regression" else "causal_lm"
        if backbone.kind != wanted:
            raise ConfigError(f"a {task.kind} task needs a {wanted} backbone, not {type(backbone).__name__}")
        self.task = task
        self.backbone: Any = backbone  # what text needs, CausalLM alone has
        self.listed = (task.labels or []) if options == "listed" else []
        self.cut_rows = self.cut_tokens = 0
        if task.kind != "regression":
            # The same room for every row: a prompt cut to fit its own answer would tell how long that answer is.
            answers = task.labels or set(task.rows("train")["answer"][:])
            max_tokens -= max(len(self.backbone.encode_answer(text)) for text in answers)
        sources = task.rows(split)
        wordings = [wording] * len(sources) if isinstance(wording, Wording) else wording
        self.rows = [
            self._encode(cast(dict[str, Any], source), own, max_tokens)
            for source, own in zip(sources, wordings, strict=True)
        ]

    def digest(self) -> str:
        """Return the SHA-256 of the rows as the task gave them, with its instruction and labels."""
        found = hashlib.sha256(json.dumps([self.task.instruction, self.task.labels]).encode())
        for row in self.rows:
            found.update(json.dumps(row.source, sort_keys=True, default=str).encode())
        return found.hexdigest()

    def _encode(self, source: dict[str, Any], wording: Wording, max_prompt_tokens: int) -> Row:
        at_gate = wording.at_gate(self.task.instruction)
        if self.task.kind == "regression":
            return Row(source, at_gate)
        head = opening(wording.in_prompt(self.task.instruction), wording.order(self.listed, source["row"]))
        prompt, cut = self.backbone.encode_prompt(head, source["context"], source["question"], max_prompt_tokens)
        self.cut_rows += cut > 0
        self.cut_tokens += cut
        return Row(source, at_gate, prompt, self.backbone.encode_answer(source["answer"]))

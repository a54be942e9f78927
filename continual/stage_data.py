"""The data of one stage as a LightningDataModule: what is trained on, and what is scored.

Rows are read and encoded once, by ``batches``; the strategy of the module may mix rows of earlier stages in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from continual.batches import Candidates, Collator, EncodedTask, LengthBatches, Row, token_batches
from continual.errors import ConfigError
from tasks import Task


class StageData(L.LightningDataModule):
    """The rows that one stage trains on, and those that its task is scored on.

    Args:
        task: The task.
        batch_size: Rows of a training batch.
        max_tokens: Longest prompt and answer together; a prompt that leaves no room for the task's longest label (or
            training answer) loses the end of its context.
        eval_batch_tokens: Padded tokens of a scoring batch.
        validation_rows: Training rows held out of training (the last ones), scored by ``validate``.
        num_workers: Processes that collate training batches.
        seed: Decides the order of the training rows.
        score_seen_labels: Score label tasks among all labels seen so far as well as among their own.
        generate_labels: Score label tasks by the text that is generated as well (exact match); takes as long again.
    """

    def __init__(
        self,
        task: Task,
        batch_size: int = 8,
        max_tokens: int = 512,
        eval_batch_tokens: int = 8192,
        validation_rows: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        score_seen_labels: bool = True,
        generate_labels: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_tokens", max_tokens, 2),
            ("eval_batch_tokens", eval_batch_tokens, 1),
            ("validation_rows", validation_rows, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name} must be at least {least}, got {value}")
        self.task, self.batch_size, self.max_tokens = task, batch_size, max_tokens
        self.eval_batch_tokens, self.validation_rows = eval_batch_tokens, validation_rows
        self.num_workers, self.seed, self.score_seen_labels = num_workers, seed, score_seen_labels
        self.generates = task.kind == "free" or (task.kind == "labels" and generate_labels)
        self.name: str = type(task).__name__
        self.index: int = 0  # its place among the stages
        self.seen_labels: list[str] = []
        self._encoded: dict[str, EncodedTask] = {}

    def prepare(self, module: Any) -> None:
        """Read and encode the task's rows for the backbone of ``module``; a second call does nothing."""
        self._module = module
        for split in ("train", "test"):
            if split not in self._encoded:
                self._encoded[split] = EncodedTask(self.task, module.backbone, split, self.max_tokens)
        if self.validation_rows >= len(self._encoded["train"].rows):
            raise ConfigError(
                f"data.validation_rows ({self.validation_rows}) leaves none of the "
                f"{len(self._encoded['train'].rows)} training rows"
            )

    def setup(self, stage: str) -> None:
        """Lightning's hook: encode with the backbone of the module that the trainer runs."""
        if self.trainer is not None and not self._encoded:
            self.prepare(self.trainer.lightning_module)

    @property
    def train_rows(self) -> list[Row]:
        """Rows to train on."""
        rows = self._encoded["train"].rows
        return rows[: len(rows) - self.validation_rows]

    @property
    def num_batches(self) -> int:
        """Training batches an epoch."""
        return -(-len(self.train_rows) // self.batch_size)

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the rows: the task's description and what was cut."""
        cut = {split: encoded.cut_rows for split, encoded in self._encoded.items()}
        return {**self.task.description(), "cut_rows": cut, "trained_rows": len(self.train_rows)}

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of rows of like length, with what the module's strategy mixes in."""
        rows = self.train_rows
        batches = LengthBatches([row.length for row in rows], self.batch_size, self.seed)
        rows, batches = self._module.strategy.mix(rows, batches)
        return DataLoader(
            rows,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=self._collator(answers=True),
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> list[DataLoader]:
        """Return the held-out training rows, to be scored; none by default."""
        rows = self._encoded["train"].rows
        held_out = rows[len(rows) - self.validation_rows :]
        return [self._scoring_loader(held_out)] if held_out else []

    def test_dataloader(self) -> DataLoader:
        """Return the task's test rows, to be scored."""
        return self._scoring_loader(self._encoded["test"].rows)

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return rows, of any stage, as one training batch."""
        return self._collator(answers=True)(rows)

    def _scoring_loader(self, rows: list[Row]) -> DataLoader:
        candidates, extra = None, 0
        if self.task.kind == "labels":
            others = self.seen_labels if self.score_seen_labels else []
            candidates = Candidates.of(self._module.backbone, self.task.labels or [], others)
            extra = len(candidates.ids_L)
        elif self.task.kind == "free":
            extra = self.max_answer_tokens
        lengths = [max(1, len(row.prompt_ids)) for row in rows]
        return DataLoader(
            rows,  # type: ignore[arg-type]
            batch_sampler=token_batches(lengths, extra, self.eval_batch_tokens),  # type: ignore[arg-type]
            collate_fn=self._collator(answers=self.task.kind == "regression", candidates=candidates),
        )

    @property
    def max_answer_tokens(self) -> int:
        """Tokens that a free answer may take: as many as the longest training answer."""
        return max(len(row.answer_ids) for row in self._encoded["train"].rows)

    def _collator(self, answers: bool, candidates: Candidates | None = None) -> Collator:
        module, encoder = self._module, self._module.instruction_encoder
        # More stages than the adapter has tasks: the last ones share its last.
        task_id = min(self.index, module.adapter.n_tasks - 1) if module.takes_task_ids else None
        return Collator(module.backbone, module.uses_instructions, answers, candidates, encoder, task_id)

"""The data of one stage as a LightningDataModule: what is trained on, and what is scored.

Rows are read and encoded once, by ``batches``; the strategy of the module may mix rows of earlier stages in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from continual.data.batch import Row, moved
from continual.data.batch_order import LengthBatches, ScoringSize, SizedBatches, scoring_size, token_batches
from continual.data.collate import Collator
from continual.data.encoding import EncodedTask
from continual.data.held_out import held_out
from continual.data.label_tree import LabelTree
from continual.data.packing import PackedCollator, check_packing
from continual.data.prompt_variants import TRAINING, Wording, opening, varied
from continual.errors import ConfigError
from continual.runtime import distributed
from tasks import Task


class RowsDataModule(L.LightningDataModule):
    """Data whose batches hold their rows as they were read, beside tensors."""

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's hook."""
        return moved(batch, device)


class StageData(RowsDataModule):
    """The rows that one stage trains on, and those that its task is scored on.

    Args:
        task: The task.
        batch_size: Rows of a training batch, over all devices.
        max_tokens: Longest prompt and answer together; a prompt that leaves no room for the task's longest label (or
            training answer) loses the end of its context.
        eval_batch_tokens: Padded tokens of a scoring batch, and of a pass that such batches share; by default 8,192 on
            a CPU, and 8,192 to 65,536 on a GPU: the narrower the backbone, the more.
        validation_rows: Training rows held out of training, scored by ``validate``: drawn by ``seed``, each label in
            its share; where rows have a group, whole groups of at most so many rows.
        num_workers: Processes that collate training batches.
        seed: Decides the order of the training rows.
        score_seen_labels: Score label tasks among all labels seen so far as well as among their own.
        generate_labels: Score label tasks by the text that is generated as well (exact match); takes as long again.
        options: Whether a label task's prompt carries a line of its labels, after the instruction; it is never cut.
        vary_prompt: Share of the training rows that are reworded, drawn by ``seed``: options shuffled,
            options dropped or the instruction left out, in equal shares as far as they apply.
        score_rows: Whether the task is scored on its test rows or, to choose settings by, on the training rows held
            out by ``validation_rows``; test rows are not even encoded then.
        packing: Lay the rows of a training batch one after the other into one sequence, each blind to the others,
            instead of padding them to the longest: the same rows, loss and gradients. There is no padding but for the
            seven tokens at most that model.compile wants. Dropout is drawn for other tokens then. Pays where lengths
            differ: attention is computed over the whole sequence, and masked. Refused where the backbone or the adapter
            would not keep rows apart.
    """

    def __init__(
        self,
        task: Task,
        batch_size: int = 8,
        max_tokens: int = 512,
        eval_batch_tokens: int | None = None,
        validation_rows: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        score_seen_labels: bool = True,
        generate_labels: bool = False,
        options: Literal["none", "listed"] = "none",
        vary_prompt: float = 0.0,
        score_rows: Literal["test", "held_out"] = "test",
        packing: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_tokens", max_tokens, 2),
            ("eval_batch_tokens", 1 if eval_batch_tokens is None else eval_batch_tokens, 1),
            ("validation_rows", validation_rows, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name} must be at least {least}, got {value}")
        if not 0 <= vary_prompt <= 1:
            raise ValueError(f"data.vary_prompt must lie in [0, 1], got {vary_prompt}")
        if score_rows == "held_out" and not validation_rows:
            raise ConfigError("data.score_rows is held_out and data.validation_rows holds out no row")
        self.task, self.batch_size, self.max_tokens = task, batch_size, max_tokens
        self.eval_batch_tokens, self.validation_rows = eval_batch_tokens, validation_rows
        self.num_workers, self.seed, self.score_seen_labels = num_workers, seed, score_seen_labels
        self.score_rows, self.vary_prompt, self.packing = score_rows, vary_prompt, packing
        self.options: Literal["none", "listed"] = options
        self.generates = task.kind == "free" or (task.kind == "labels" and generate_labels)
        self.name: str = type(task).__name__
        self.index: int = 0  # its place among the stages
        self.seen_labels: list[str] = []
        self.label_tree: Callable[..., LabelTree] = LabelTree.of
        self._encoded: dict[str, EncodedTask] = {}
        self._held_out: set[int] = set()

    def prepare(self, module: Any) -> None:
        """Read and encode the task's rows for the backbone of ``module``; a second call does nothing."""
        self.module = module
        if not self._encoded:
            if self.packing and self.index == 0:  # all stages have the same model
                check_packing(module, self._collator(answers=True), self._packed_collator())
            self._held_out = self._draw_held_out()
            self._encoded["train"] = self._encode("train", self._varied())
            if self.score_rows == "test":
                self._encoded["test"] = self._encode("test", TRAINING)

    def _draw_held_out(self) -> set[int]:
        rows = self.task.rows("train")
        if self.validation_rows >= len(rows):
            raise ConfigError(
                f"data.validation_rows ({self.validation_rows}) leaves none of the {len(rows)} training rows"
            )
        if not self.validation_rows:
            return set()
        columns = rows.select_columns([name for name in ("answer", "group", "unit") if name in rows.column_names])
        labelled = self.task.kind == "labels"
        found = columns.to_list() if columns.column_names else [{}] * len(rows)
        return held_out(found, self.validation_rows, self.seed, labelled)

    def _encode(self, split: Literal["train", "test"], wording: Wording | Sequence[Wording]) -> EncodedTask:
        return EncodedTask(self.task, self.module.backbone, split, self.max_tokens, self.options, wording)

    def _varied(self) -> list[Wording]:
        """Return each training row's wording; rows held out of training are put as test rows are."""
        num_rows = len(self.task.rows("train"))
        num_trained = num_rows - len(self._held_out)
        trained = iter(varied(self.task, self.options == "listed", num_trained, self.vary_prompt, self.seed))
        return [TRAINING if row in self._held_out else next(trained) for row in range(num_rows)]

    def worded(self, wording: Wording) -> StageData:
        """Return the same data with the rows that it is scored on reworded."""
        other, split = copy.copy(self), "test" if self.score_rows == "test" else "train"
        other._encoded = self._encoded | {split: self._encode(split, wording)}
        return other

    def opening_tokens(self, wording: Wording) -> int:
        """Return the length, in tokens, of what reworded prompts open with."""
        listed = (self.task.labels or []) if self.options == "listed" else []
        text = opening(wording.in_prompt(self.task.instruction), wording.order(listed, row=0))
        return len(self.module.backbone.encode_instruction(text))

    def setup(self, stage: str) -> None:
        """Lightning's hook: encode with the backbone of the module that the trainer runs."""
        if self.trainer is not None and not self._encoded:
            self.prepare(self.trainer.lightning_module)

    @property
    def train_rows(self) -> list[Row]:
        """Rows to train on."""
        rows = self._encoded["train"].rows
        return [row for index, row in enumerate(rows) if index not in self._held_out] if self._held_out else rows

    @property
    def held_out_rows(self) -> list[Row]:
        """Training rows that are not trained on."""
        return [row for index, row in enumerate(self._encoded["train"].rows) if index in self._held_out]

    @property
    def scored_rows(self) -> list[Row]:
        """Rows that the task is scored on."""
        return self._encoded["test"].rows if self.score_rows == "test" else self.held_out_rows

    @property
    def num_batches(self) -> int:
        """Training batches an epoch."""
        return -(-len(self.train_rows) // self.batch_size)

    def digests(self) -> dict[str, str]:
        """Return a digest of the rows of each split that is read: of their content and order, instruction included."""
        return {split: encoded.digest() for split, encoded in self._encoded.items()}

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the rows: the task's description and what was cut."""
        cut = {split: encoded.cut_rows for split, encoded in self._encoded.items()}
        facts = {**self.task.description(), "cut_rows": cut, "trained_rows": len(self.train_rows)}
        return (
            facts
            if self.score_rows == "test"
            else facts | {"test_rows": len(self.held_out_rows), "score_rows": "held_out"}
        )

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of rows of like length, with what the module's strategy mixes in."""
        rows = self.train_rows
        batches = LengthBatches([row.length for row in rows], self.batch_size, self.seed)
        rows, batches = self.module.strategy.mix(rows, batches)
        self._batches = SizedBatches(batches, [row.size for row in rows])
        share = distributed.own_rows()
        collator = self._packed_collator(share) if self.packing else self._collator(answers=True, share=share)
        return DataLoader(
            rows,  # type: ignore[arg-type]
            batch_sampler=self._batches,
            collate_fn=collator,
            num_workers=self.num_workers,
        )

    def weight_in_step(self, batch_idx: int) -> float:
        """Return what the loss of a training batch, of the epoch under way, counts in its step's; 1 without others."""
        assert self.trainer is not None
        return self._batches.weight_in_step(
            batch_idx, self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches)
        )

    def val_dataloader(self) -> list[DataLoader]:
        """Return the held-out training rows, to be scored; none by default."""
        return [self._scoring_loader(self.held_out_rows)] if self.held_out_rows else []

    def test_dataloader(self, share: slice = slice(None), skip: Collection[int] = ()) -> DataLoader:
        """Return the rows that the task is scored on, its test rows unless ``score_rows`` says otherwise.

        Args:
            share: Which of the batches to return.
            skip: Rows to leave out, by their index.
        """
        return self._scoring_loader([row for row in self.scored_rows if row.source["row"] not in skip], share)

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return rows, of any stage, as one training batch; padded, also where those of an epoch are packed."""
        return self._collator(answers=True)(rows)

    def _scoring_loader(self, rows: list[Row], share: slice = slice(None)) -> DataLoader:
        tree, extra = None, 0
        if self.task.kind == "labels":
            others = self.seen_labels if self.score_seen_labels else []
            tree = self.label_tree(self.module.backbone, self.task.labels or [], others)
            extra = len(tree.node_ids_K)
        elif self.task.kind == "free":
            extra = self.max_answer_tokens
        lengths = [max(1, len(row.prompt_ids)) for row in rows]
        batches = self.scoring_batches(lengths, extra, least=share.step or 1)
        return DataLoader(
            rows,  # type: ignore[arg-type]
            batch_sampler=batches[share],  # type: ignore[arg-type]
            collate_fn=self._collator(answers=self.task.kind == "regression", label_tree=tree),
        )

    def scoring_batches(self, lengths: Sequence[int], extra: int = 0, least: int = 1) -> list[list[int]]:
        """Return batches of rows to score, as large as the module's device likes them; see ``token_batches``."""
        return token_batches(lengths, extra, self.scoring_tokens, self.scoring_size.full, least)

    @property
    def scoring_tokens(self) -> int:
        """Padded tokens of a scoring batch at most."""
        return self.eval_batch_tokens or self.scoring_size.tokens

    @property
    def scoring_size(self) -> ScoringSize:
        """How large the module's device likes batches to score."""
        return scoring_size(self.module.device.type, self.module.hidden_width)

    @property
    def max_answer_tokens(self) -> int:
        """Tokens that a free answer may take: as many as the longest training answer."""
        return max(len(row.answer_ids) for row in self._encoded["train"].rows)

    def _collator(
        self,
        answers: bool,
        label_tree: LabelTree | None = None,
        share: slice = slice(None),
        kind: Callable[..., Collator] = Collator,
    ) -> Collator:
        module = self.module
        # More stages than the adapter has tasks: the last ones share its last.
        task_id = min(self.index, module.adapter.n_tasks - 1) if module.takes_task_ids else None
        return kind(
            module.backbone,
            module.uses_instructions,
            answers,
            label_tree,
            module.instruction_encoder,
            module.row_inputs,
            share,
            task_id,
            module.balances_experts,
        )

    def _packed_collator(self, share: slice = slice(None), multiple: int = 0) -> Collator:
        multiple = multiple or (8 if self.module.compiles else 1)  # compiled attention has other code where it is 1
        return self._collator(answers=True, share=share, kind=partial(PackedCollator, multiple=multiple))

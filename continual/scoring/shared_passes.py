"""Batches of several label tasks scored by one pass: on a GPU a small batch takes as long as a large one.

Loaders stay one a task, and so do outcomes: whichever batch of a group comes first computes the group, and the others
find their part. Batches that follow each other share a group, so that little waits for its turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from continual.data.batch import moved
from continual.data.stage_data import StageData
from continual.scoring.data_module import ScoringDataModule
from continual.scoring.evaluate import (
    chosen_stages,
    first_routes,
    log_likelihoods_of_trees,
    prompt_routes,
    ranked,
    score_batch,
)
from continual.scoring.outcome import Outcome
from tasks import Task

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule


def scoring_data(stages: Sequence[StageData]) -> ScoringDataModule:
    """Return the stages' test rows, whose batches share passes where that pays."""
    return SharedPassData(stages) if any(map(may_share, stages)) else ScoringDataModule(stages)


def may_share(data: StageData) -> bool:
    """Say whether a task's batches may share a pass with those of other label tasks, and gain by it."""
    alike = data.task.kind == "labels" and not data.generates and not data.module.strategy.scores_by_task
    return data.scoring_size.shared and alike


class SharedPassData(ScoringDataModule):
    """The same batches, where those of label tasks that follow each other and are small share a pass."""

    def test_dataloader(self) -> list[DataLoader]:
        """Return a loader for each task, in training order."""
        loaders = []
        for data, loader in zip(self.stages, super().test_dataloader(), strict=True):
            tree = cast(Any, loader).collate_fn.label_tree
            loaders.append((data.task, loader, len(tree.node_ids_K) if may_share(data) else None))
        return grouped(loaders, min(data.scoring_tokens for data in self.stages))

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's hook: a batch that shares a pass is made only now."""
        if "shared_pass" in batch:
            return batch | batch["shared_pass"].batch(batch["place"], device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def score_batch(self, module: AdaptedModule, task: Task, batch: dict[str, Any], max_answer_tokens: int) -> Outcome:
        """Answer a batch, by the pass that it shares or by one of its own."""
        if "shared_pass" in batch:
            return batch["shared_pass"].take(module, batch["place"])
        return score_batch(module, task, batch, max_answer_tokens)


class SharedPass:
    """Some batches, each of one label task; no dataclass, into which Lightning would look for tensors."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._size = (0, 0)  # columns of the longest prompt and of the largest tree of labels
        self._parts: list[tuple[Task, Callable[[], dict[str, Any]]]] = []
        self._batches: dict[int, dict[str, Any]] = {}  # of those that wait, by their place
        self._outcomes: dict[int, Outcome] = {}

    def tokens_with(self, num_rows: int, size: tuple[int, int]) -> int:
        """Return the padded tokens of the pass if so many more rows belonged to it; see ``add``."""
        return (self.num_rows + num_rows) * sum(map(max, self._size, size))

    def add(
        self, task: Task, collate: Callable[[], dict[str, Any]], num_rows: int, size: tuple[int, int]
    ) -> dict[str, Any]:
        """Take up a batch; returns what a loader yields in its place.

        Args:
            task: The rows' task.
            collate: Makes the batch.
            num_rows: Its rows.
            size: Columns of its longest prompt, and of its labels.
        """
        self._parts.append((task, collate))
        self.num_rows += num_rows
        self._size = cast(tuple[int, int], tuple(map(max, self._size, size)))
        return {"shared_pass": self, "place": len(self._parts) - 1}

    def batch(self, place: int, device: torch.device) -> dict[str, Any]:
        """Return a batch on a device; it is made once."""
        if place not in self._batches:
            _, collate = self._parts[place]
            self._batches[place] = moved(collate(), device)
        return self._batches[place]

    def take(self, module: AdaptedModule, place: int) -> Outcome:
        """Return what a batch came to, once."""
        if not self._outcomes:
            parts = [(task, self.batch(index, module.device)) for index, (task, _) in enumerate(self._parts)]
            self._outcomes = dict(enumerate(score_jointly(module, parts)))
        self._batches.pop(place, None)
        return self._outcomes.pop(place)


def grouped(loaders: Sequence[tuple[Task, DataLoader, int | None]], max_tokens: int) -> list[DataLoader]:
    """Return loaders of the same batches, where those that follow each other and are small share a ``SharedPass``.

    Args:
        loaders: A loader of each task's batches, and the columns that its labels add to a row; None where the loader
            is to stay as it is.
        max_tokens: Most padded tokens of a pass.
    """
    group = SharedPass()
    found: list[DataLoader] = []
    for task, loader, columns in loaders:
        if columns is None:
            found.append(loader)
            continue
        items = []
        for indices in cast(Any, loader.batch_sampler):
            rows = [loader.dataset[index] for index in indices]
            size = (max(len(row.prompt_ids) for row in rows), columns)
            if group.tokens_with(len(rows), size) > max_tokens:
                group = SharedPass()
            items.append(group.add(task, partial(cast(Any, loader.collate_fn), rows), len(rows), size))
        found.append(DataLoader(items, batch_size=None))  # type: ignore[arg-type]
    return found


@torch.no_grad()
def score_jointly(module: AdaptedModule, parts: Sequence[tuple[Task, dict[str, Any]]]) -> list[Outcome]:
    """Answer batches of several label tasks, as ``score_batch`` does each, from one pass over all of their rows."""
    started = time.perf_counter()
    tasks, batches = zip(*parts, strict=True)
    forward = concat_batches([batch["forward"] for batch in batches])
    trees = [(batch["label_tree"], len(batch["rows"])) for batch in batches]
    with first_routes(module) as passes:
        found = log_likelihoods_of_trees(module.model, forward, trees)
    stages, mask = chosen_stages(module), forward["attention_mask"]
    routes = prompt_routes(module, passes, mask)
    seconds_a_row = (time.perf_counter() - started) / len(mask)
    outcomes: list[Outcome] = []
    for task, batch, scores in zip(tasks, batches, found, strict=True):
        first = sum(len(outcome.rows) for outcome in outcomes)
        own, width = slice(first, first + len(scores)), batch["forward"]["attention_mask"].shape[1]
        outcome = ranked(task, batch, scores)
        outcome.seconds = seconds_a_row * len(scores)
        outcome.stages = stages and stages[own]
        if routes is not None:
            outcome.routes, outcome.prompt_mask = routes[:, own, -width:], batch["forward"]["attention_mask"]
        outcomes.append(outcome)
    return outcomes


def concat_batches(forwards: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the keywords of several batches of prompts as those of one: prompts, on the left, are padded with 0."""
    joined = {}
    for name in forwards[0]:
        tensors = [forward[name] for forward in forwards]
        if name in ("input_ids", "attention_mask", "position_ids"):
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [F.pad(tensor, (width - tensor.shape[1], 0)) for tensor in tensors]
        elif name in ("instruction_ids", "text_ids"):
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [F.pad(tensor, (0, width - tensor.shape[1]), value=-1) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined

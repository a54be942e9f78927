"""Batches of several label tasks that one pass scores: on a GPU a small batch takes as long as a large one.

Loaders stay one a task, and so do outcomes: whichever batch of a group comes first computes the group, and the others
find their part. Batches that follow each other share a group, so that little waits for its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader

from continual.data.batch import moved
from continual.scoring.evaluate import score_together
from continual.scoring.outcome import Outcome

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule
    from tasks import Task


class Together:
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
        return {"together": self, "place": len(self._parts) - 1}

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
            self._outcomes = dict(enumerate(score_together(module, parts)))
        self._batches.pop(place, None)
        return self._outcomes.pop(place)


def grouped(loaders: Sequence[tuple[Task, DataLoader, int | None]], max_tokens: int) -> list[DataLoader]:
    """Return loaders of the same batches, where those that follow each other and are small share a ``Together``.

    Args:
        loaders: A loader of each task's batches, and the columns that its labels add to a row; None where the loader
            is to stay as it is.
        max_tokens: Most padded tokens of a pass.
    """
    group = Together()
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
                group = Together()
            items.append(group.add(task, partial(cast(Any, loader.collate_fn), rows), len(rows), size))
        found.append(DataLoader(items, batch_size=None))  # type: ignore[arg-type]
    return found

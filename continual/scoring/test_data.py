"""The test rows of several stages as one data module: a loader for each task."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch

from continual.data.stage_data import RowsDataModule, StageData
from continual.runtime import distributed
from continual.scoring.shared_passes import grouped


class AllTasks(RowsDataModule):
    """The test rows of every stage, one loader each; of several processes each gets its share of the batches.

    Args:
        stages: The stages' data.
        known: Rows to leave out, by task.
    """

    def __init__(self, stages: list[StageData], known: Mapping[str, Collection[int]] | None = None) -> None:
        super().__init__()
        self.stages, self.known = stages, known or {}

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's hook: a batch that shares a pass with other tasks' is made only now (``scored_together``)."""
        if "together" in batch:
            return batch | batch["together"].batch(batch["place"], device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def test_dataloader(self) -> list[Any]:
        """Return a loader for each task, in training order."""
        loaders = []
        for data in self.stages:
            loader = data.test_dataloader(distributed.own_batches(data._module), self.known.get(data.name, ()))
            columns = len(cast(Any, loader).collate_fn.candidates.node_ids_K) if data.scored_with_others else None
            loaders.append((data.task, loader, columns))
        return grouped(loaders, min(data.scoring_tokens for data in self.stages))

"""The test rows of several stages as one data module: a loader for each task."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch.utils.data import DataLoader

from continual.data.stage_data import RowsDataModule, StageData
from continual.runtime import distributed


class ScoringDataModule(RowsDataModule):
    """The test rows of every stage, one loader each; of several processes each gets its share of the batches.

    Args:
        stages: The stages' data.

    Attributes:
        skip: Rows to leave out, by task and index.
    """

    def __init__(self, stages: Sequence[StageData]) -> None:
        super().__init__()
        self.stages = list(stages)
        self.skip: Mapping[str, Collection[int]] = {}

    def test_dataloader(self) -> list[DataLoader]:
        """Return a loader for each task, in training order."""
        return [
            data.test_dataloader(distributed.own_batches(data.module), self.skip.get(data.name, ()))
            for data in self.stages
        ]

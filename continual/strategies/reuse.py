"""Reuse of a bank: trained on the first stages together, then frozen under new A, B and queries on each later one.

The paper's claim (arXiv 2605.08423) that atoms are reusable updates, put to the test: if they are, a later task with
few rows needs only its own way into and out of the bank, and its own way of asking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler

from continual.adapters import QueryableLoraConfig
from continual.data.batch_order import LengthBatches
from continual.errors import ConfigError
from continual.strategies.library import PerTask

if TYPE_CHECKING:
    from continual.data.batch import Row
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule

BANK_TENSORS = ("atoms", "keys", "prior_map", "prior_keys")
"""What a later stage takes over and does not train: the atoms, and all that they are addressed by."""


class ReuseBank(PerTask):
    """Trains one adapter on the rows of all source stages, then one a later stage, on the sources' frozen bank.

    Of a later stage, A, B, the query maps and the summary's queries are drawn anew and trained. Each task is answered
    by its own stage's adapter, the sources' by the one that they share; sources before the last are not scored.

    Stores: every adapter.

    Args:
        source_stages: How many stages, from the first, train the bank.
        reuse: Whether later stages take the bank over. Without, each starts a fresh adapter, of any PEFT method, and
            trains all of it: the control.
    """

    needs_rows = True

    def __init__(self, source_stages: int, reuse: bool = True) -> None:
        super().__init__()
        if source_stages < 1:
            raise ValueError(f"model.strategy.source_stages must be at least 1, got {source_stages}")
        self.source_stages, self.reuse = source_stages, reuse

    def check(self, module: AdaptedModule, stages: Sequence[StageData]) -> None:
        """Note which adapter answers which task; refuse an adapter without a bank, and sources with nothing behind."""
        if self.source_stages >= len(stages):
            raise ConfigError(
                f"model.strategy: ReuseBank has {self.source_stages} source stages of {len(stages)}: none is left to "
                "reuse their bank"
            )
        if self.reuse and not isinstance(module.adapter, QueryableLoraConfig):
            raise ConfigError(
                f"model.strategy: ReuseBank needs continual.adapters.QueryableLoraConfig, and "
                f"{type(module.adapter).__name__} has no bank to reuse: set reuse to false"
            )
        self._stages = list(stages)
        self._trained = {data.name: max(0, index + 1 - self.source_stages) for index, data in enumerate(stages)}

    def skips(self, stage: int, num_stages: int) -> bool:
        """Say whether ``stage`` trains nothing: the sources are trained together, at the last of them."""
        return stage < self.source_stages

    def begin_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Start a fresh adapter, on the sources' bank where there is one."""
        super().begin_stage(module, data, stage)
        if stage > self.source_stages and self.reuse:
            assert module.model is not None
            source = self.adapters[0]
            with torch.no_grad():
                for name, parameter in module.model.named_parameters():
                    if "queryable_bank" in name and name.rpartition(".")[2] in BANK_TENSORS:
                        parameter.copy_(source[name])
                        parameter.requires_grad_(False)

    def mix(self, rows: list[Row], batches: Sampler[list[int]]) -> tuple[list[Row], Sampler[list[int]]]:
        """Return the rows of all sources at the last of them."""
        if self.stage != self.source_stages:
            return rows, batches
        rows = [row for data in self._stages[: self.source_stages] for row in data.train_rows]
        return rows, LengthBatches([row.length for row in rows], self.data.batch_size, self.data.seed)

"""While tasks are scored: which atoms each task uses, and how evenly.

Usage U[s, j, b, m] is the mean of alpha over the prompt's own tokens of task j's test rows, in block b, after stage s.
Everything is computed for each block first; a value with block -1 is the mean of the blocks' values. Rows of each task
are split into two halves by their index, and the distance between the halves' usages is the null beside which every
distance is read: two samples of one task are never 0 apart. Distances themselves are derived from what is written here
(``analysis.runs.distances``).

Shapes: N blocks, M atoms.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from continual.interfaces import Recorder, Rows, StageContext
from continual.measures.distances import entropy_nats
from continual.runtime import distributed
from continual.scoring.outcome import Outcome, RouteSums


class RouteRecorder(Recorder):
    """Turns the routes of outcomes into rows for the tables ``routing`` and ``usage_halves``.

    Attributes:
        usage: Usage of each task that was scored after the stage, (N, M).
    """

    def __init__(self) -> None:
        self.usage: dict[str, np.ndarray] = {}
        self._tables: dict[str, Rows] = {}

    def begin(self, context: StageContext) -> None:
        """Begin a stage."""
        self.keys, self.tasks = context.keys, list(context.scored)
        self.usage, self._tables = {}, {"routing": [], "usage_halves": []}
        self._sums: dict[str, _TaskRoutes] = {}

    def tables(self) -> dict[str, Rows]:
        """Return the rows of the tables, once: they are the largest, with each atom of each block."""
        tables, self._tables = self._tables, {}
        return tables

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch's routes to its task's sums."""
        outcome: Outcome = outputs
        if (sums := outcome.route_sums) is not None:
            self._sums.setdefault(self.tasks[dataloader_idx].name, _TaskRoutes()).add(sums)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute usage and entropies from the routes of all processes."""
        found = distributed.of_batches(self._sums, pl_module)  # type: ignore[arg-type]
        own = {data.name: [sums[data.name] for sums in found if data.name in sums] for data in self.tasks}
        for name, each in own.items():
            if each:
                self._add(name, sum(each[1:], start=each[0]))
        self._sums = {}

    def _add(self, task: str, sums: _TaskRoutes) -> None:
        usage = self.usage[task] = sums.usage()
        for block, atom in np.ndindex(*usage.shape):
            self._row(task, "usage", float(usage[block, atom]), sums.num_tokens, block, atom)
        for metric, values in (
            ("usage_entropy_nats", entropy_nats(usage)),
            ("token_entropy_nats", sums.token_entropy()),
        ):
            for block, value in [*enumerate(values.tolist()), (-1, float(np.mean(values)))]:
                self._row(task, metric, value, sums.num_tokens, block, -1)
        for half, (values, count) in enumerate(zip(sums.halves(), sums.tokens.tolist(), strict=True)):
            for block, atom in np.ndindex(*values.shape):
                place = {"half": half, "block": block, "atom": atom}
                measured = {"value": float(values[block, atom]), "count": int(count)}
                self._tables["usage_halves"].append(self.keys | {"task": task} | place | measured)

    def _row(self, task: str, metric: str, value: float, count: int, block: int, atom: int) -> None:
        measured = {"metric": metric, "direction": "none", "value": float(value), "count": count}
        self._tables["routing"].append(self.keys | {"task": task, "block": block, "atom": atom} | measured)


class _TaskRoutes:
    """Sums of one task's routing weights over tokens, for each half of its rows."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None  # (2, N, M)
        self.entropy: Tensor | None = None  # (N,)
        self.tokens = torch.zeros(2, dtype=torch.float64)

    def add(self, sums: RouteSums) -> None:
        """Add rows."""
        half = torch.tensor([_half_of(row) for row in sums.rows])
        sums = sums.widened(0 if self.weights is None else self.num_atoms)
        weights_BNM, entropy = sums.weights_NBM.transpose(0, 1), sums.entropy_NB.sum(dim=1)
        if self.weights is None:
            self.weights = weights_BNM.new_zeros(2, *weights_BNM.shape[1:])
        self.weights.index_add_(0, half, weights_BNM)
        self.entropy = entropy if self.entropy is None else self.entropy + entropy
        self.tokens.index_add_(0, half, sums.tokens_B)

    def __add__(self, other: _TaskRoutes) -> _TaskRoutes:
        """Return the sums over both, neither of them empty."""
        total = _TaskRoutes()
        for name, tensor in vars(self).items():
            setattr(total, name, tensor + getattr(other, name))
        return total

    @property
    def num_atoms(self) -> int:
        """M; something has been added."""
        assert self.weights is not None
        return self.weights.shape[2]

    @property
    def num_tokens(self) -> int:
        """Tokens counted, both halves together."""
        return int(self.tokens.sum())

    def usage(self) -> np.ndarray:
        """Return the usage of all rows, (N, M)."""
        assert self.weights is not None
        return (self.weights.sum(dim=0) / self.tokens.sum()).numpy()

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the usage of each half, (N, M); NaN where a half has no row."""
        assert self.weights is not None
        first, second = (self.weights / self.tokens.view(2, 1, 1)).numpy()
        return first, second

    def token_entropy(self) -> np.ndarray:
        """Return the mean entropy of a token's routes in each block, (N,), in nats."""
        assert self.entropy is not None
        return (self.entropy / self.tokens.sum()).numpy()


def _half_of(row: int) -> int:
    """Return 0 or 1 for a row, as good as at random and always the same: the golden ratio spreads indices evenly."""
    return int(math.modf(row * 0.6180339887498949)[0] < 0.5)

"""While tasks are scored: which atoms each task uses, how far apart tasks are, and how far routes moved.

Usage U[s, j, b, m] is the mean of alpha over the prompt's own tokens of task j's test rows, in block b, after stage s.
Everything is computed for each block first; a value with block -1 is the mean of the blocks' values. Rows of each task
are split into two halves by their index, and the distance between the halves' usages is the null beside which every
distance is read: two samples of one task are never 0 apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.routing import entropy_nats, js_divergence, kl_divergence, total_variation
from continual.runtime import distributed
from continual.scoring.outcome import Outcome


class RouteRecorder(L.Callback):
    """Turns the routes of outcomes into rows for the tables ``routing``, ``separation`` and ``drift``.

    Attributes:
        usage: Stage -> task -> usage of each block, (N, M): all that drift is measured against. Of stages before the
            last one, that is what each task's own stage left; with every other task's it would grow with the cube of
            their number, where a bank grows.
        computed: Task -> sums of the batches that were computed, of all processes; empty unless asked for.
    """

    def __init__(self) -> None:
        self.usage: dict[int, dict[str, np.ndarray]] = {}
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.computed: dict[str, list[RouteSums]] = {}

    def restore(self, routing: pd.DataFrame) -> None:
        """Take the usages of finished stages from the table ``routing``."""
        rows = routing[routing["metric"] == "usage"]
        for key, group in rows.groupby(["stage", "task"]):
            stage, task = cast(tuple[int, str], key)
            table = group.pivot(index="block", columns="atom", values="value").sort_index().sort_index(axis=1)
            self.usage.setdefault(int(stage), {})[task] = table.to_numpy()

    def start(
        self,
        keys: dict[str, Any],
        tasks: list[Any],
        trained_stage: dict[str, int],
        known: Mapping[str, RouteSums] | None = None,
    ) -> None:
        """Begin scoring ``tasks``.

        Args:
            keys: The columns run, seed and stage.
            tasks: StageData, in loader order.
            trained_stage: After which stage each task was learnt.
            known: Sums of rows that are not computed, by task; with it, even empty, sums of the others are kept by row.
        """
        self.keys, self.tasks, self.trained_stage = keys, tasks, trained_stage
        self.tables = {"routing": [], "separation": [], "drift": []}
        self._sums: dict[str, _TaskRoutes] = {}
        self._known, self._own, self.computed = known, dict[str, list[RouteSums]](), {}
        for stage in [stage for stage in self.usage if stage < keys["stage"] - 1]:
            own = {name: usage for name, usage in self.usage.pop(stage).items() if trained_stage.get(name) == stage}
            self.usage |= {stage: own} if own else {}

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
        if outcome.routes is None or outcome.prompt_mask is None:
            return
        name = self.tasks[dataloader_idx].name
        sums = RouteSums.of(outcome.routes, outcome.prompt_mask, outcome.rows)
        self._sums.setdefault(name, _TaskRoutes()).add(sums)
        if self._known is not None:
            self._own.setdefault(name, []).append(sums)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute usage, entropies, separation and drift from the routes of all processes."""
        found = distributed.of_batches(self._sums, pl_module)  # type: ignore[arg-type]
        own = {data.name: [sums[data.name] for sums in found if data.name in sums] for data in self.tasks}
        self._sums = {name: sum(each[1:], start=each[0]) for name, each in own.items() if each}
        if not self._sums:
            return
        if self._known is not None:
            for found in distributed.of_batches(self._own, pl_module):  # type: ignore[arg-type]
                for name, sums in found.items():
                    self.computed.setdefault(name, []).extend(sums)
            for name, sums in self._known.items():
                self._sums[name].add(sums.widened(self._sums[name].num_atoms))
        stage = self.keys["stage"]
        self.usage[stage] = {name: sums.usage() for name, sums in self._sums.items()}
        for name, sums in self._sums.items():
            self._add_usage(name, sums)
            self._add_drift(name, sums.num_tokens)
        self._add_separation()
        self._sums = {}

    def _add_usage(self, task: str, sums: _TaskRoutes) -> None:
        usage, count = self.usage[self.keys["stage"]][task], sums.num_tokens
        for block, atom in np.ndindex(*usage.shape):
            self._row("routing", task, "usage", float(usage[block, atom]), count, block=block, atom=atom)
        for metric, values in (
            ("usage_entropy_nats", entropy_nats(usage)),
            ("token_entropy_nats", sums.token_entropy()),
        ):
            for block, value in _with_mean(values):
                self._row("routing", task, metric, value, count, block=block, atom=-1)

    def _add_separation(self) -> None:
        usage = self.usage[self.keys["stage"]]
        for task in usage:
            for other in usage:
                if task == other:
                    first, second = self._sums[task].halves()
                    names = ("js_split_half", "kl_split_half")
                else:
                    first, second, names = usage[task], usage[other], ("js", "kl")
                for metric, distance in zip(names, (js_divergence, kl_divergence), strict=True):
                    for block, value in _with_mean(distance(first, second)):
                        count = self._sums[task].num_tokens
                        self._row("separation", task, metric, value, count, other=other, block=block)

    def _add_drift(self, task: str, count: int) -> None:
        stage, trained = self.keys["stage"], self.trained_stage[task]
        references = {"previous": stage - 1} | ({"trained": trained} if trained < stage else {})
        for reference, earlier in references.items():
            if task not in self.usage.get(earlier, {}):
                continue
            now, then = _same_atoms(self.usage[stage][task], self.usage[earlier][task])
            place = {"reference": reference, "reference_stage": earlier}
            for metric, distance in (("js", js_divergence), ("kl", kl_divergence), ("tv", total_variation)):
                for block, value in _with_mean(distance(now, then)):
                    self._row("drift", task, metric, value, count, block=block, **place)

    def _row(self, table: str, task: str, metric: str, value: float, count: int, **columns: Any) -> None:
        measured = {"metric": metric, "direction": "none", "value": float(value), "count": count}
        self.tables[table].append(self.keys | {"task": task} | columns | measured)


@dataclass
class RouteSums:
    """Routes of rows, summed over the tokens of each row's prompt; in float64, on the CPU.

    Attributes:
        rows: Index of each row within its split.
        weights_NBM: Routing weights of each block.
        entropy_NB: Entropies in nats.
        tokens_B: Tokens.
    """

    rows: list[int]
    weights_NBM: Tensor
    entropy_NB: Tensor
    tokens_B: Tensor

    @classmethod
    def of(cls, routes_NBPM: Tensor, mask_BP: Tensor, rows: Iterable[int]) -> RouteSums:
        """Sum a batch's routes over the tokens that ``mask_BP`` marks; all blocks at once, since each call costs."""
        routes = routes_NBPM.float().masked_fill(~mask_BP.bool().unsqueeze(-1), 0.0)
        entropy = -torch.xlogy(routes, routes).sum(dim=(2, 3))
        tokens = mask_BP.sum(dim=1)
        return cls(list(rows), routes.sum(dim=2).cpu().double(), entropy.cpu().double(), tokens.cpu().double())

    def widened(self, num_atoms: int) -> RouteSums:
        """Return the same over ``num_atoms`` atoms: a bank has grown by some that nothing went to."""
        weights = F.pad(self.weights_NBM, (0, num_atoms - self.weights_NBM.shape[2]))
        return replace(self, weights_NBM=weights)


class _TaskRoutes:
    """Sums of one task's routing weights over tokens, for each half of its rows."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None  # (2, N, M)
        self.entropy: Tensor | None = None  # (N,)
        self.tokens = torch.zeros(2, dtype=torch.float64)

    def add(self, sums: RouteSums) -> None:
        """Add rows."""
        half = torch.tensor([_half_of(row) for row in sums.rows])
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


def _same_atoms(now: np.ndarray, then: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two usages, (N, M), over the same atoms: those that were not there yet were used by nobody."""
    num_atoms = max(now.shape[1], then.shape[1])
    now, then = (np.pad(usage, ((0, 0), (0, num_atoms - usage.shape[1]))) for usage in (now, then))
    return now, then


def _half_of(row: int) -> int:
    """Return 0 or 1 for a row, as good as at random and always the same: the golden ratio spreads indices evenly."""
    return int(math.modf(row * 0.6180339887498949)[0] < 0.5)


def _with_mean(values: np.ndarray) -> list[tuple[int, float]]:
    return [*enumerate(values.tolist()), (-1, float(np.mean(values)))]

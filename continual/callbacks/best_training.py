"""During training: the adapter of the epoch with the best training accuracy, the checkpoint that the paper selects.

Test rows have no say in it. An epoch's training accuracy is the share of the stage's training rows whose every answer
token, end mark included, is the most likely one given those before it; of a regression, the mean squared error counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from continual.callbacks.scores import ScoreRecorder
from continual.data.batch import IGNORED, moved
from continual.errors import ConfigError
from continual.interfaces import AdaptedModule, Recorder, Rows, StageContext
from continual.runtime import distributed
from continual.runtime.parameters import adapter_tensors, evaluating, forward_context
from continual.strategies import Sequential
from continual.strategies.library import AdapterLibrary

if TYPE_CHECKING:
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule

SUFFIX = "_best_training"
"""What stands behind the name of a metric that the best checkpoint was scored by."""


class BestTraining(Recorder):
    """Keeps, through a stage, the adapter of the epoch with the best training accuracy; the first of equal ones."""

    def check(self, module: AdaptedModule, stages: Sequence[Any]) -> None:
        """Raise ConfigError where the strategy changes the adapter between training and scoring."""
        strategy = module.strategy
        if not (type(strategy) is Sequential or isinstance(strategy, AdapterLibrary)):
            raise ConfigError(
                f"best_checkpoint: {type(strategy).__name__} keeps more of a stage than its adapter: only Sequential "
                "and strategies with an adapter a task can be scored by another epoch's"
            )

    def begin(self, context: StageContext) -> None:
        """Begin a stage."""
        self._context, self.data = context, context.data
        self.accuracies: list[float] = []
        self.tensors: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the epoch's adapter, and keep it if it is the best so far."""
        module: AdaptedModule = pl_module  # type: ignore[assignment]
        value = training_accuracy(module, self.data)
        if value > max(self.accuracies, default=-float("inf")):
            self.tensors = {name: tensor.cpu().clone() for name, tensor in adapter_tensors(module).items()}
        self.accuracies.append(value)

    @property
    def is_last(self) -> bool:
        """Whether the best epoch is the last one, so that the stage's own scores are its."""
        return self.accuracies.index(max(self.accuracies)) == len(self.accuracies) - 1

    @contextmanager
    def in_place(self, module: AdaptedModule) -> Iterator[None]:
        """Answer by the best adapter inside the ``with``."""
        own = {name: tensor.clone() for name, tensor in adapter_tensors(module).items()}
        _put(module, self.tensors)
        try:
            yield
        finally:
            _put(module, own)

    def tables(self) -> dict[str, Rows]:
        """Return rows of the table ``scores``: the best checkpoint's, and the training accuracy that chose it."""
        if not self.accuracies:
            return {}
        if self.is_last:
            scores = next(recorder for recorder in self._context.recorders if isinstance(recorder, ScoreRecorder)).rows
            return {"scores": self._rows([row for row in scores if row["task"] == self.data.name])}
        with self.in_place(self._context.module):
            return {"scores": self._rows(self._context.score([self.data])[0])}

    def _rows(self, scores: Rows) -> Rows:
        found = [row | {"metric": f"{row['metric']}{SUFFIX}"} for row in scores]
        regression = self.data.task.kind == "regression"
        sign, name, direction = (-1, "training_mse", "lower") if regression else (1, "training_accuracy", "higher")
        for value, suffix in ((self.accuracies[-1], ""), (max(self.accuracies), SUFFIX)):
            measured = {"metric": name + suffix, "direction": direction, "value": sign * value}
            found.append(
                self._context.keys | {"task": self.data.name} | measured | {"count": len(self.data.train_rows)}
            )
        return found


@torch.no_grad()
def training_accuracy(module: AdaptedModule, data: StageData) -> float:
    """Return the share of ``data``'s training rows answered right (see the module's docstring), or minus the MSE."""
    rows, total = data.train_rows, 0.0
    with evaluating(module), forward_context(module):
        batches = data.scoring_batches([row.length for row in rows])
        for batch in batches[distributed.own_batches(module)]:
            padded = moved(data.collate([rows[index] for index in batch]), module.device)
            outputs, labels = module.outputs(padded), padded["labels"]
            if module.backbone.kind == "regressor":
                total -= (outputs - labels).square().double().sum().item()
            else:
                total += ((outputs.argmax(dim=-1) == labels) | (labels == IGNORED)).all(dim=1).sum().item()
    return sum(distributed.of_batches(total, module)) / len(rows)


@torch.no_grad()
def _put(module: AdaptedModule, tensors: dict[str, Tensor]) -> None:
    for name, tensor in adapter_tensors(module).items():
        tensor.copy_(tensors[name])

"""While tasks are scored: every answer, and the scores they come to."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

import lightning as L
import torch
from torchmetrics import MeanMetric, MeanSquaredError, Metric, R2Score

from continual.interfaces import Recorder, Rows, StageContext
from continual.runtime import distributed
from continual.scoring.outcome import Outcome


class ScoreRecorder(Recorder):
    """Turns outcomes into rows for the tables ``scores`` and ``answers``.

    Attributes:
        rows: Of the table ``scores``.
        answers: Of the table ``answers``.
        chosen: Task -> how many rows a growing bank's gate sent to each stage; empty without a gate.
    """

    def __init__(self) -> None:
        self.rows: Rows = []
        self.answers: Rows = []

    def begin(self, context: StageContext) -> None:
        """Begin a stage."""
        self.keys, self.tasks = context.keys, list(context.scored)
        self.rows, self.answers = [], []
        self._outcomes: list[list[tuple[Outcome, list[Any]]]] = [[] for _ in self.tasks]
        self.chosen: dict[str, Counter[str]] = {}
        self._milliseconds: list[float] = []

    @property
    def found(self) -> tuple[Rows, Rows]:
        """The rows of the tables ``scores`` and ``answers``."""
        return self.rows, self.answers

    def tables(self) -> dict[str, Rows]:
        """Return scores and answers."""
        return {"scores": self.rows, "answers": self.answers}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in a batch's outcome."""
        outcome: Outcome = outputs
        if outcome.seconds is not None:
            self._milliseconds.append(1e3 * outcome.seconds / len(outcome.rows))
        self._outcomes[dataloader_idx].append((outcome.without_tensors(), batch["rows"]))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the scores from the answers of all processes."""
        for data, own in zip(self.tasks, self._outcomes, strict=True):
            metrics, given, count = _metrics_of(data), ([], []), 0
            for outcome, sources in distributed.in_order(own, pl_module):  # type: ignore[arg-type]
                self._take_in(data, metrics, outcome)
                given[0].extend(sources)
                given[1].extend(outcome.predictions)
                count += len(outcome.rows)
            for name, metric in metrics.items():
                direction = "higher" if metric.higher_is_better or isinstance(metric, MeanMetric) else "lower"
                value = {"metric": name, "direction": direction, "value": metric.compute().item(), "count": count}
                self.rows.append(self.keys | {"task": data.name} | value)
            for name, score in data.task.further_scores(*given).items():
                value = {"metric": name, "direction": "higher", "value": score, "count": count}
                self.rows.append(self.keys | {"task": data.name} | value)
        for name, chosen in self.chosen.items():
            for metric, stage in (("routed_home", name), ("abstained", "")):
                value = {"metric": metric, "direction": "none", "value": chosen[stage] / chosen.total()}
                self.rows.append(self.keys | {"task": name} | value | {"count": chosen.total()})
        self.answers.sort(key=lambda answer: (answer["task"], answer["row"]))

    def _take_in(self, data: Any, metrics: dict[str, Metric], outcome: Outcome) -> None:
        values = torch.tensor(outcome.values, dtype=torch.float64)
        for name, metric in metrics.items():
            if data.task.kind == "regression":
                predicted = torch.tensor([float(text) for text in outcome.predictions], dtype=torch.float64)
                metric.update(predicted, torch.tensor(outcome.targets, dtype=torch.float64))
            elif name == "accuracy_seen":
                metric.update(values if outcome.seen_values is None else torch.tensor(outcome.seen_values))
            elif name == "exact_match":
                metric.update(torch.tensor(outcome.generated_values))
            else:
                metric.update(values)
        if outcome.stages is not None:  # where a growing bank's gate sent the rows
            self.chosen.setdefault(data.name, Counter()).update(outcome.stages)
        for row, value, prediction in zip(outcome.rows, outcome.values, outcome.predictions, strict=True):
            self.answers.append(self.keys | {"task": data.name, "row": row, "value": value, "prediction": prediction})

    def milliseconds_a_row(self) -> float | None:
        """Return what answering a row took, the median over batches (the first ones warm up); None where none was."""
        return statistics.median(self._milliseconds) if self._milliseconds else None

    def headline(self) -> dict[str, float]:
        """Return each task's headline score, by task name."""
        wanted = {data.name: data.task.metric for data in self.tasks}
        return {row["task"]: row["value"] for row in self.rows if row["metric"] == wanted[row["task"]]}


def _metrics_of(data: Any) -> dict[str, Metric]:
    """Return a task's metrics, by name; each process has the answers of all, so that none asks the others."""
    task: Any = data.task
    alone: dict[str, Any] = {"sync_on_compute": False}
    if task.kind == "regression":
        return {
            "r2": R2Score(**alone).set_dtype(torch.float64),
            "rmse": MeanSquaredError(squared=False, **alone).set_dtype(torch.float64),
        }
    names = [task.metric, *(["accuracy_seen"] if task.kind == "labels" else [])]
    names += ["exact_match"] if task.kind == "labels" and data.generates else []
    return {name: MeanMetric(**alone).set_dtype(torch.float64) for name in names}

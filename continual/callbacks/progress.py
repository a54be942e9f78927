"""What a person sees while a run goes on: its plan, a bar for each stage, a row of scores after each."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from tqdm import tqdm


class StageProgress(L.Callback):
    """One bar while a stage trains (loss, steps a second, time left) and one while all tasks are scored.

    Where standard error is no terminal, a line now and then takes the bar's place.
    """

    def __init__(self) -> None:
        self.title = ""
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the training bar."""
        self._open(trainer, "train", int(trainer.estimated_stepping_batches), "step")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance; read the loss only when the bar is about to be drawn, so that a GPU is not made to wait."""
        assert self._bar is not None
        if self._bar.update(trainer.global_step - self._bar.n):
            loss = outputs["loss"].item() * trainer.accumulate_grad_batches  # Lightning divided it
            self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that training is over: what a method does then (a growing bank prunes its slice, say) can take longer."""
        assert self._bar is not None
        self._bar.set_description(f"{self.title}: end of stage")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the scoring bar."""
        self._open(trainer, "score", sum(int(batches) for batches in trainer.num_test_batches), "batch")

    def on_test_batch_end(self, *_: Any) -> None:
        """Advance."""
        assert self._bar is not None
        self._bar.update()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar before the error's line is printed."""
        self._close()

    def _open(self, trainer: L.Trainer, doing: str, total: int, unit: str) -> None:
        self._bar = tqdm(
            total=total,
            desc=f"{self.title}: {doing}",
            unit=unit,
            leave=False,
            mininterval=0.2 if sys.stderr.isatty() else 20.0,
            dynamic_ncols=True,
            disable=not trainer.is_global_zero,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def plan(experiment: Any, stages: list[Any], counts: dict[str, int], run_dir: Any) -> str:
    """Return the run's plan as text: stages, rows, steps and parameters."""
    share = counts["trainable_parameters"] / counts["total_parameters"]
    width = max(24, *(len(stage.name) for stage, _ in stages))
    lines = [
        f"Run {run_dir}",
        f"  {experiment.model.backbone.name} with {type(experiment.model.adapter).__name__}: "
        f"{counts['trainable_parameters']:,} of {counts['total_parameters']:,} parameters train ({share:.2%})",
        f"  {'stage':>5}  {'task':<{width}} {'metric':<9} {'train rows':>10} {'test rows':>9} {'steps':>6}",
    ]
    for index, (stage, data) in enumerate(stages, start=1):
        steps = _steps(experiment, stage, data)
        facts = data.facts()
        lines.append(
            f"  {index:>5}  {stage.name:<{width}} {data.task.metric:<9} {len(data.train_rows):>10} "
            f"{facts['test_rows']:>9} {steps:>6}"
        )
    return "\n".join(lines)


def _steps(experiment: Any, stage: Any, data: Any) -> int:
    """Return how many optimizer steps a stage takes at most: ``max_time`` may end it before."""
    limit, batches = experiment.trainer.get("limit_train_batches"), data.num_batches
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = -(-batches // experiment.trainer.get("accumulate_grad_batches", 1)) * experiment.epochs(stage)
    most = experiment.trainer.get("max_steps", -1)
    return steps if most < 0 else min(steps, most)


class ScoreTable:
    """Prints one row of scores after each stage, under a heading of task names."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.widths = [max(10, len(name)) for name in names]
        self.has_heading = False

    def show(self, title: str, scores: dict[str, float]) -> None:
        """Print the headline score of every task; the one in brackets was just trained."""
        if not self.has_heading:
            heading = "  ".join(name.rjust(width) for name, width in zip(self.names, self.widths, strict=True))
            print(f"{'scores after':<28}  {heading}", flush=True)
            self.has_heading = True
        cells = []
        for name, width in zip(self.names, self.widths, strict=True):
            score = scores.get(name)  # None: not scored after this stage
            cell = (
                "-" if score is None else f"{score:.3f}" if abs(score) < 100 else f"{score:.1e}"
            )  # an R2 has no floor
            trained = name == title and score is not None
            cells.append((f"[{cell}]" if trained else f"{cell} ").rjust(width))
        print(f"{title[:28]:<28}  {'  '.join(cells)}", flush=True)

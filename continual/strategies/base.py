"""What a strategy against forgetting may do, and when: the hooks of one stage, in the order that they are called.

    check           once, before anything is written: refuse what the method cannot serve
    prepare         once: freeze what the method never trains
    load            on resuming: take up what ``save`` left after the last finished stage, by ``read``
    begin_stage     the stage's seed is set, the model is on the CPU, the optimizer does not exist yet
    skips           whether a stage trains nothing at all
    mix             the rows and batches to train on
    on_train_start  the model is on its device (Lightning's own hook)
    penalty         each step: what is added to the loss; ``has_penalty`` says whether there is any
    on_before_optimizer_step   each step (Lightning's own): the gradients may be changed
    on_train_end    (Lightning's own) calls ``end_stage``
    end_stage       the stage is trained, the model is still on its device
    answering_parts, answering_stages   before the stage is scored: which parts answer a row for good, so that answers
                    are cached
    on_test_start, on_test_batch_start, on_test_end   around scoring (Lightning's own): put in what answers a task;
                    ``scores_by_task`` says whether that differs from task to task
    begin_untasked  text of no task is scored next
    save_adapter, load_adapter   the adapter's folder; a PEFT folder unless a method needs another
    save            the stage is scored; what ``write`` writes is all that the next stage may know of this one
    stored_bytes, stored_parameters, serving_parameters   what it costs to keep and to serve, for the report

Everything random is drawn from the stage's own seed (``data.seed``), so that no random state has to be kept.

Shapes: B rows, L label columns (the first answer's column and all after it), V vocabulary, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
from torch import Tensor
from torch.utils.data import Sampler

from continual.data.batch import moved
from continual.errors import RunError, one_line
from continual.runtime.parameters import forward_context, trainable
from continual.storage.files import atomic_directory, size_bytes

if TYPE_CHECKING:
    from continual.data.batch import Row
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule


class Strategy(L.Callback):
    """What keeps earlier tasks while one adapter learns the next. By itself it does nothing.

    A constructor keeps its arguments and raises ValueError for those out of range.

    Attributes:
        needs_rows: Whether training rows of earlier stages are kept.
        reads_instructions: Whether the method reads a row's instruction by itself, apart from the prompt.
        data: The rows of the stage under way.
        stage: Number of the stage under way, from 1; 0 outside of a sequence (one stage by hand has no past).
    """

    needs_rows: ClassVar[bool] = False
    reads_instructions: ClassVar[bool] = False
    data: StageData
    stage: int = 0
    _stored_bytes: int = 0

    # -- what a method fills in ---------------------------------------------------------------------------------------

    def check(self, module: AdaptedModule, stages: Sequence[StageData]) -> None:
        """Raise ConfigError where the method cannot serve the adapter, the backbone or a task."""

    def prepare(self, module: AdaptedModule) -> None:
        """Freeze what the method never trains."""

    def begin_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Get ready for stage number ``stage`` (from 1) on ``data``."""

    def skips(self, stage: int, num_stages: int) -> bool:
        """Say whether ``stage``, of 1 to ``num_stages``, is neither trained nor scored."""
        return False

    def mix(self, rows: list[Row], batches: Sampler[list[int]]) -> tuple[list[Row], Sampler[list[int]]]:
        """Return the rows to train on and the batches of their indices."""
        return rows, batches

    def penalty(self, module: AdaptedModule, batch: dict[str, Any], outputs: Tensor) -> Tensor | None:
        """Return what to add to a batch's loss; None for nothing.

        Where a step takes several batches, or processes, the sum counts for each by its share of the step's answer
        tokens: what does not depend on the batch is added once in all, and a mean over the batch's tokens becomes that
        over the step's.

        Args:
            module: The adapted model, in training.
            batch: The training batch.
            outputs: What ``module.outputs`` gave for it: logits (B, L, V), or predictions (B,) of a regressor.
        """
        return None

    @property
    def has_penalty(self) -> bool:
        """Whether the method adds to a batch's loss."""
        return type(self).penalty is not Strategy.penalty

    def end_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Keep what later stages need of this one."""

    def answering_parts(self, module: AdaptedModule) -> dict[str, tuple[str, ...]] | None:
        """Return the parts that answer the rows sent to each stage, if they never change after it; "" for no stage.

        None where training may change any answer.
        """
        return None

    def answering_stages(self, module: AdaptedModule, rows: list[Row]) -> list[str]:
        """Return the stage that answers each row, of those that ``answering_parts`` names."""
        raise NotImplementedError

    @property
    def scores_by_task(self) -> bool:
        """Whether the model is another one for each task's batches, so that none may share a pass with other tasks'."""
        return type(self).on_test_batch_start is not L.Callback.on_test_batch_start

    def begin_untasked(self, module: AdaptedModule) -> None:
        """Get ready to score text of no task, after the tasks of a test and before it ends."""

    def write(self, folder: Path) -> None:
        """Write into the empty ``folder`` what is kept between stages."""

    def read(self, module: AdaptedModule, folder: Path) -> None:
        """Take up what ``write`` wrote."""

    def stored_bytes(self) -> int:
        """Return the bytes on disk that the method keeps for later stages, beyond one adapter; 0 before any stage."""
        return self._stored_bytes

    def stored_parameters(self, module: AdaptedModule) -> int:
        """Return the numbers that have to be kept to answer all tasks so far, the backbone's apart; after a stage."""
        return sum(parameter.numel() for parameter in trainable(module))

    def serving_parameters(self, module: AdaptedModule) -> int:
        """Return how many of ``stored_parameters`` a forward pass reads for one row, at most."""
        return self.stored_parameters(module)

    def save_adapter(self, module: AdaptedModule, folder: Path) -> None:
        """Write the adapter, whole or not at all; a PEFT folder unless a method needs another."""
        module.save_adapter(folder)

    def load_adapter(self, module: AdaptedModule, folder: Path) -> None:
        """Read what ``save_adapter`` wrote; raises RunError where it cannot."""
        module.load_adapter(folder)

    # -- what the engine calls ----------------------------------------------------------------------------------------

    def start(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Begin a stage."""
        self.data, self.stage = data, stage
        self.begin_stage(module, data, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the stage; the recorders, called before, have refused a loss that is not finite."""
        if self.stage:
            with forward_context(pl_module):
                self.end_stage(pl_module, self.data, self.stage)  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        """Write what is kept between stages, whole or not at all; no folder for a method that keeps nothing."""
        if type(self).write is not Strategy.write:
            with atomic_directory(folder) as temporary:
                self.write(temporary)
            self._stored_bytes = size_bytes(folder)

    def load(self, module: AdaptedModule, folder: Path) -> None:
        """Take up what ``save`` wrote.

        Raises:
            RunError: A file is missing or damaged.
        """
        try:
            self.read(module, folder)
        except RunError:
            raise
        except Exception as error:  # parquet, safetensors and JSON each have errors of their own
            raise RunError(f"cannot read what the strategy kept in {folder}: {one_line(error)}") from error
        self._stored_bytes = size_bytes(folder)

    # -- what methods share -------------------------------------------------------------------------------------------

    def collate(self, module: AdaptedModule, rows: Sequence[Row]) -> dict[str, Any]:
        """Return rows of any stage as a training batch on the module's device."""
        return moved(self.data.collate(rows), module.device)


class Sequential(Strategy):
    """Plain fine-tuning, stage after stage: nothing is kept and nothing is added. The lower baseline."""


def require_at_least(least: float, **values: float) -> None:
    """Raise ValueError for the first value below ``least``."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"model.strategy.{name} must be at least {least:g}, got {value:g}")

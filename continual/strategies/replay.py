"""Experience replay and DER++: rows of earlier stages are trained on again.

Experience replay: Chaudhry et al. 2019, 'On Tiny Episodic Memories in Continual Learning', arXiv 1902.10486: every
batch is joined by rows of a memory M, loss = L(batch + rows of M).
DER++: Buzzega et al. 2020, 'Dark Experience for General Continual Learning', arXiv 2004.07211, equation 6:

    L(batch) + alpha E_{(x', z') in M} || z' - h(x') ||^2 + beta E_{(x'', y'') in M} l(y'', h(x''))

z' are the logits that the model gave when the row was stored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler

from continual.errors import ConfigError
from continual.runtime.parameters import evaluating, load_tensors, save_tensors
from continual.strategies.base import Strategy, require_at_least
from continual.strategies.memory import Kept, MixedBatches, RowMemory, in_rounds

if TYPE_CHECKING:
    from continual.data.batch import Row
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule


class MemoryStrategy(Strategy):
    """A strategy that keeps rows of earlier stages; after each stage its training rows pass by the memory.

    Args:
        size: Rows kept in all, at least 1.
        class_balanced: Keep classes evenly (label tasks only); otherwise a fair sample of all rows seen.
    """

    needs_rows = True

    def __init__(self, size: int = 100, class_balanced: bool = False) -> None:
        if size < 1:
            raise ValueError(
                f"model.strategy.size must be at least 1 row, got {size}: without rows there is nothing to replay"
            )
        self.memory = RowMemory(size, class_balanced)

    def check(self, module: AdaptedModule, stages: Sequence[StageData]) -> None:
        """Raise ConfigError where classes are to be balanced and a task has none."""
        for data in stages:
            if self.memory.class_balanced and data.task.kind != "labels":
                kind = data.task.kind
                raise ConfigError(f"model.strategy: class_balanced needs label tasks, and {data.name!r} is {kind}")

    def begin_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Start drawing from the memory."""
        self._draws = in_rounds(self.memory.items, random.Random(data.seed))

    def draw(self, num_rows: int) -> list[Kept]:
        """Return the next ``num_rows`` rows of the memory, or all where it holds fewer."""
        return [next(self._draws) for _ in range(min(num_rows, len(self.memory)))]

    def end_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Show the memory the stage's training rows."""
        self.memory.add(data.train_rows, stage, random.Random(data.seed))

    def write(self, folder: Path) -> None:
        """Write the memory."""
        self.memory.write(folder)

    def read(self, module: AdaptedModule, folder: Path) -> None:
        """Read the memory."""
        self.memory.read(folder)


class ExperienceReplay(MemoryStrategy):
    """Every batch of new rows is joined by rows of earlier stages (see the module's docstring).

    A batch keeps its ``batch_size`` new rows, so that steps and the order of new rows are those of plain training.

    Stores: the memory's token ids, about 4 (prompt + answer tokens) bytes a row before compression.

    Args:
        size: Rows kept in all, at least 1.
        class_balanced: Keep classes evenly (label tasks only); otherwise a fair sample of all rows seen.
        replay_fraction: Share of a batch's rows that are replayed, in (0, 1); at least one row.
    """

    def __init__(self, size: int = 100, class_balanced: bool = False, replay_fraction: float = 0.25) -> None:
        super().__init__(size, class_balanced)
        if not 0 < replay_fraction < 1:
            raise ValueError(
                f"model.strategy.replay_fraction must lie between 0 and 1, both excluded, got {replay_fraction:g}"
            )
        self.replay_fraction = replay_fraction

    def mix(self, rows: list[Row], batches: Sampler[list[int]]) -> tuple[list[Row], Sampler[list[int]]]:
        """Put rows of the memory behind the new rows of every batch."""
        if not self.memory.items:
            return rows, batches
        share = self.replay_fraction / (1 - self.replay_fraction)
        num_old = max(1, round(share * self.data.batch_size))
        old = [item.row for item in self.memory.items]
        return rows + old, MixedBatches(batches, len(rows), len(old), num_old, self.data.seed)


class DERPlusPlus(MemoryStrategy):
    """The loss on new rows, plus staying near stored logits, plus the loss on stored rows (module's docstring).

    Two differences from the paper: rows and logits are stored at the end of their stage, not along the way; and the
    logits are those of the answer's tokens (a regressor: its prediction). || . ||^2 is the mean over their elements.

    Stores: token ids, and (answer tokens) x vocabulary x 4 bytes a row; 2 where the model computes in bfloat16.

    Args:
        size: Rows kept in all, at least 1.
        alpha: Weight of staying near the stored logits, at least 0.
        beta: Weight of the loss on stored rows, at least 0; with 0 it is DER.
        memory_batch_size: Rows of the memory in each of the two terms, each step.
        class_balanced: Keep classes evenly (label tasks only); otherwise a fair sample of all rows seen.
    """

    def __init__(
        self,
        size: int = 100,
        alpha: float = 0.5,
        beta: float = 0.5,
        memory_batch_size: int = 4,
        class_balanced: bool = False,
    ) -> None:
        super().__init__(size, class_balanced)
        require_at_least(0, alpha=alpha, beta=beta)
        require_at_least(1, memory_batch_size=memory_batch_size)
        self.alpha, self.beta, self.memory_batch_size = alpha, beta, memory_batch_size
        self.logits: dict[Kept, Tensor] = {}

    def begin_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Start drawing from the memory."""
        super().begin_stage(module, data, stage)
        self._drawn: list[list[Kept]] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Draw other rows for the next step."""
        self._drawn = []

    def penalty(self, module: AdaptedModule, batch: dict[str, Any], outputs: Tensor) -> Tensor | None:
        """Return the two terms on rows of the memory: the same rows for all batches of a step."""
        if not self.stage or not self.memory.items:
            return None
        if not self._drawn:
            self._drawn = [self.draw(self.memory_batch_size) for weight in (self.alpha, self.beta) if weight]
        drawn = iter(self._drawn)
        total = outputs.new_zeros(())
        if self.alpha:
            items = next(drawn)
            old = self.collate(module, [item.row for item in items])
            stored = torch.cat([self.logits[item].float() for item in items]).to(module.device)
            total = total + self.alpha * F.mse_loss(module.answer_outputs(old, module.outputs(old)), stored)
        if self.beta:
            old = self.collate(module, [item.row for item in next(drawn)])
            total = total + self.beta * module.loss(old, module.outputs(old))
        return total

    def end_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Show the memory the stage's rows, and store the model's logits of those that stayed."""
        super().end_stage(module, data, stage)
        self.logits = {item: self.logits[item] for item in self.memory.items if item in self.logits}
        with evaluating(module), torch.no_grad():
            for item in self.memory.items:
                if item not in self.logits:
                    batch = self.collate(module, [item.row])
                    self.logits[item] = _smallest(module.answer_outputs(batch, module.outputs(batch)).cpu())

    def write(self, folder: Path) -> None:
        """Write the memory and its logits, in its order."""
        super().write(folder)
        if self.memory.items:
            save_tensors(folder, {"logits": torch.cat([self.logits[item] for item in self.memory.items])})

    def read(self, module: AdaptedModule, folder: Path) -> None:
        """Read the memory and its logits."""
        super().read(module, folder)
        lengths = [max(1, len(item.row.answer_ids)) for item in self.memory.items]
        logits = load_tensors(folder)["logits"].split(lengths) if lengths else []
        self.logits = dict(zip(self.memory.items, logits, strict=True))


def _smallest(logits: Tensor) -> Tensor:
    """Return logits in bfloat16 where that loses nothing."""
    half = logits.bfloat16()
    return half if torch.equal(half.float(), logits) else logits

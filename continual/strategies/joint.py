"""Joint training: after each stage, one adapter trained on the rows of all stages so far; the multi-task bound.

At stage k a fresh adapter is trained on the union of the rows of stages 1..k. Its score on task k is the a*_k of
intransigence, I_k = a*_k - R[k, k] (Chaudhry et al. 2018, 'Riemannian Walk for Incremental Learning', arXiv
1801.10112, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.utils.data import Sampler

from continual.data.batch_order import LengthBatches
from continual.strategies.base import Strategy

if TYPE_CHECKING:
    from continual.data.batch import Row
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule


class Joint(Strategy):
    """Trains a fresh adapter on the rows of all stages so far (see the module's docstring).

    It reads all earlier rows again, which no method against forgetting may: an upper bound. A stage takes its own
    epochs, over all these rows.

    Stores: nothing; it has the tasks themselves.

    Args:
        final_only: Train at the last stage alone; the stages before it are neither trained nor scored.
    """

    needs_rows = True

    def __init__(self, final_only: bool = False) -> None:
        self.final_only = final_only

    def check(self, module: AdaptedModule, stages: Sequence[StageData]) -> None:
        """Note all stages, whose rows are to be read again."""
        self._stages = list(stages)

    def skips(self, stage: int, num_stages: int) -> bool:
        """Say whether ``stage`` trains nothing."""
        return self.final_only and stage < num_stages

    def begin_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Start a fresh adapter."""
        module.renew_adapter()

    def mix(self, rows: list[Row], batches: Sampler[list[int]]) -> tuple[list[Row], Sampler[list[int]]]:
        """Return the rows of all stages so far, in batches of like length."""
        if not self.stage:
            return rows, batches
        rows = [row for data in self._stages[: self.stage] for row in data.train_rows]
        return rows, LengthBatches([row.length for row in rows], self.data.batch_size, self.data.seed)

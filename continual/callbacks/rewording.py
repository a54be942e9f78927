"""After the last stage: the finished model's scores under reworded instructions (``scoring.rewording``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from continual.interfaces import AdaptedModule, Recorder, Rows, StageContext
from continual.scoring.rewording import Rewording, Slot, check_fit, score_slots


class RewordingRecorder(Recorder):
    """Rows for the tables ``wordings`` and ``wording_answers``, after the last stage.

    Args:
        rewording: Which wordings to score.
    """

    def __init__(self, rewording: Rewording) -> None:
        self.rewording = rewording
        self.slots: list[Slot] = []

    def check(self, module: AdaptedModule, stages: Sequence[Any]) -> None:
        """Raise ConfigError where a task has no such wording, or a prompt would not fit."""
        has_gate = module.uses_instructions or module.strategy.reads_instructions
        self.slots = self.rewording.slots(stages, has_gate)
        check_fit(self.slots, stages)

    def begin(self, context: StageContext) -> None:
        """Begin a stage."""
        self._context = context

    def tables(self) -> dict[str, Rows]:
        """Score the tasks under reworded prompts, if the stage is the last."""
        context = self._context
        return score_slots(self.slots, context.stages, context.score) if context.is_last else {}

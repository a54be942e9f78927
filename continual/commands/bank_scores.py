"""Score a run's tasks with a bank in the place of the one that the run ended with; nothing of the run is changed."""

from __future__ import annotations

from pathlib import Path

from continual.callbacks import ScoreRecorder
from continual.callbacks.progress import ScoreTable
from continual.config.experiment import Experiment
from continual.engine.stage_loop import StageLoop
from continual.runtime.quiet import quieten
from continual.storage.manifest import Manifest


class BankScores(StageLoop):
    """A run that takes up a bank instead of its last adapter, and trains no more.

    Args:
        experiment: The run's configuration.
        run_dir: The run's directory.
        bank: The folder of the bank.
    """

    def __init__(self, experiment: Experiment, run_dir: Path, bank: Path) -> None:
        super().__init__(experiment, run_dir)
        self.bank = bank

    def _take_up(self) -> None:
        self.module.strategy.load_adapter(self.module, self.bank)

    def score(self, state: Manifest, accept_data: bool = False) -> ScoreRecorder:
        """Return the scores and answers of all tasks, as after the last stage that ``state`` has finished."""
        quieten()
        self.prepare(state, accept_data)
        index = state.finished_stage
        self._see_labels(index)
        self.progress.title = "bank"
        found = self.score_tasks(index, self.data)
        ScoreTable([data.name for data in self.data]).show("(bank)", found.headline())
        return found

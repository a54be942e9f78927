"""Score a finished run's tasks under reworded instructions, and put the rows into its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from continual.config import experiment
from continual.engine.stage_loop import StageLoop
from continual.scoring.rewording import Rewording
from continual.storage import digests, manifest, records

_SAME = ["run", "seed", "stage", "task", "wording", "where", "options"]


def rescore(run_dir: Path, *rewording: Any, accept_data: bool = False) -> None:
    """Add the rows of the tables wordings and wording_answers; those of the same wording are replaced.

    Args:
        run_dir: The directory of a finished run.
        rewording: Arguments of ``Rewording``.
        accept_data: Score rows that are others than when the run began.

    Raises:
        ConfigError: There is no run, it is not finished, or a task has no such wording.
    """
    state, text = manifest.read_finished(run_dir)
    made = experiment.parse(text, state.run, where=str(run_dir / manifest.CONFIG_NAME))
    made.wordings = Rewording(*rewording)
    loop = StageLoop(made, run_dir)
    with loop.lock:
        loop.prepare(state, accept_data)
        tables = loop.score_reworded()
        for table in ("wording_answers", "wordings"):
            records.replace(run_dir, table, tables[table], _SAME)
        digests.note_tables(run_dir, state, ("wording_answers", "wordings"))

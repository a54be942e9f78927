"""What a run taught each task and what later stages took: two differences of scores a task, each with its interval.

Both are paired over test rows (the same redrawn rows at both stages), and neither is called where its interval holds 0.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.measures import hierarchy
from analysis.runs.frames import Frame
from analysis.summaries.summary import Summary

Array = NDArray[np.float64]

COLUMNS = ["task", "taught", "taught_low", "taught_high", "kept", "kept_low", "kept_high"]


def task_changes(summary: Summary) -> Frame:
    """Return what was taught and kept of each learnt task.

    Returns:
        Columns task; taught, the score just after the task's stage minus the better one of the untrained model's and
        the best constant answer's (known for all rows, so not redrawn); kept, the final score minus the just-trained
        one, NaN for the last task; each with _low and _high, NaN where there is no interval.
    """
    run, matrix = summary.run, summary.learnt_matrix
    drawn = np.empty((0, *matrix.shape)) if summary.drawn is None else summary.drawn
    rows = []
    for index, task in enumerate(run.learnt):
        constant = (run.tasks.get(task) or {}).get("constant_score")
        floor = float(constant) if isinstance(constant, int | float) else -np.inf
        taught = [
            scores[..., index + 1, index] - np.maximum(scores[..., 0, index], floor) for scores in (matrix, drawn)
        ]
        kept = [scores[..., -1, index] - scores[..., index + 1, index] for scores in (matrix, drawn)]
        last = index == len(run.learnt) - 1
        found = [np.nan] * 3 if last else [float(kept[0]), *_interval(kept[1])]
        rows.append([task, float(taught[0]), *_interval(taught[1]), *found])
    return pd.DataFrame(rows, columns=COLUMNS)


def score_lost(summary: Summary, stage: int, task: int) -> tuple[float, tuple[float, float]]:
    """Return the score that a learnt task (by index) lost at a stage, and the interval of that loss over test rows."""
    lost = float(summary.matrix[stage - 1, task] - summary.matrix[stage, task])
    if summary.drawn is None:
        return lost, (float("nan"), float("nan"))
    return lost, _interval(summary.drawn[:, stage - 1, task] - summary.drawn[:, stage, task])


def _interval(draws: Array) -> tuple[float, float]:
    if not draws.size or np.isnan(draws).any():
        return float("nan"), float("nan")
    return hierarchy.interval(draws)

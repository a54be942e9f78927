"""The interval of one cell's measure over its test rows alone, for a method that has no second cell to redraw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.measures import hierarchy
from analysis.summaries.sweep_cells import SweepCell

MEASURES = ("headline_accuracy", "average_accuracy", "backward_transfer", "learning_accuracy")
"""The measures that are means over tasks and rows of what a row earned, and so have such an interval."""


def row_interval(cell: SweepCell, tasks: Sequence[str], key: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a measure with the cell's test rows redrawn; None where it cannot be had.

    Args:
        cell: The cell.
        tasks: The tasks that the measure is over.
        key: One of ``MEASURES``.
    """
    own = [task for task in cell.stages if task in tasks]
    if key == "backward_transfer":
        own = [task for task in own if task != cell.stages[-1]]
    if key not in MEASURES or not own or any(task not in cell.rows for task in own):
        return None
    values = []
    for task in own:
        rows = cell.rows[task]
        earned = {"backward_transfer": rows.final - rows.trained, "learning_accuracy": rows.trained}
        values.append(earned.get(key, rows.final)[None])
    if any(np.isnan(value).any() for value in values):
        return None
    counts = [
        hierarchy.row_counts(value.shape[1], np.random.default_rng([1, index])) for index, value in enumerate(values)
    ]
    return hierarchy.interval(hierarchy.means(values, np.ones((hierarchy.NUM_DRAWS, 1)), counts))

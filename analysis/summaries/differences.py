"""Paired differences between a sweep's methods: over the cells that both have, with the same test rows drawn for both.

measures.md's 'Intervals': a hierarchical paired bootstrap. A difference is called only where its 95 % interval leaves
out 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.measures import hierarchy
from analysis.runs.frames import Frame
from analysis.summaries.sweep_cells import RowScores, SweepCell
from analysis.summaries.sweeps import ABOVE, BELOW, EVEN, Sweep

Array = NDArray[np.float64]
Pair = tuple[SweepCell, SweepCell]
Drawn = dict[str, tuple[NDArray[np.int64], Array]]

COLUMNS = ["method", "baseline", "measure", "tasks", "cells", "difference", "low", "high", "verdict", "rough"]
HEADLINE, FEW, ALL = "headline", "few rows", "all"


def paired_differences(sweep: Sweep, baseline: str) -> Frame:
    """Compare every method with ``baseline`` over the cells of one order and seed that both have.

    Differences are of the mean final score (``average_accuracy``, over the headline tasks, over those of them with few
    training rows, and over all) and of backward transfer (over the same, each cell's last task left out). Draws take
    orders, then seeds within them, then test rows within tasks, the same rows for both methods and in all cells,
    matched by task and row. The seed is fixed.

    Args:
        sweep: The sweep.
        baseline: A method's name.

    Returns:
        Columns method, baseline, measure, tasks ("headline", "few rows" or "all"), cells, difference (method minus
        baseline), low, high, verdict ("above", "below", "not told apart"), rough (five cells or fewer). A method
        without a common cell has no row, nor have tasks of few rows where there are none.
    """
    drawn: Drawn = {}
    groups = {HEADLINE: sweep.headline_names, FEW: sweep.few_row_names, ALL: sweep.tasks}
    rows = []
    for method in sweep.measured:
        pairs = _pairs(sweep, method, baseline)
        if method == baseline or not pairs:
            continue
        weights = hierarchy.cell_weights([own.order for own, _ in pairs], np.random.default_rng(0))
        for tasks, names in groups.items():
            for measure, trained in (("average_accuracy", False), ("backward_transfer", True)):
                found = _difference(sweep, pairs, names, trained, weights, drawn)
                if found is not None:
                    place = (method, baseline, measure, tasks, len(pairs))
                    rows.append([*place, *found, verdict(*found[1:]), len(pairs) <= hierarchy.FEW_CELLS])
    return pd.DataFrame(rows, columns=COLUMNS)


def verdict(low: float, high: float) -> str:
    """Return what an interval says of a difference."""
    return ABOVE if low > 0 else BELOW if high < 0 else EVEN


def _pairs(sweep: Sweep, method: str, baseline: str) -> list[Pair]:
    """Return the cells of both with the same order, seed and tasks, whose answers are at hand."""
    both = [(cell, sweep.twin(cell, baseline)) for cell in sweep.cells_of(method)]
    return [
        (own, other)
        for own, other in both
        if other is not None and own.rows and other.rows and own.stages == other.stages
    ]


def _difference(
    sweep: Sweep,
    pairs: Sequence[Pair],
    tasks: Sequence[str],
    trained: bool,
    weights: Array,
    drawn: Drawn,
) -> tuple[float, float, float] | None:
    """Return the mean difference and its interval; None where a pair lacks it."""
    values = {}
    for task in tasks:
        if not any(task in own.rows for own, _ in pairs):  # a task of other orders, perhaps without rows at all
            continue
        if task not in drawn:
            drawn[task] = drawn_rows(sweep, task)
        every, _ = drawn[task]
        values[task] = np.stack([_row_differences(own, other, task, every, trained) for own, other in pairs])
    return mean_over_cells(values, [own.order for own, _ in pairs], weights, drawn)


def mean_over_cells(
    values: Mapping[str, Array], orders: Sequence[str], weights: Array, drawn: Drawn
) -> tuple[float, float, float] | None:
    """Return the mean over cells of the mean over tasks of the mean over rows, and its 95 % interval.

    Args:
        values: For each task, what every row gives in every cell, (cells, rows); NaN where a cell has no such row.
        orders: Each cell's order.
        weights: Each cell's weight in each draw (``hierarchy.cell_weights``).
        drawn: Each task's rows, and how often each draw takes them (``drawn_rows``).

    Returns:
        None where a cell has no row at all.
    """
    tasks = [task for task, rows in values.items() if not np.isnan(rows).all()]
    rows = [values[task] for task in tasks]
    if not rows or any(all(np.isnan(one[cell]).all() for one in rows) for cell in range(len(orders))):
        return None
    ones, counts = [np.ones((1, one.shape[1])) for one in rows], [drawn[task][1] for task in tasks]
    mean = hierarchy.means(rows, hierarchy.mean_weights(orders)[None], ones)[0]
    return float(mean), *hierarchy.interval(hierarchy.means(rows, weights, counts))


def drawn_rows(sweep: Sweep, task: str) -> tuple[NDArray[np.int64], Array]:
    """Return every test row of a task met in the sweep, and how often each draw takes it, alike for all methods."""
    every = np.unique(np.concatenate([cell.rows[task].rows for cell in sweep.cells if task in cell.rows]))
    generator = np.random.default_rng([1, sweep.tasks.index(task)])
    return every, hierarchy.row_counts(len(every), generator)


def _row_differences(own: SweepCell, other: SweepCell, task: str, every: NDArray[np.int64], trained: bool) -> Array:
    """Return own minus other for each of the ``every`` rows, NaN for rows that they do not share.

    ``trained`` takes final minus just-trained scores; a cell's last task then has none.
    """
    values = np.full(len(every), np.nan)
    if task not in own.rows or task not in other.rows or (trained and task == own.stages[-1]):
        return values
    common = np.intersect1d(own.rows[task].rows, other.rows[task].rows)
    difference = _values(own.rows, task, common, trained) - _values(other.rows, task, common, trained)
    values[np.searchsorted(every, common)] = difference
    return values


def _values(rows: Mapping[str, RowScores], task: str, common: NDArray[np.int64], trained: bool) -> Array:
    scores = rows[task]
    values = scores.final - scores.trained if trained else scores.final
    return values[np.searchsorted(scores.rows, common)]

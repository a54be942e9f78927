"""A sweep's methods under reworded prompts: what each loses, and who stands above whom."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.measures import hierarchy
from analysis.runs.frames import Frame
from analysis.summaries.differences import Drawn, drawn_rows, mean_over_cells, verdict
from analysis.summaries.sweep_cells import SweepCell
from analysis.summaries.sweeps import Sweep

Array = NDArray[np.float64]

KIND = ["words", "where", "options"]
COLUMNS = [
    *("method", *KIND, "cells", "num_tasks", "score", "trained", "difference", "low", "high"),
    *("apart", "apart_low", "apart_high", "verdict", "abstained"),
]
_CELL = ["method", "order", "seed"]
Key = tuple[str, str, int]
Values = dict[Key, dict[str, Array]]
"""What each row of each task earned, by cell."""


def wording_differences(sweep: Sweep, answers: Frame, recorded: Frame) -> Frame:
    """Return how each method scores in each kind of rewording; all paraphrases of a file are one kind.

    Draws are those of ``differences.paired_differences``: orders, then seeds within them, then test rows within tasks.

    Args:
        sweep: The sweep.
        answers: The tables ``wording_answers`` of its cells (``studies.load_cells``).
        recorded: The tables ``wordings``.

    Returns:
        A line a method and kind, kinds first: ``words`` (the file's name, "none" or "wrong"), ``where``, ``options``,
        ``cells`` and ``num_tasks`` that were scored so; ``score`` and, in the words trained on, ``trained``; their
        ``difference`` and its 95 % interval; ``apart``, the score minus the baseline's in the same words, over the
        cells that both have, with its interval and ``verdict``; ``abstained``, the share of rows that a gate left to
        the backbone. What is not known is NaN, a verdict "".
    """
    if not len(answers):
        return pd.DataFrame(columns=COLUMNS)
    drawn = {task: drawn_rows(sweep, task) for task in sweep.tasks if any(task in cell.rows for cell in sweep.cells)}
    finals = {_key(cell): _final(cell, drawn) for cell in sweep.cells}
    abstained = _abstained(recorded)
    lines = []
    for kind, group in answers.assign(words=_words(answers)).groupby(KIND, sort=False):
        earned = _earned(group, drawn)
        for method in sweep.measured:
            cells = [cell for cell in sweep.cells_of(method) if _key(cell) in earned and cell.rows]
            if not cells:
                continue
            tasks = sorted(set().union(*(earned[_key(cell)] for cell in cells)))
            own, trained = (_stack(cells, tasks, drawn, values) for values in (earned, finals))
            score, base = (_mean(values, cells, drawn)[0] for values in (own, trained))
            lost = _mean({task: own[task] - trained[task] for task in own}, cells, drawn)
            place = (method, *(str(name) for name in kind))  # type: ignore[union-attr]
            line = [*place, len(cells), len(tasks), score, base, *lost]
            lines.append([*line, *_apart(sweep, cells, tasks, earned, drawn), abstained.get(place, math.nan)])
    return pd.DataFrame(lines, columns=COLUMNS)


def _words(rows: Frame) -> Any:
    return rows["wording"].str.replace(r"-\d+$", "", regex=True)


def _key(cell: SweepCell) -> Key:
    return cell.method, cell.order, cell.seed


def _earned(group: Frame, drawn: Drawn) -> Values:
    """Return what each row of each task earned in each cell, over the rows of ``drawn``; NaN for one not scored."""
    found: Values = {}
    values = group.groupby([*_CELL, "task", "row"], sort=False)["value"].mean().reset_index()
    for place, own in values.groupby([*_CELL, "task"], sort=False):
        method, order, seed, task = cast(tuple[str, str, int, str], place)
        if task in drawn:
            rows = own.set_index("row")["value"].reindex(drawn[task][0])
            found.setdefault((method, order, seed), {})[task] = rows.to_numpy(dtype=float)
    return found


def _final(cell: SweepCell, drawn: Drawn) -> dict[str, Array]:
    """Return what each row earned in the words trained on, likewise."""
    return {
        task: pd.Series(own.final, own.rows).reindex(drawn[task][0]).to_numpy(dtype=float)
        for task, own in cell.rows.items()
    }


def _stack(cells: list[SweepCell], tasks: list[str], drawn: Drawn, values: Values) -> dict[str, Array]:
    """Return the cells' values by task, (cells, rows)."""
    missing = {task: np.full(len(drawn[task][0]), np.nan) for task in tasks}
    return {task: np.stack([values[_key(cell)].get(task, missing[task]) for cell in cells]) for task in tasks}


def _mean(values: dict[str, Array], cells: list[SweepCell], drawn: Drawn) -> tuple[float, float, float]:
    orders = [cell.order for cell in cells]
    weights = hierarchy.cell_weights(orders, np.random.default_rng(0))
    return mean_over_cells(values, orders, weights, drawn) or (math.nan, math.nan, math.nan)


def _apart(sweep: Sweep, cells: list[SweepCell], tasks: list[str], earned: Values, drawn: Drawn) -> list[Any]:
    """Return the difference from the baseline in the same words, its interval and the verdict."""
    nothing = [math.nan, math.nan, math.nan, ""]
    if not sweep.baseline or cells[0].method == sweep.baseline:
        return nothing
    twins = [(cell, sweep.twin(cell, sweep.baseline)) for cell in cells]
    pairs = [(cell, twin) for cell, twin in twins if twin is not None and _key(twin) in earned]
    if not pairs:
        return nothing
    own, other = (_stack([pair[side] for pair in pairs], tasks, drawn, earned) for side in (0, 1))
    found = _mean({task: own[task] - other[task] for task in own}, [cell for cell, _ in pairs], drawn)
    return nothing if math.isnan(found[0]) else [*found, verdict(*found[1:])]


def _abstained(recorded: Frame) -> dict[Any, float]:
    """Return the mean share of rows that a gate left to the backbone, by method and kind."""
    if not len(recorded):
        return {}
    rows = recorded[recorded["metric"] == "abstained"]
    rows = rows.assign(words=_words(rows))
    return rows.groupby(["method", *KIND], sort=False)["value"].mean().to_dict()

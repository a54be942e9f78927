"""Bootstrap intervals of a single run's numbers over its test rows, and of a rank correlation over its points.

They say how far a number would move with other test rows from the same source. They hold neither the seed's nor the
stage order's share of the spread, which one run cannot show.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from analysis.measures import hierarchy
from analysis.runs.frames import Frame
from analysis.runs.tables import task_names

Array = NDArray[np.float64]

NUM_DRAWS = 1000
_TOLERANCE = 1e-6


def bootstrap_matrices(answers: Frame, scores: Frame, matrix: Array, num_draws: int = NUM_DRAWS) -> Array:
    """Redraw every task's test rows and return the score matrices that they give.

    The same redrawn rows score every stage, so differences between stages are paired. R2 is redrawn with the test
    rows' variance held fixed, which makes it a mean over rows like the other scores.

    Args:
        answers: The answers table (value: what the row earned, or for R2 its squared error).
        scores: Headline scores, as ``tables.headline`` returns them.
        matrix: R, shape (S + 1, T), which the answers must reproduce; NaN where nothing was scored.
        num_draws: How many times to redraw; the seed is fixed.

    Returns:
        Shape (num_draws, S + 1, T), NaN where R is.

    Raises:
        ValueError: The answers are missing, or their means are not the recorded scores; the message says which.
    """
    metrics = scores.drop_duplicates("task").set_index("task")["metric"]
    generator = np.random.default_rng(0)
    drawn = np.full((num_draws, *matrix.shape), np.nan)
    for column, task in enumerate(task_names(scores)):
        rows = answers[answers["task"] == task].pivot_table(
            index="stage", columns="row", values="value", aggfunc="last"
        )
        scored = ~np.isnan(matrix[:, column])  # a run may score some tasks after some stages only
        values = rows.reindex(np.flatnonzero(scored)).to_numpy(dtype=float)
        if not values.size or np.isnan(values).any():
            raise ValueError(f"the answers of {task} are not recorded for every stage and row")
        if metrics.get(task) == "r2":
            values = r2_by_row(values, matrix[scored, column])
        if not np.allclose(values.mean(axis=1), matrix[scored, column], atol=_TOLERANCE, rtol=_TOLERANCE):
            raise ValueError(f"the mean of the recorded answers of {task} is not its recorded score")
        num_rows = values.shape[1]
        picks = generator.integers(0, num_rows, (num_draws, num_rows)) + num_rows * np.arange(num_draws)[:, None]
        counts = np.bincount(picks.ravel(), minlength=num_draws * num_rows).reshape(num_draws, num_rows)
        drawn[:, scored, column] = counts @ values.T / num_rows
    return drawn


def r2_by_row(squared_errors: Array, r2: Array) -> Array:
    """Return 1 - error / variance a row, with the variance that the recorded R2 implies where it is best determined."""
    stage = int(np.nanargmax(np.abs(1 - r2)))  # NaN: a stage after which nothing was scored
    variance = squared_errors[stage].mean() / (1 - r2[stage]) if r2[stage] != 1 else np.nan
    return 1 - squared_errors / variance


def interval(drawn: Array, measure: Callable[[ArrayLike], float], level: float = 0.95) -> tuple[float, float] | None:
    """Return the percentile interval of ``measure`` over redrawn matrices, or None where it is not defined."""
    values = np.array([measure(matrix) for matrix in drawn])
    if np.isnan(values).any():
        return None
    return hierarchy.interval(values, level)


def smallest_difference(num_rows: int) -> float:
    """Return what two unpaired shares near one half, each of ``num_rows`` rows, must differ by to be told apart.

    The half-width of the 95 % normal interval of a difference of two proportions of 1/2, 1.96 sqrt(2 x 0.25 / n): the
    widest case (Agresti 2002, Categorical Data Analysis, equation 3.1).
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, not {num_rows}")
    return 1.96 * math.sqrt(0.5 / num_rows)


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Return Spearman's correlation (ties share their mean rank); NaN where one side does not vary."""
    one, other = (pd.Series(np.asarray(side, dtype=float)).rank().to_numpy() for side in (first, second))
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def correlation_interval(
    first: ArrayLike, second: ArrayLike, num_draws: int = NUM_DRAWS, level: float = 0.95
) -> tuple[float, float] | None:
    """Return the bootstrap interval of Spearman's correlation over points, or None for fewer than 5 points."""
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if len(x) < 5:
        return None
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(x), (num_draws, len(x)))
    values = np.array([rank_correlation(x[pick], y[pick]) for pick in picks])
    values = values[~np.isnan(values)]
    if len(values) < num_draws / 2:
        return None
    return hierarchy.interval(values, level)

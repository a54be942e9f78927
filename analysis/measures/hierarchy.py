"""Bootstrap over what a sweep's cells share: orders are drawn, then seeds within them, then test rows within tasks.

Test rows are crossed with cells, not nested in them: a draw takes the same rows of a task in every cell and for both
methods of a pair, because a row that one method gets wrong tends to be wrong in every cell; drawing rows anew a cell
would average that away. In the mean every order counts the same, and so does every seed of an order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUM_DRAWS = 2000
FEW_CELLS = 5
"""An interval over so few cells is rough."""
_ROUNDING = 1e-12
"""What the sum of rows that cancel may be off 0 by, as a share of the largest draw."""


def mean_weights(orders: Sequence[Hashable]) -> Array:
    """Return each cell's weight in the mean, shape (cells,): every order counts the same, and every seed within it."""
    named = list(orders)
    return np.array([1 / (len(set(named)) * named.count(order)) for order in named])


def cell_weights(orders: Sequence[Hashable], generator: np.random.Generator, num_draws: int = NUM_DRAWS) -> Array:
    """Redraw orders, then seeds within each drawn order; return each cell's weight in each draw.

    Args:
        orders: The order of each cell; cells of one order differ in their seed.
        generator: The source of the draws.
        num_draws: How many.

    Returns:
        Shape (num_draws, cells); rows sum to 1.
    """
    members: dict[Hashable, list[int]] = {}
    for cell, order in enumerate(orders):
        members.setdefault(order, []).append(cell)
    groups = list(members.values())
    weights = np.zeros((num_draws, len(orders)))
    for _ in groups:
        drawn = generator.integers(0, len(groups), num_draws)
        for index, group in enumerate(groups):
            chosen = np.flatnonzero(drawn == index)
            seeds = row_counts(len(group), generator, len(chosen))
            weights[np.ix_(chosen, np.array(group))] += seeds / len(group)
    return weights / len(groups)


def row_counts(num_rows: int, generator: np.random.Generator, num_draws: int = NUM_DRAWS) -> Array:
    """Redraw ``num_rows`` rows with replacement; return how often each was drawn, shape (num_draws, num_rows)."""
    picks = generator.integers(0, num_rows, (num_draws, num_rows)) + num_rows * np.arange(num_draws)[:, None]
    return np.bincount(picks.ravel(), minlength=num_draws * num_rows).reshape(num_draws, num_rows).astype(float)


def means(rows: Sequence[Array], weights: Array, counts: Sequence[Array]) -> Array:
    """Return the mean over cells of the mean over tasks of the mean over rows, for each draw.

    Args:
        rows: For each task, what every row gives in every cell, shape (cells, rows); NaN where a cell has no such row.
        weights: Each cell's weight, shape (num_draws, cells), as ``cell_weights`` returns it.
        counts: For each task, how often each row counts, shape (num_draws, rows), as ``row_counts`` returns it.

    Returns:
        Shape (num_draws,); a cell's mean is over the tasks that it has.
    """
    total, num_tasks = np.zeros_like(weights), np.zeros_like(weights)
    for values, count in zip(rows, counts, strict=True):
        present = ~np.isnan(values)
        whole = present.all()  # the usual case, and half the work
        drawn = np.broadcast_to(count.sum(axis=1)[:, None], weights.shape) if whole else count @ present.T
        sums = count @ np.where(present, values, 0.0).T
        total += np.divide(sums, drawn, out=np.zeros_like(sums), where=drawn > 0)
        num_tasks += drawn > 0
    per_cell = np.divide(total, num_tasks, out=np.zeros_like(total), where=num_tasks > 0)
    return (weights * per_cell).sum(axis=1)


def interval(draws: Array, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of ``draws``; a bound that rounding alone keeps from 0 is 0."""
    bounds = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    largest = np.abs(draws[np.isfinite(draws)]).max(initial=0.0)
    low, high = np.where(np.abs(bounds) <= _ROUNDING * largest, 0.0, bounds)
    return float(low), float(high)

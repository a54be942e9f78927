"""Pareto fronts: which of several settings no other one beats in cost and score at once."""

from __future__ import annotations

from typing import Any

import numpy as np

SIZES = ("r", "num_atoms", "top_k")
"""The adapter's fields that a Pareto study varies."""


def on_front(costs: Any, scores: Any) -> np.ndarray:
    """Return which points no other one beats: at most the cost, at least the score, and better in one of them.

    Args:
        costs: Shape (n); lower is better.
        scores: Shape (n); higher is better. A point with a NaN is never on the front and beats none.

    Returns:
        Shape (n), bool.
    """
    cost, score = np.asarray(costs, dtype=float), np.asarray(scores, dtype=float)
    with np.errstate(invalid="ignore"):
        no_worse = (cost[None] <= cost[:, None]) & (score[None] >= score[:, None])
        better = (cost[None] < cost[:, None]) | (score[None] > score[:, None])
    return ~(no_worse & better).any(axis=1) & ~np.isnan(cost) & ~np.isnan(score)

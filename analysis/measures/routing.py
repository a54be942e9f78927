"""How routing uses the bank: entropies, distances between usages, what they say of atoms; pure functions of arrays.

Shapes: S stages, T tasks, N blocks, M atoms. A usage is a distribution over atoms on the last axis (sums to 1). Where a
function takes blocks, it is computed per block and then averaged: averaging usages first would hide opposite shifts.
All logarithms are natural (nats).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from continual.measures.distances import entropy_nats, js_divergence

Array = NDArray[np.float64]
Distance = Callable[[ArrayLike, ArrayLike], Array]


def pairwise(usage: ArrayLike, distance: Distance = js_divergence) -> Array:
    """Return the task-separation matrix: entry (i, j) is ``distance`` from task i to task j, averaged over blocks.

    Args:
        usage: Shape (T, N, M).
        distance: One of this module's distances.

    Returns:
        Shape (T, T); the diagonal is 0.
    """
    tasks = np.asarray(usage, dtype=float)
    return distance(tasks[:, None], tasks[None, :]).mean(axis=-1)


def off_diagonal_mean(matrix: ArrayLike) -> float:
    """Return the mean of a square matrix off its diagonal: NaN for one task, and where an entry is missing."""
    square = np.asarray(matrix, dtype=float)
    values = square[~np.eye(len(square), dtype=bool)]
    return float(values.mean()) if values.size else float("nan")


def drift(usage: ArrayLike, distance: Distance = js_divergence) -> Array:
    """Return how far each task's routes moved at each stage: ``distance(U[s, j], U[s-1, j])`` averaged over blocks.

    Args:
        usage: Shape (S + 1, T, N, M), stage 0 first.
        distance: One of this module's distances; KL is taken from the later usage to the earlier.

    Returns:
        Shape (S, T): row s - 1 holds stage s.
    """
    stages = np.asarray(usage, dtype=float)
    return distance(stages[1:], stages[:-1]).mean(axis=-1)


def route_drift(stage_drift: ArrayLike) -> float:
    """Return the mean drift over all (stage s, task j) with j trained before s; NaN when there is none.

    Args:
        stage_drift: Shape (S, T), as :func:`drift` returns it; task j (0-based) is trained at stage j + 1.
    """
    values = np.asarray(stage_drift, dtype=float)
    learnt = [values[stage - 1, task] for stage in range(2, len(values) + 1) for task in range(stage - 1)]
    return float(np.mean(learnt)) if learnt else float("nan")


def atom_entropy(usage: ArrayLike) -> Array:
    """Return each atom's entropy over tasks / ln T, in [0, 1]: low = specialist, high = shared.

    Args:
        usage: Tasks on the first axis: shape (T, ..., M).

    Returns:
        Shape (..., M); NaN for an atom that no task uses, and everywhere when T = 1.
    """
    tasks = np.asarray(usage, dtype=float)
    if len(tasks) < 2:
        return np.full(tasks.shape[1:], np.nan)
    total = tasks.sum(axis=0)
    share = np.divide(tasks, total, out=np.full_like(tasks, np.nan), where=total > 0)
    return entropy_nats(np.moveaxis(share, 0, -1)) / np.log(len(tasks))


def dead_atoms(usage: ArrayLike) -> NDArray[np.bool_]:
    """Say which atoms no task uses, in any block: usage below 1 / (10 M) everywhere.

    Args:
        usage: Shape (T, N, M).

    Returns:
        Shape (M,).
    """
    tasks = np.asarray(usage, dtype=float)
    threshold = 1.0 / (10 * tasks.shape[-1])
    return (tasks < threshold).reshape(-1, tasks.shape[-1]).all(axis=0)


def task_information_nats(usage: ArrayLike, weights: ArrayLike | None = None) -> float:
    """I(atom; task) in nats over a task mix: entropy of the mixed usage minus the mean entropy, averaged over blocks.

    Args:
        usage: Shape (T, N, M).
        weights: The mix, shape (T,), summing to 1; by default every task alike.
    """
    tasks = np.asarray(usage, dtype=float)
    mix = np.full(len(tasks), 1 / len(tasks)) if weights is None else np.asarray(weights, dtype=float)
    mixed = entropy_nats(np.tensordot(mix, tasks, axes=1))
    return float(np.mean(mixed - np.tensordot(mix, entropy_nats(tasks), axes=1)))


def token_information_nats(usage_entropy: ArrayLike, token_entropy: ArrayLike) -> float:
    """I(atom; token | task) in nats: a usage's entropy minus its tokens' mean entropy, averaged over tasks and blocks.

    Near 0, routing ignores the input within a task. The two arrays have the same shape, (T,) or (T, N).
    """
    return float(np.mean(np.asarray(usage_entropy, dtype=float) - np.asarray(token_entropy, dtype=float)))

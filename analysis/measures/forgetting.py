"""What stages did to the scores: transfer, forgetting and averages, each a pure function of the score matrix.

The matrix R has shape (T + 1, T): row i holds every task's score after stage i (row 0: before any training), column j
belongs to the task that stage j trains, and higher is better. With the paper's one-based j, R[j, j] is the score just
after training; here that is ``scores[j + 1, j]`` for column j. A measure that is not defined (backward transfer of one
stage, say) is NaN, and a NaN score makes every measure that needs it NaN: nothing is skipped silently.

Sources: Lopez-Paz & Ranzato 2017 (arXiv 1706.08840), Chaudhry et al. 2018 (1801.10112), Rebuffi et al. 2017 (iCaRL,
1611.07725), Riemer et al. 2019 (1810.11910).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _matrix(scores: ArrayLike) -> Array:
    """Return ``scores`` as a float matrix of shape (T + 1, T), or raise ValueError."""
    matrix = np.asarray(scores, dtype=float)
    if matrix.ndim != 2 or matrix.shape[1] < 1 or matrix.shape[0] != matrix.shape[1] + 1:
        raise ValueError(f"a score matrix has T + 1 rows (row 0: untrained) and T columns, not shape {matrix.shape}")
    return matrix


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else float("nan")


def _stage(stage: int | None, num_stages: int) -> int:
    """Return ``stage``, by default the last one, or raise ValueError."""
    if stage is None:
        return num_stages
    if not 1 <= stage <= num_stages:
        raise ValueError(f"stage must be from 1 to {num_stages}, not {stage}")
    return stage


def just_trained(scores: ArrayLike) -> Array:
    """Return the diagonal R[j, j], shape (T,): each task's score right after the stage that trained it."""
    matrix = _matrix(scores)
    return np.array([matrix[task + 1, task] for task in range(matrix.shape[1])])


def average_accuracy(scores: ArrayLike) -> float:
    """ACC = (1/T) sum_j R[T, j]. Higher is better (Lopez-Paz & Ranzato 2017)."""
    return _mean(_matrix(scores)[-1])


def micro_average_accuracy(final: ArrayLike, num_rows: ArrayLike) -> float:
    """Mean final score over test rows, sum_j n_j R[T, j] / sum_j n_j: a task counts by its rows. Higher is better.

    It stands beside the macro mean, :func:`average_accuracy`, in which every task counts the same (micro and macro
    averages: Manning, Raghavan & Schuetze 2008, Introduction to Information Retrieval, section 13.6).

    Args:
        final: R[T, j], shape (T,): scores that are means over rows, so not R2.
        num_rows: n_j, shape (T,), each at least 1.
    """
    values, counts = np.asarray(final, dtype=float), np.asarray(num_rows, dtype=float)
    if values.ndim != 1 or values.shape != counts.shape or not (np.isnan(counts) | (counts >= 1)).all():
        raise ValueError(
            f"final scores {values.shape} and row counts {counts.shape}: one of each a task, counts from 1"
        )
    return float((values * counts).sum() / counts.sum()) if values.size else float("nan")


def learning_accuracy(scores: ArrayLike) -> float:
    """(1/T) sum_j R[j, j], the mean score just after training. Higher is better (Riemer et al. 2019)."""
    return _mean(just_trained(scores))


def average_incremental_accuracy(scores: ArrayLike) -> float:
    """Mean over stages k of (1/k) sum_{j<=k} R[k, j]. Higher is better (iCaRL)."""
    matrix = _matrix(scores)
    return _mean(np.array([matrix[stage, :stage].mean() for stage in range(1, len(matrix))]))


def backward_transfer(scores: ArrayLike) -> float:
    """BWT = 1/(T-1) sum_{j<T} (R[T, j] - R[j, j]). Negative means forgetting; NaN for one stage."""
    matrix = _matrix(scores)
    return _mean((matrix[-1] - just_trained(matrix))[:-1])


def forward_transfer(scores: ArrayLike) -> float:
    """FWT = 1/(T-1) sum_{j>=2} (R[j-1, j] - R[0, j]): what earlier stages gave untrained tasks. NaN for T = 1."""
    matrix = _matrix(scores)
    return _mean(np.array([matrix[task, task] - matrix[0, task] for task in range(1, matrix.shape[1])]))


def forgetting_by_task(scores: ArrayLike, stage: int | None = None) -> Array:
    """Return max_{1<=l<k} R[l, j] - R[k, j] for the tasks j < k, shape (k - 1,).

    Args:
        scores: The score matrix, shape (T + 1, T).
        stage: k, from 1 to T; by default T.

    Neither the untrained row 0 nor row k itself is in the maximum, so that improvement reads as negative forgetting.
    """
    matrix = _matrix(scores)
    stage = _stage(stage, matrix.shape[1])
    earlier = matrix[1:stage, : stage - 1]
    return earlier.max(axis=0) - matrix[stage, : stage - 1] if earlier.size else np.empty(0)


def forgetting(scores: ArrayLike, stage: int | None = None) -> float:
    """F_k = mean of :func:`forgetting_by_task` (Chaudhry et al. 2018). Lower is better; NaN at the first stage."""
    return _mean(forgetting_by_task(scores, stage))


def intransigence(scores: ArrayLike, joint: ArrayLike, stage: int | None = None) -> float:
    """I_k = a*_k - R[k, k] (Chaudhry et al. 2018). Lower is better.

    Args:
        scores: The score matrix, shape (T + 1, T).
        joint: a*, shape (T,): the score on task k of a model trained jointly on stages 1..k.
        stage: k, from 1 to T; by default T.
    """
    diagonal, reference = just_trained(scores), np.asarray(joint, dtype=float)
    if reference.shape != diagonal.shape:
        raise ValueError(f"joint scores have shape {reference.shape}; the matrix has {len(diagonal)} tasks")
    stage = _stage(stage, len(diagonal))
    return float(reference[stage - 1] - diagonal[stage - 1])

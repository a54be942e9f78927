"""Agreement with avalanche-lib where the definitions coincide: ``pip install -e '.[avalanche]'``, else skipped.

Avalanche's matrices have no untrained row; what it calls forgetting is first minus last, which is minus our backward
transfer and, where a score recovers or peaks late, not the forgetting of Chaudhry et al. that ours is.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from analysis.measures import forgetting as ours

functional = pytest.importorskip("avalanche.evaluation.functional", reason="needs pip install 'continual[avalanche]'")
metrics = pytest.importorskip("avalanche.evaluation.metrics")

LATE = [  # worked by hand: the first task recovers beyond its own stage, the second peaks a stage late
    [0.0, 0.1, 0.2, 0.3],
    [0.9, 0.2, 0.2, 0.4],
    [0.5, 0.8, 0.1, 0.4],
    [0.7, 0.9, 0.6, 0.2],
    [1.0, 0.6, 0.6, 0.5],
]
matrices = st.integers(2, 6).flatmap(lambda num: arrays.arrays(float, (num + 1, num), elements=st.floats(0, 1)))


def recorded(metric, scores: np.ndarray) -> dict[int, float]:
    """Give a metric of what came after training what its plugin would: each task's own score, then its final one."""
    for task in range(scores.shape[1]):
        metric.update(task, float(scores[task + 1, task]), initial=True)
    for task in range(scores.shape[1] - 1):
        metric.update(task, float(scores[-1, task]))
    return metric.result()


def mean(values) -> float:
    """Return avalanche's own running mean."""
    running = metrics.Mean()
    for value in values:
        running.update(float(value))
    return running.result()


@given(matrices)
def test_average_accuracy_is_the_mean_of_the_last_evaluation(scores: np.ndarray) -> None:
    assert ours.average_accuracy(scores) == pytest.approx(mean(scores[-1]), abs=1e-9)


@given(matrices)
def test_backward_transfer(scores: np.ndarray) -> None:
    found = recorded(metrics.BWT(), scores)
    assert ours.backward_transfer(scores) == pytest.approx(mean(found.values()), abs=1e-9)
    lost = functional.forgetting(scores[1:])[-1, :-1]
    assert ours.backward_transfer(scores) == pytest.approx(-lost.mean(), abs=1e-9)


@given(matrices)
def test_forward_transfer(scores: np.ndarray) -> None:
    metric = metrics.ForwardTransfer()
    for task in range(1, scores.shape[1]):
        metric.update(task, float(scores[0, task]), initial=True)
        metric.update(task, float(scores[task, task]))
    assert ours.forward_transfer(scores) == pytest.approx(mean(metric.result().values()), abs=1e-9)


@given(matrices)
def test_forgetting_where_scores_never_recover(scores: np.ndarray) -> None:
    falling = scores.copy()
    for task in range(scores.shape[1]):
        falling[task + 1 :, task] = -np.sort(-scores[task + 1 :, task])
        falling[: task + 1, task] = 0.0
    found = recorded(metrics.Forgetting(), falling)
    assert ours.forgetting_by_task(falling) == pytest.approx(list(found.values()), abs=1e-9)
    assert ours.forgetting_by_task(falling) == pytest.approx(functional.forgetting(falling[1:])[-1, :-1], abs=1e-9)


def test_where_a_score_peaks_late_the_two_forgettings_differ() -> None:
    scores = np.array(LATE)
    assert recorded(metrics.Forgetting(), scores) == pytest.approx({0: -0.1, 1: 0.2, 2: 0.0})
    assert ours.forgetting_by_task(scores) == pytest.approx([-0.1, 0.3, 0.0])

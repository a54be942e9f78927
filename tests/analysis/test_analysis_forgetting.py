"""Forgetting and transfer, worked by hand on a 3-stage and a 4-stage matrix, and properties of any matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from analysis.measures import forgetting as f

THREE = [  # rows: untrained, after stage 1, 2, 3
    [0.1, 0.2, 0.3],
    [0.8, 0.3, 0.3],
    [0.6, 0.9, 0.5],
    [0.7, 0.5, 0.6],
]
FOUR = [  # the first task recovers beyond its own stage, the second peaks a stage late
    [0.0, 0.1, 0.2, 0.3],
    [0.9, 0.2, 0.2, 0.4],
    [0.5, 0.8, 0.1, 0.4],
    [0.7, 0.9, 0.6, 0.2],
    [1.0, 0.6, 0.6, 0.5],
]


@pytest.mark.parametrize(
    ("measure", "three", "four"),
    [
        (f.average_accuracy, (0.7 + 0.5 + 0.6) / 3, (1.0 + 0.6 + 0.6 + 0.5) / 4),
        (f.learning_accuracy, (0.8 + 0.9 + 0.6) / 3, (0.9 + 0.8 + 0.6 + 0.5) / 4),
        (f.backward_transfer, (-0.1 - 0.4) / 2, (0.1 - 0.2 + 0.0) / 3),
        (f.forward_transfer, (0.1 + 0.2) / 2, (0.1 - 0.1 - 0.1) / 3),
        (f.forgetting, (0.1 + 0.4) / 2, (-0.1 + 0.3 + 0.0) / 3),
        (f.average_incremental_accuracy, (0.8 + 0.75 + 0.6) / 3, (0.9 + 0.65 + 2.2 / 3 + 0.675) / 4),
    ],
)
def test_measures_worked_by_hand(measure, three: float, four: float) -> None:
    assert measure(THREE) == pytest.approx(three, abs=1e-12)
    assert measure(FOUR) == pytest.approx(four, abs=1e-12)


def test_forgetting_by_task_and_stage_worked_by_hand() -> None:
    assert f.forgetting_by_task(FOUR) == pytest.approx([0.9 - 1.0, 0.9 - 0.6, 0.6 - 0.6])
    assert f.forgetting_by_task(FOUR, stage=3) == pytest.approx([0.9 - 0.7, 0.8 - 0.9])
    assert f.forgetting(FOUR, stage=3) == pytest.approx(0.05)
    assert np.isnan(f.forgetting(FOUR, stage=1))


def test_improvement_is_negative_forgetting() -> None:
    """The final row is not in the maximum, and neither is the untrained one."""
    assert f.forgetting([[0.9, 0.0], [0.2, 0.0], [0.6, 0.5]]) == pytest.approx(-0.4)


def test_intransigence_worked_by_hand() -> None:
    assert f.intransigence(THREE, [0.85, 0.9, 0.8]) == pytest.approx(0.8 - 0.6)
    assert f.intransigence(THREE, [0.85, 0.9, 0.8], stage=1) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="3 tasks"):
        f.intransigence(THREE, [0.8])


def test_one_stage_leaves_differences_undefined() -> None:
    single = [[0.1], [0.7]]
    assert f.average_accuracy(single) == f.learning_accuracy(single) == f.average_incremental_accuracy(single) == 0.7
    assert all(np.isnan(measure(single)) for measure in (f.backward_transfer, f.forward_transfer, f.forgetting))


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (1, 0), (4,)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rows"):
        f.average_accuracy(np.zeros(shape))


@pytest.mark.parametrize("stage", [0, 4])
def test_a_stage_outside_the_run_is_refused(stage: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 3"):
        f.forgetting(THREE, stage)


matrices = st.integers(2, 6).flatmap(lambda num: arrays.arrays(float, (num + 1, num), elements=st.floats(0, 1)))


@given(matrices)
def test_backward_transfer_is_final_minus_just_trained(scores: np.ndarray) -> None:
    num = scores.shape[1]
    lost = f.average_accuracy(scores) * num - scores[-1, -1] - (f.learning_accuracy(scores) * num - scores[-1, -1])
    assert f.backward_transfer(scores) == pytest.approx(lost / (num - 1), abs=1e-9)


@given(matrices)
def test_forgetting_is_at_least_minus_backward_transfer(scores: np.ndarray) -> None:
    assert f.forgetting(scores) >= -f.backward_transfer(scores) - 1e-9


@given(matrices)
def test_forgetting_is_minus_backward_transfer_where_scores_never_recover(scores: np.ndarray) -> None:
    falling = scores.copy()
    for task in range(scores.shape[1]):
        falling[task + 1 :, task] = -np.sort(-scores[task + 1 :, task])
        falling[: task + 1, task] = 0.0
    assert f.forgetting(falling) == pytest.approx(-f.backward_transfer(falling), abs=1e-9)


@given(matrices, st.floats(-2, 2))
def test_differences_ignore_a_constant_added_to_every_score(scores: np.ndarray, constant: float) -> None:
    for measure in (f.backward_transfer, f.forward_transfer, f.forgetting):
        assert measure(scores + constant) == pytest.approx(measure(scores), abs=1e-9)


@given(matrices)
def test_no_measure_changes_its_input(scores: np.ndarray) -> None:
    before = scores.copy()
    for measure in (f.average_accuracy, f.backward_transfer, f.forward_transfer, f.forgetting, f.learning_accuracy):
        measure(scores)
    assert np.array_equal(scores, before)


@given(matrices)
def test_a_missing_score_is_never_skipped(scores: np.ndarray) -> None:
    scores[-1, 0] = np.nan
    assert (
        np.isnan(f.average_accuracy(scores))
        and np.isnan(f.backward_transfer(scores))
        and np.isnan(f.forgetting(scores))
    )

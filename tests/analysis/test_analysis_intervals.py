"""Intervals: redrawn matrices keep what must be kept, and correlations have theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import load_run, summarise
from analysis.measures import forgetting
from analysis.summaries import intervals
from analysis.summaries.intervals import bootstrap_matrices, correlation_interval, interval, rank_correlation


def frames(earned: np.ndarray, metric: str = "score") -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Answers and headline scores of ``earned``, shape (S + 1, T, rows)."""
    stage, task, row = np.indices(earned.shape)
    names = [f"task{index}" for index in range(earned.shape[1])]
    answers = pd.DataFrame({"stage": stage.ravel(), "row": row.ravel(), "value": earned.ravel()})
    answers["task"] = pd.Categorical([names[index] for index in task.ravel()], categories=names, ordered=True)
    matrix = earned.mean(axis=-1)
    scores = pd.DataFrame({"stage": 0, "task": pd.Categorical(names, categories=names, ordered=True), "metric": metric})
    return answers, scores, matrix


def test_the_same_rows_score_every_stage() -> None:
    """A task that no stage changes has no spread in its difference between stages."""
    earned = np.repeat(np.random.default_rng(0).random((1, 2, 30)), 3, axis=0)
    drawn = bootstrap_matrices(*frames(earned))
    assert interval(drawn, forgetting.backward_transfer) == pytest.approx((0, 0), abs=1e-12)
    low, high = interval(drawn, forgetting.average_accuracy) or (0, 0)
    assert low < earned[0].mean() < high


def test_answers_that_are_not_the_scores_are_refused() -> None:
    answers, scores, matrix = frames(np.random.default_rng(0).random((3, 2, 10)))
    with pytest.raises(ValueError, match="answers of task0 is not its recorded score"):
        bootstrap_matrices(answers, scores, matrix + 0.1)
    with pytest.raises(ValueError, match="task1 are not recorded for every stage"):
        bootstrap_matrices(answers[(answers["task"] != "task1") | (answers["stage"] != 2)], scores, matrix)


def test_r2_is_redrawn_from_squared_errors() -> None:
    errors = np.random.default_rng(0).random((3, 2, 50))
    answers, scores, means = frames(errors, "r2")
    matrix = 1 - means / 0.4
    drawn = bootstrap_matrices(answers, scores, matrix)
    assert drawn.mean(axis=0) == pytest.approx(matrix, abs=0.05)
    assert drawn.std(axis=0).min() > 0


def test_intervals_of_a_run_hold_its_values(small_run: Path) -> None:
    summary = summarise(load_run(small_run))
    assert set(summary.intervals) >= {"average_accuracy", "backward_transfer", "forgetting", "forward_transfer"}
    for key, (low, high) in summary.intervals.items():
        assert low <= (summary.values[key] or 0.0) <= high


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [-1, -2, -30]) == pytest.approx(-1)
    assert np.isnan(rank_correlation([1, 2, 3], [5, 5, 5])) and np.isnan(rank_correlation([], []))


def test_a_correlation_of_few_points_has_no_interval() -> None:
    assert correlation_interval([1, 2, 3, 4], [1, 2, 3, 4]) is None
    low, high = correlation_interval(range(30), range(30)) or (0, 0)
    assert low == pytest.approx(1) and high == pytest.approx(1)
    assert intervals.correlation_interval([1] * 9, range(9)) is None


def test_an_r2_by_row_needs_one_scored_stage_alone() -> None:
    """Joint training scored at the end alone: the stage that was not scored must not spoil the other."""
    errors = np.array([[1.0, 2.0, 3.0], [np.nan] * 3])
    found = intervals.r2_by_row(errors, np.array([0.5, np.nan]))
    assert found[0] == pytest.approx([0.75, 0.5, 0.25]) and np.isnan(found[1]).all()

"""Coverage on simulated data: intervals hold the truth about as often as they say, and a wrong interval would not.

Each kind is simulated ``TRIALS`` times with a fixed seed. A level is met when the share of intervals that hold the
truth lies within ``TOLERANCE`` of it: 2.6 standard errors of a share of one half, and room for what a percentile
interval of a few hundred draws lacks. Intervals of 0.7 times the width, and of 1.5 times, fall outside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest

from analysis.measures import forgetting, hierarchy
from analysis.summaries.intervals import bootstrap_matrices, interval

TRIALS, TOLERANCE = 300, 0.075
LEVELS = (0.5, 0.8, 0.95)
CHANCES = ((0.2, 0.3), (0.7, 0.3), (0.5, 0.6))
Spans = list[dict[float, tuple[float, float]]]


def coverage(spans: Spans, truth: float, scale: float = 1.0) -> dict[float, float]:
    """Return, for each level, how often the intervals hold ``truth``, made wider or narrower about their middle."""
    found = {}
    for level in LEVELS:
        low, high = np.array([span[level] for span in spans]).T
        middle, half = (low + high) / 2, scale * (high - low) / 2
        found[level] = float((np.abs(middle - truth) <= half).mean())
    return found


def meets(found: dict[float, float]) -> bool:
    return all(abs(share - level) <= TOLERANCE for level, share in found.items())


def check(spans: Spans, truth: float) -> None:
    """Assert that the intervals cover as they say, and that the tolerance tells narrower and wider ones from them."""
    assert meets(coverage(spans, truth)), coverage(spans, truth)
    assert not meets(coverage(spans, truth, 0.7)) and not meets(coverage(spans, truth, 1.5))


def answers_of(earned: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Return answers and headline scores of ``earned``, shape (S + 1, T, rows), and the score matrix."""
    stage, task, row = np.indices(earned.shape)
    names = [f"task{index}" for index in range(earned.shape[1])]
    answers = pd.DataFrame({"stage": stage.ravel(), "row": row.ravel(), "value": earned.ravel()})
    answers["task"] = pd.Categorical.from_codes(task.ravel(), categories=names, ordered=True)
    scores = pd.DataFrame(
        {"stage": 0, "task": pd.Categorical(names, categories=names, ordered=True), "metric": "score"}
    )
    return answers, scores, earned.mean(axis=-1)


@pytest.fixture(scope="module")
def drawn_runs() -> list[np.ndarray]:
    """Redrawn matrices of runs with the true scores ``CHANCES``, whose rows are hard or easy alike at every stage."""
    generator, found = np.random.default_rng(1), []
    limits = np.array([[NormalDist().inv_cdf(chance) for chance in stage] for stage in CHANCES])[..., None]
    for _ in range(TRIALS):
        difficulty = 0.8**0.5 * generator.normal(size=(1, 2, 60)) + 0.2**0.5 * generator.normal(size=(3, 2, 60))
        found.append(bootstrap_matrices(*answers_of((difficulty < limits).astype(float)), num_draws=250))
    return found


def spans_of(drawn: Iterable[np.ndarray], measure) -> Spans:
    return [{level: interval(matrices, measure, level) or (np.nan, np.nan) for level in LEVELS} for matrices in drawn]


@pytest.mark.parametrize(
    ("measure", "truth"),
    [(forgetting.average_accuracy, 0.55), (forgetting.backward_transfer, -0.2)],
    ids=["average", "paired over stages"],
)
def test_a_runs_intervals_over_its_test_rows(drawn_runs: list[np.ndarray], measure, truth: float) -> None:
    check(spans_of(drawn_runs, measure), truth)


def paired(orders: list[int], generator: np.random.Generator, seed: int) -> dict[float, tuple[float, float]]:
    """Return the intervals of a simulated difference of 0.1 to which orders, seeds and shared test rows each add."""
    num = len(orders)
    by_order = 0.04 * generator.normal(size=max(orders) + 1)[orders]
    by_cell = 0.1 + by_order + 0.03 * generator.normal(size=num)
    tasks = [
        by_cell[:, None] + 0.5 * generator.normal(size=60) + 0.3 * generator.normal(size=(num, 60)) for _ in range(3)
    ]
    draws = np.random.default_rng(seed)
    weights = hierarchy.cell_weights(orders, draws, 400)
    found = hierarchy.means(tasks, weights, [hierarchy.row_counts(60, draws, 400) for _ in tasks])
    return {level: hierarchy.interval(found, level) for level in LEVELS}


def test_the_hierarchical_paired_intervals_of_a_sweep() -> None:
    generator = np.random.default_rng(4)
    orders = [order for order in range(12) for _ in range(2)]
    check([paired(orders, generator, seed) for seed in range(TRIALS)], 0.1)


def test_over_five_cells_or_fewer_an_interval_of_the_cells_is_too_narrow() -> None:
    """Why a report calls such an interval rough: redrawing five values cannot show how far others may lie."""
    generator, orders, spans = np.random.default_rng(5), list(range(hierarchy.FEW_CELLS)), []
    for seed in range(TRIALS):
        values = 0.1 + 0.04 * generator.normal(size=len(orders))
        weights = hierarchy.cell_weights(orders, np.random.default_rng(seed), 400)
        spans.append({level: hierarchy.interval(weights @ values, level) for level in LEVELS})
    assert 0.70 < coverage(spans, 0.1)[0.95] < 0.92


def test_intervals_have_a_fixed_seed() -> None:
    earned = np.random.default_rng(0).random((3, 2, 30))
    first, second = (bootstrap_matrices(*answers_of(earned)) for _ in range(2))
    assert np.array_equal(first, second)

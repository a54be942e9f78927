"""Routing measures, worked by hand, and the properties that each must have for any usage."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from analysis.measures import routing as r
from analysis.measures.clusters import Merge, average_linkage, leaf_order
from continual.measures import distances

LN2 = log(2)


def test_entropy_by_hand() -> None:
    assert distances.entropy_nats([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25] * 4]) == pytest.approx([LN2, 0, log(4)])


def test_kl_by_hand() -> None:
    p, q = [0.5, 0.5], [0.25, 0.75]
    assert distances.kl_divergence(p, q, epsilon=0) == pytest.approx(0.5 * log(2) + 0.5 * log(2 / 3))
    assert distances.kl_divergence(p, q) == pytest.approx(0.14384, abs=1e-5)
    assert distances.kl_divergence([1, 0], [0, 1]) == pytest.approx(log(1 + 1e6) / (1 + 2e-6))
    smoothed = [(0.5 + 1e-6) / (1 + 3e-6), (0.5 + 1e-6) / (1 + 3e-6), 1e-6 / (1 + 3e-6)]
    other = [(0.2 + 1e-6) / (1 + 3e-6), (0.3 + 1e-6) / (1 + 3e-6), (0.5 + 1e-6) / (1 + 3e-6)]
    expected = sum(a * log(a / b) for a, b in zip(smoothed, other, strict=True))
    assert distances.kl_divergence([0.5, 0.5, 0], [0.2, 0.3, 0.5]) == pytest.approx(expected)


def test_js_and_total_variation_by_hand() -> None:
    assert distances.js_divergence([1, 0], [0, 1]) == pytest.approx(LN2)
    assert distances.js_divergence([1, 0], [0.5, 0.5]) == pytest.approx(
        0.5 * log(4 / 3) + 0.25 * log(2 / 3) + 0.25 * log(2)
    )
    assert distances.total_variation([1, 0], [0.5, 0.5]) == pytest.approx(0.5)
    assert distances.total_variation([0.7, 0.3, 0], [0.1, 0.3, 0.6]) == pytest.approx(0.6)


def test_separation_is_the_mean_of_the_blocks_by_hand() -> None:
    usage = [[[1, 0], [1, 0]], [[0, 1], [1, 0]], [[0.5, 0.5], [1, 0]]]  # three tasks, two blocks, two atoms
    half = 0.5 * log(4 / 3) + 0.25 * log(2 / 3) + 0.25 * log(2)
    expected = np.array([[0, LN2, half], [LN2, 0, half], [half, half, 0]]) / 2
    assert r.pairwise(usage) == pytest.approx(expected)
    assert r.off_diagonal_mean(expected) == pytest.approx((2 * LN2 + 4 * half) / 12)
    assert np.isnan(r.off_diagonal_mean([[0.0]]))


def test_drift_does_not_let_blocks_cancel() -> None:
    """Over blocks, usage is (1/2, 1/2) at both stages; each block has moved altogether."""
    usage = [[[[1, 0], [0, 1]]], [[[0, 1], [1, 0]]]]
    assert r.drift(usage) == pytest.approx(np.array([[LN2]]))
    assert r.drift(usage, distances.total_variation) == pytest.approx(np.array([[1.0]]))


def test_route_drift_counts_learnt_tasks_only() -> None:
    drift = [  # rows: stages 1 to 4; only the cells left of the diagonal are of learnt tasks
        [9, 9, 9, 9],
        [0.1, 9, 9, 9],
        [0.2, 0.3, 9, 9],
        [0.4, 0.5, 0.9, 9],
    ]
    assert r.route_drift(drift) == pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 0.9) / 6)
    assert np.isnan(r.route_drift([[0.1]]))


def test_atom_entropy_by_hand() -> None:
    usage = [[0.5, 0.5, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]]
    assert r.atom_entropy(usage) == pytest.approx([1, 0, 0, np.nan], nan_ok=True)
    third = (-(0.25 * log(0.25) + 0.75 * log(0.75))) / log(2)
    assert r.atom_entropy([[0.1, 0.9], [0.3, 0.7]])[0] == pytest.approx(third)
    assert np.isnan(r.atom_entropy([[0.5, 0.5]])).all()


def test_dead_atoms_by_hand() -> None:
    usage = np.array(
        [[[0.96, 0.02, 0.02, 0.0]], [[0.93, 0.03, 0.02, 0.02]]]
    )  # two tasks, one block; 1 / (10 M) = 0.025
    assert r.dead_atoms(usage).tolist() == [False, False, True, True]
    blocks = np.array([[[0.97, 0.03, 0, 0], [1, 0, 0, 0]]])  # alive in one block is alive
    assert r.dead_atoms(blocks).tolist() == [False, False, True, True]


def test_information_by_hand() -> None:
    assert r.task_information_nats([[[1, 0]], [[0, 1]]]) == pytest.approx(LN2)
    assert r.task_information_nats([[[0.3, 0.7]], [[0.3, 0.7]]]) == pytest.approx(0)
    mix = -(0.25 * log(0.25) + 0.75 * log(0.75))
    assert r.task_information_nats([[[1, 0]], [[0, 1]]], [0.25, 0.75]) == pytest.approx(mix)
    assert r.token_information_nats([0.9, 0.7], [0.4, 0.2]) == pytest.approx(0.5)


def test_average_linkage_by_hand() -> None:
    """Items 0 and 2 are nearest (1); 1 joins 3 (2); the two pairs are (6 + 8 + 7 + 5) / 4 apart."""
    distances = [[0, 6, 1, 8], [6, 0, 7, 2], [1, 7, 0, 5], [8, 2, 5, 0]]
    assert average_linkage(distances) == [Merge(0, 2, 1.0), Merge(1, 3, 2.0), Merge(4, 5, 6.5)]
    assert leaf_order(average_linkage(distances), 4) == [0, 2, 1, 3]
    assert average_linkage([[0.0]]) == [] and leaf_order([], 1) == [0]


def usages(*leading: int, atoms: int | None = None) -> st.SearchStrategy[np.ndarray]:
    def of(num_atoms: int) -> st.SearchStrategy[np.ndarray]:
        raw = arrays.arrays(float, (*leading, num_atoms), elements=st.floats(0, 1))
        return raw.map(lambda value: (value + 1e-9) / (value + 1e-9).sum(axis=-1, keepdims=True))

    return of(atoms) if atoms else st.integers(2, 8).flatmap(of)


@given(usages(2))
def test_distances_have_their_bounds_and_are_0_on_equals(pair: np.ndarray) -> None:
    p, q = pair
    assert distances.kl_divergence(p, q) >= 0
    assert 0 <= distances.js_divergence(p, q) <= LN2
    assert 0 <= distances.total_variation(p, q) <= 1 + 1e-12
    for distance in (distances.kl_divergence, distances.js_divergence, distances.total_variation):
        assert distance(p, p) == pytest.approx(0, abs=1e-12)
    assert distances.js_divergence(p, q) == pytest.approx(float(distances.js_divergence(q, p)), abs=1e-12)


@given(usages(1))
def test_entropy_is_at_most_ln_m(usage: np.ndarray) -> None:
    assert 0 <= distances.entropy_nats(usage)[0] <= log(usage.shape[-1]) + 1e-9


@given(usages(2), st.integers(1, 5))
def test_appended_unused_atoms_change_neither_js_nor_entropy(pair: np.ndarray, extra: int) -> None:
    longer = np.pad(pair, [(0, 0), (0, extra)])
    assert distances.js_divergence(*longer) == pytest.approx(float(distances.js_divergence(*pair)), abs=1e-12)
    assert distances.js_divergence(pair[0], longer[1]) == pytest.approx(
        float(distances.js_divergence(*pair)), abs=1e-12
    )
    assert distances.entropy_nats(longer) == pytest.approx(distances.entropy_nats(pair), abs=1e-12)


@given(usages(3, 2), st.permutations([0, 1, 2]))
def test_measures_follow_the_tasks_not_their_order(usage: np.ndarray, order: list[int]) -> None:
    assert r.pairwise(usage[order]) == pytest.approx(r.pairwise(usage)[np.ix_(order, order)], abs=1e-9)
    assert r.atom_entropy(usage[order]) == pytest.approx(r.atom_entropy(usage), abs=1e-9)
    assert r.task_information_nats(usage[order]) == pytest.approx(r.task_information_nats(usage), abs=1e-9)
    assert (r.dead_atoms(usage[order]) == r.dead_atoms(usage)).all()


@given(usages(4, 1))
def test_information_is_the_mean_divergence_from_the_mixture(usage: np.ndarray) -> None:
    mixture = usage.mean(axis=0)
    expected = np.mean([distances.kl_divergence(task, mixture, epsilon=0) for task in usage])
    assert r.task_information_nats(usage) == pytest.approx(expected, abs=1e-9)
    assert -1e-12 <= r.task_information_nats(usage) <= log(4) + 1e-9

"""Rows held out of training: each label in its share, groups whole, drawn by the seed and not by their place."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.data.held_out import held_out
from continual.errors import ConfigError


def rows_of(*counts: int) -> list[dict[str, Any]]:
    """Return rows sorted by label, as tables often are."""
    return [{"answer": chr(ord("a") + label)} for label, count in enumerate(counts) for _ in range(count)]


def test_no_label_of_a_sorted_table_is_held_out_whole() -> None:
    rows = rows_of(60, 30, 10)
    found = held_out(rows, 20, seed=3, labelled=True)
    assert Counter(rows[index]["answer"] for index in found) == {"a": 12, "b": 6, "c": 2}
    assert held_out(rows, 20, seed=3, labelled=True) == found != held_out(rows, 20, seed=4, labelled=True)


def test_free_answers_are_drawn_from_all_rows() -> None:
    found = held_out([{"answer": str(index)} for index in range(100)], 20, seed=0, labelled=False)
    assert len(found) == 20 and min(found) < 50 < max(found)


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6), share=st.floats(0, 0.99), seed=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_so_many_are_held_out_and_labels_of_several_rows_stay_trained(
    counts: list[int], share: float, seed: int
) -> None:
    rows = rows_of(*counts)
    num_rows = int(share * len(rows))
    found = held_out(rows, num_rows, seed, labelled=True)
    assert len(found) == num_rows
    left = Counter(rows[index]["answer"] for index in set(range(len(rows))) - found)
    if num_rows <= sum(max(count - 1, 0) for count in counts):
        assert all(left[chr(ord("a") + label)] for label, count in enumerate(counts) if count > 1)


def test_groups_stay_whole() -> None:
    rows = [{"answer": "a", "group": f"passage {index // 3}" if index < 30 else ""} for index in range(36)]
    found = held_out(rows, 10, seed=1, labelled=True)
    assert 8 <= len(found) <= 10
    for passage in range(10):
        assert len(found & {3 * passage, 3 * passage + 1, 3 * passage + 2}) in (0, 3)
    with pytest.raises(ConfigError, match=r"validation_rows \(2\) holds no group of rows: the smallest has 3"):
        held_out(rows[:30], 2, seed=1, labelled=True)

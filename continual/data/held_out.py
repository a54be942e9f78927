"""Which training rows are held out of training: drawn by a seed, each label in its share, groups whole."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from continual.errors import ConfigError


def held_out(rows: Sequence[Mapping[str, Any]], num_rows: int, seed: int, labelled: bool) -> set[int]:
    """Return the indices of the rows to hold out.

    Args:
        rows: The training rows, as ``Task.rows`` gives them.
        num_rows: How many; at most so many where rows have a group (or are parts of one question, a unit), of which
            none stands on both sides. Below the number of all rows.
        seed: Decides which.
        labelled: Whether each answer is to be held out in its share of all rows. A label with several rows keeps one
            to be trained on.

    Raises:
        ConfigError: Every group is larger than ``num_rows``.
    """
    draw = random.Random(f"held out {seed}")
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        name = row.get("group") or row.get("unit")
        groups.setdefault(("group", name) if name else ("row", index), []).append(index)
    if len(groups) < len(rows):
        return _whole_groups(list(groups.values()), num_rows, draw)
    by_label: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        by_label.setdefault(row["answer"] if labelled else None, []).append(index)
    shares = _shares({label: len(own) for label, own in by_label.items()}, num_rows)
    return {index for label, own in by_label.items() for index in draw.sample(own, shares[label])}


def _whole_groups(groups: list[list[int]], num_rows: int, draw: random.Random) -> set[int]:
    draw.shuffle(groups)
    found: set[int] = set()
    for group in groups:
        if len(found) + len(group) <= num_rows:
            found.update(group)
    if num_rows and not found:
        least = min(map(len, groups))
        raise ConfigError(f"data.validation_rows ({num_rows}) holds no group of rows: the smallest has {least}")
    return found


def _shares(counts: Mapping[Any, int], num_rows: int) -> dict[Any, int]:
    """Return how many rows of each label are held out, by the largest remainders."""
    total = sum(counts.values())
    shares = {label: num_rows * count // total for label, count in counts.items()}
    remainder = {label: (num_rows * count % total, count) for label, count in counts.items()}
    order = sorted(counts, key=lambda label: remainder[label], reverse=True)
    spare = [*(label for label in order if counts[label] > 1), *(label for label in order if counts[label] == 1)]
    while (left := num_rows - sum(shares.values())) > 0:
        able = [label for label in spare if shares[label] < counts[label] - (counts[label] > 1)]
        for label in (able or [label for label in spare if shares[label] < counts[label]])[:left]:
            shares[label] += 1
    return shares

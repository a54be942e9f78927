"""Average-linkage clustering (UPGMA, Sokal & Michener 1958) of a few items, for the order and tree of a heat map."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Merge(NamedTuple):
    """Two clusters that become one: items are 0..n-1, and merge i makes cluster n + i."""

    left: int
    right: int
    distance: float


def average_linkage(distances: ArrayLike) -> list[Merge]:
    """Return the merges, nearest clusters first; ties go to the clusters that were made first.

    Args:
        distances: Symmetric, shape (n, n).
    """
    square = np.asarray(distances, dtype=float)
    members = {item: [item] for item in range(len(square))}
    merges: list[Merge] = []
    while len(members) > 1:
        pairs = [(left, right) for left in members for right in members if left < right]
        spans = [float(square[np.ix_(members[left], members[right])].mean()) for left, right in pairs]
        nearest = int(np.argmin(spans))
        left, right = pairs[nearest]
        members[len(square) + len(merges)] = members.pop(left) + members.pop(right)
        merges.append(Merge(left, right, spans[nearest]))
    return merges


def leaf_order(merges: list[Merge], num_items: int) -> list[int]:
    """Return the items in an order in which every cluster is contiguous."""
    members = {item: [item] for item in range(num_items)}
    for index, merge in enumerate(merges):
        members[num_items + index] = members.pop(merge.left) + members.pop(merge.right)
    return [item for cluster in members.values() for item in cluster]

"""Entropies of usages of a bank's atoms, and distances between them.

A usage is a distribution over M atoms on the last axis (sums to 1). All logarithms are natural (nats).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

EPSILON = 1e-6
"""What KL adds to every atom's usage, so that an atom that one side never used leaves it finite."""
LN2_NATS = float(np.log(2.0))


def _aligned(first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    """Return both usages in one shape, broadcast, with the same number of atoms: atoms that one lacks count 0."""
    left, right = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    num_atoms = max(left.shape[-1], right.shape[-1])
    left, right = np.broadcast_arrays(_padded(left, num_atoms), _padded(right, num_atoms))
    return left, right


def _padded(usage: Array, num_atoms: int) -> Array:
    widths = [(0, 0)] * (usage.ndim - 1) + [(0, num_atoms - usage.shape[-1])]
    return np.pad(usage, widths)


def _p_log_ratio(p: Array, q: Array) -> Array:
    """Return p ln(p / q), with 0 where p is 0."""
    used = p > 0
    ratio = np.divide(p, q, out=np.ones_like(p), where=used)
    return np.where(np.isnan(p) | np.isnan(q), np.nan, p * np.log(ratio, out=np.zeros_like(p), where=used))


def entropy_nats(usage: ArrayLike) -> Array:
    """H = - sum_m p_m ln p_m over the last axis, in nats: 0 for one atom, ln M when all are used alike."""
    p = np.asarray(usage, dtype=float)
    return np.maximum(-_p_log_ratio(p, np.ones_like(p)).sum(axis=-1), 0.0)


def kl_divergence(first: ArrayLike, second: ArrayLike, epsilon: float = EPSILON) -> Array:
    """KL(p' || q') in nats over the last axis, with p' = (p + epsilon) / (1 + M epsilon)."""
    p, q = _aligned(first, second)
    scale = 1.0 + p.shape[-1] * epsilon
    p, q = (p + epsilon) / scale, (q + epsilon) / scale
    return np.maximum((p * np.log(p / q)).sum(axis=-1), 0.0)


def js_divergence(first: ArrayLike, second: ArrayLike) -> Array:
    """Jensen-Shannon divergence in nats over the last axis: 0 for equals, ln 2 for usages that share no atom."""
    p, q = _aligned(first, second)
    middle = (p + q) / 2
    divergence = (_p_log_ratio(p, middle) + _p_log_ratio(q, middle)).sum(axis=-1) / 2
    return np.clip(divergence, 0.0, LN2_NATS)


def total_variation(first: ArrayLike, second: ArrayLike) -> Array:
    """Half the summed absolute difference over the last axis, in [0, 1]; 1 minus it is the usage that both share."""
    p, q = _aligned(first, second)
    return np.abs(p - q).sum(axis=-1) / 2

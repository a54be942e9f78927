"""Which rows share a batch, and in which order batches come: rows of like length together, for little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthBatches(Sampler[list[int]]):
    """Batches of rows of like length, in an order that the seed and the epoch alone decide.

    Rows are shuffled, cut into pools of ``pool`` batches, sorted by length within a pool and batched; the batches are
    shuffled. Each pass over the sampler is the next epoch.

    Args:
        lengths: Tokens of every row.
        batch_size: Rows a batch.
        seed: Decides the order.
        pool: Batches that are sorted together; the smaller, the more random, the larger, the less padding.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 8) -> None:
        self.lengths, self.batch_size, self.seed, self.pool = lengths, batch_size, seed, pool
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size * self.pool
        pools = [sorted(order[i : i + size], key=lambda row: self.lengths[row]) for i in range(0, len(order), size)]
        batches = [p[i : i + self.batch_size] for p in pools for i in range(0, len(p), self.batch_size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


def token_batches(
    lengths: Sequence[int], extra: int, max_tokens: int, full: float = 0.25, least: int = 1
) -> list[list[int]]:
    """Return batches of row indices, longest rows first, of at most ``max_tokens`` padded tokens (at least one row).

    A batch that is full enough ends where the next row is less than two thirds as wide: few rows of very different
    lengths would else be padding for the most part.

    Args:
        lengths: Prompt tokens of every row.
        extra: Columns that scoring adds to every row (the tree of its labels, or its answer).
        max_tokens: Rows times columns of a batch.
        full: Share of ``max_tokens`` that makes a batch full enough: as many tokens as another batch costs by itself.
        least: Batches there have to be, where there are as many rows.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    width = 0
    for row in order:
        tokens = len(batches[-1]) * width if batches else max_tokens
        narrow = tokens >= full * max_tokens and 3 * (lengths[row] + extra) < 2 * width
        shared = batches and len(batches[-1]) >= max(1, len(order) // least)
        if tokens + width > max_tokens or narrow or shared or not batches:
            batches.append([])
            width = lengths[row] + extra
        batches[-1].append(row)
    return batches

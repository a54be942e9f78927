"""Which rows share a batch, and in which order batches come: rows of like length together, for little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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


class SizedBatches(Sampler[list[int]]):
    """Batches in the order of others, whose sizes are known for a whole epoch before its first batch comes.

    Args:
        batches: The batches.
        row_sizes: What every row counts: answer tokens, or 1 for a regressor's.
    """

    def __init__(self, batches: Sampler[list[int]], row_sizes: Sequence[int]) -> None:
        self.batches, self.row_sizes = batches, row_sizes
        self.sizes: list[int] = []

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        epoch = list(self.batches)
        self.sizes = [sum(self.row_sizes[row] for row in batch) for batch in epoch]
        yield from epoch

    def weight_in_step(self, index: int, num_accumulated: int, num_batches: int) -> float:
        """Return what a batch's mean loss is multiplied by so that the mean over a step's batches is that over rows.

        Args:
            index: The batch's place in the epoch under way, from 0.
            num_accumulated: Batches whose gradients are added up before a step, by whose number losses are divided;
                at an epoch's end there may be fewer.
            num_batches: Batches that are trained on in an epoch.
        """
        first = index - index % num_accumulated
        step = self.sizes[first : min(first + num_accumulated, num_batches)]
        return num_accumulated * self.sizes[index] / sum(step)


class ScoringSize(NamedTuple):
    """How large batches to score are.

    Attributes:
        tokens: Padded tokens of one, at most.
        full: Share of them that makes a batch full enough; see ``token_batches``.
        shared: Whether batches of several label tasks share a pass.
    """

    tokens: int
    full: float
    shared: bool


_GPU_WORK = 2 * 15_000 * 896**2
"""Tokens times the square of the width: twice what is computed while a pass is launched (H100, Qwen2.5-0.5B: 70 ms)."""


def scoring_size(device: str, width: int) -> ScoringSize:
    """Return how large batches to score are on a kind of device ("cpu", "cuda" ...).

    A GPU takes as long to launch the kernels of a small pass as those of a large one, and computes wide layers for
    longer: the narrower the backbone, the more tokens share a pass. What a batch takes of its memory grows with both.

    Args:
        device: Its kind.
        width: Hidden width of the backbone; 0 where there is none.
    """
    if device == "cpu":
        return ScoringSize(8192, 0.25, False)
    return ScoringSize(min(max(_GPU_WORK // max(width, 1) ** 2, 8192), 65_536), 0.5, True)


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

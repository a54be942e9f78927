"""What a run keeps in memory from stage to stage: a growing bank's slices, and nothing of those that trained them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

KINDS = (Trainer, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


def alive() -> tuple[list[int], int, int]:
    """Return how many of ``KINDS`` there are, how many tensors, and how many of those have a graph."""
    gc.collect()
    found = gc.get_objects()
    tensors = [item for item in found if isinstance(item, Tensor)]
    counts = [sum(isinstance(item, kind) for item in found) for kind in KINDS]
    return counts, len(tensors), sum(tensor.grad_fn is not None for tensor in tensors)


@pytest.mark.parametrize(
    ("strategy", "adapter", "options"),
    [("Sequential", "lora", {}), ("GrowingBank", "queryable", {"background_rows": 0, "prune_tolerance": 0})],
)
@pytest.mark.usefixtures("only_what_is_new")
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_stages_leave_nothing_but_slices(
    sequence: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, strategy: str, adapter: str, options: dict[str, Any]
) -> None:
    made = sequence(strategy, adapter, num_stages=3, **options)
    noted, found = made._note_sizes, []

    def note(index: int) -> None:
        noted(index)
        found.append((*alive(), sum(1 for _ in made.module.parameters())))

    monkeypatch.setattr(made, "_note_sizes", note)
    before, _, graphs_before = alive()
    made.run()
    kinds, tensors, graphs, parameters = zip(*found, strict=True)
    assert kinds[1] == kinds[2] == kinds[3]
    assert all(untrained - earlier <= 1 for untrained, earlier in zip(kinds[0], before, strict=True))
    assert set(graphs) == {graphs_before}
    for stage in (2, 3):
        grown = parameters[stage] - parameters[stage - 1]
        assert (grown > 0) == (strategy == "GrowingBank")
        assert tensors[stage] - tensors[stage - 1] <= grown + 12

"""The memory is a fair sample, batches are joined by its rows, and DER++ keeps the logits that the model gave."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from continual.data.batch import Row
from continual.data.batch_order import LengthBatches
from continual.runtime.parameters import evaluating
from continual.storage.files import size_bytes
from continual.strategies import DERPlusPlus, ExperienceReplay
from continual.strategies.base import Strategy
from continual.strategies.memory import RowMemory


def rows_of(answers: list[int]) -> list[Row]:
    """Return rows whose prompt is their place and whose answer is given."""
    return [Row({}, "", [place], [answer]) for place, answer in enumerate(answers)]


def test_reservoir_keeps_every_row_with_the_same_probability() -> None:
    rng, kept = random.Random(0), Counter()
    for _ in range(2000):
        memory = RowMemory(size=5)
        memory.add(rows_of([0] * 12), 1, rng)  # two stages, of 12 and 8 rows
        memory.add([Row({}, "", [12 + i], [0]) for i in range(8)], 2, rng)
        assert len(memory) == 5
        kept.update(item.row.prompt_ids[0] for item in memory.items)
    expected = 2000 * 5 / 20
    chi_square = sum((kept[row] - expected) ** 2 / expected for row in range(20))
    # A row is kept or not: its count's variance is 1 - 5/20 of its mean. 43.8: 0.999 quantile, 19 degrees of freedom.
    assert chi_square / (1 - 5 / 20) < 43.8


def test_class_balanced_memory_is_even_over_uneven_classes() -> None:
    answers = [0] * 100 + [1] * 20 + [2] * 5
    random.Random(1).shuffle(answers)
    plain, balanced = RowMemory(15), RowMemory(15, class_balanced=True)
    for memory in (plain, balanced):
        memory.add(rows_of(answers), 1, random.Random(0))
    assert Counter(item.label for item in balanced.items) == {"1:0": 5, "1:1": 5, "1:2": 5}
    assert Counter(item.label for item in plain.items)["1:0"] > 8


@pytest.mark.parametrize("class_balanced", [False, True])
def test_memory_read_back_goes_on_as_if_it_had_stayed(class_balanced: bool, tmp_path: Path) -> None:
    memory, again = RowMemory(6, class_balanced), RowMemory(6, class_balanced)
    memory.add(rows_of([0, 1, 0, 2] * 5), 1, random.Random(0))
    memory.write(tmp_path)
    again.read(tmp_path)
    for either in (memory, again):
        either.add(rows_of([3, 0] * 9), 2, random.Random(1))
    assert [(item.stage, item.row) for item in memory.items] == [(item.stage, item.row) for item in again.items]


def test_regression_rows_come_back_as_they_were(tmp_path: Path) -> None:
    numbers = {"x": torch.rand(3).tolist(), "y": torch.rand(1).item()}
    memory, again = RowMemory(2), RowMemory(2)
    memory.add([Row(numbers | {"row": 7}, "f")], 1, random.Random(0))
    memory.write(tmp_path)
    again.read(tmp_path)
    assert again.items[0].row == Row(numbers, "f")


def test_batches_hold_the_same_new_rows_and_the_asked_share_of_old_ones() -> None:
    strategy: Any = ExperienceReplay(size=5, replay_fraction=0.5)
    strategy.data = type("Data", (), {"batch_size": 4, "seed": 3})
    new = rows_of([0] * 10)
    assert strategy.mix(new, LengthBatches([2] * 10, 4, 3))[0] is new
    strategy.memory.add(rows_of([9] * 5), 1, random.Random(0))
    rows, batches = strategy.mix(new, LengthBatches([2] * 10, 4, 3))
    plain = LengthBatches([2] * 10, 4, 3)
    used: Counter[int] = Counter()
    assert len(batches) == 3 and len(rows) == 15
    for mixed, alone in zip(batches, plain, strict=True):
        assert mixed[: len(alone)] == alone
        old = mixed[len(alone) :]
        assert len(old) == 4 and all(rows[index].answer_ids == [9] for index in old)
        used.update(old)
    assert max(used.values()) - min(used.values()) == 1  # 12 draws of 5 rows


@pytest.mark.parametrize("adapter", ["lora", "queryable", "regressor"])
def test_der_stores_the_logits_that_the_model_gave(adapter: str, prepared: Callable[..., Any], tmp_path: Path) -> None:
    module, stages = prepared("DERPlusPlus", adapter, size=5, memory_batch_size=5, beta=0.0)
    strategy: DERPlusPlus = module.strategy
    strategy.start(module, stages[0], 1)
    assert strategy.penalty(module, {}, torch.zeros(())) is None
    strategy.end_stage(module, stages[0], 1)
    assert len(strategy.logits) == 5
    with evaluating(module), torch.no_grad():
        for item, stored in strategy.logits.items():
            batch = strategy.collate(module, [item.row])
            given = module.outputs(batch)
            if adapter != "regressor":
                given = given[0, -len(item.row.answer_ids) :]
            assert torch.equal(stored, given)
    strategy.save(tmp_path / "kept")
    assert strategy.stored_bytes() == size_bytes(tmp_path / "kept") > 0
    before = list(strategy.logits.values())
    strategy.load(module, tmp_path / "kept")
    assert all(torch.equal(a, b) for a, b in zip(before, strategy.logits.values(), strict=True))
    strategy.start(module, stages[1], 2)
    penalty = strategy.penalty(module, {}, torch.zeros(()))
    assert penalty is not None and penalty.item() < 1e-8  # the model still is what it was
    for parameter in module.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    penalty = strategy.penalty(module, {}, torch.zeros(()))
    assert penalty is not None and penalty.item() > 1e-4


def test_bfloat16_logits_take_half_the_bytes_and_lose_nothing() -> None:
    from continual.strategies.replay import _smallest

    exact, rounded = torch.randn(50), torch.randn(50).bfloat16()
    assert _smallest(exact) is exact
    assert torch.equal(_smallest(rounded.float()), rounded)


def test_damaged_memory_is_named(prepared: Callable[..., Any], tmp_path: Path) -> None:
    from continual.errors import RunError

    module, _ = prepared("ExperienceReplay")
    strategy: Strategy = module.strategy
    with pytest.raises(RunError, match="stage-01"):
        strategy.load(module, tmp_path / "stage-01")

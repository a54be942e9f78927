"""A matrix of low rank in parts: its own columns or rows, what is left out, rounding, numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.adapters.growing.factored import Factored


def factors(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return left, torch.randn(rank, columns, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_the_parts_are_the_product(rows: int, columns: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, min(rows, columns)))
    left, right = factors(rows, columns, rank, data.draw(st.integers(0, 99)))
    found = Factored.of(left, right).matrix()
    assert found.shape == (rows, columns) and found.dtype == torch.float32
    torch.testing.assert_close(found, (left @ right).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(30, 8), (8, 30)])
def test_what_is_kept_is_some_of_its_own_columns_or_rows(rows: int, columns: int) -> None:
    left, right = factors(rows, columns, 3)
    parts = Factored.of(left, right)
    product = (left @ right).float()
    own = product[parts.places.long()] if rows < columns else product.T[parts.places.long()]
    torch.testing.assert_close(parts.own, own, rtol=1e-5, atol=1e-5)
    assert parts.places.tolist() == sorted(set(parts.places.tolist()))
    assert parts.num_numbers == 3 * (30 + 8 - 3) + 3 < 3 * (30 + 8)


def test_a_lower_rank_than_said_is_no_matter() -> None:
    left, right = factors(20, 6, 3)
    right[2] = right[1]
    right[0] = 0
    torch.testing.assert_close(Factored.of(left, right).matrix(), (left @ right).float(), rtol=1e-5, atol=1e-5)

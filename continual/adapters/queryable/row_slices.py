"""A pass in which rows use different slices of a growing bank: one batched product for all, whatever their number.

Each row's own A and B are laid side by side, (B, r, d_in) and (B, d_out, r), for as long as a layer takes, and every
projection computes for all rows at once. Only routing, once a block, goes slice by slice, over the rows that each one
answers. Rows of ten stages thus cost little more than rows of one, and not a pass's updates ten times over.

Shapes: B rows, r rank, M atoms; `...` is whatever stands before the last axis of a layer's input, (B, T) or (B,).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from continual.adapters.queryable.router import AtomBank, BlockState, RoutingState, SharedState, apply_operator


class RowSlices:
    """Which slice answers each row of a pass.

    Args:
        chosen: The name of each row's slice; None for none.
        device: Of the pass.

    Attributes:
        rows: Slice -> indices of the rows that it answers, (n,).
        place_B: Index among ``rows`` of each row's slice; of a row that has none, any.
    """

    def __init__(self, chosen: list[str | None], device: torch.device) -> None:
        names = list(dict.fromkeys(name for name in chosen if name is not None))
        of = {name: [row for row, own in enumerate(chosen) if own == name] for name in names}
        self.rows = {name: torch.tensor(rows, device=device) for name, rows in of.items()}
        places = {name: place for place, name in enumerate(names)}
        self.place_B = torch.tensor([0 if name is None else places[name] for name in chosen], device=device)

    def pick(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return each row's own of the slices' tensors, (B, *shape)."""
        return torch.stack([weights[name] for name in self.rows])[self.place_B]


class RowRouting:
    """The slices' ``RoutingState``s of one pass, each over its own rows, as one; it routes as an ``AtomBank`` does.

    No dataclass, as ``RoutingState`` is none.

    Args:
        slices: Which rows are whose.
        states: Slice -> its state.
        banks: The slices' banks, in the same order.

    Attributes:
        first: The name of one slice: all lie in the same layers.
        blocks: What the layers of each block share.
    """

    def __init__(self, slices: RowSlices, states: Mapping[str, RoutingState], banks: Sequence[AtomBank]) -> None:
        self.slices, self.states, self.first = slices, states, next(iter(states))
        self._banks = banks
        self.blocks = [
            RowBlock(list(parts)) for parts in zip(*(state.blocks for state in states.values()), strict=True)
        ]

    def route(self, block: RowBlock, u: Tensor) -> None:
        """Compute and keep each row's operator from its first layer's low-rank state ``u``, (..., r)."""
        whole: Tensor | None = None
        for bank, part, rows in zip(self._banks, block.parts, self.slices.rows.values(), strict=True):
            bank.route(part, u[rows])
            own = cast(Tensor, part.operator)
            whole = own.new_zeros(len(u), *own.shape[1:]) if whole is None else whole
            whole = whole.index_copy(0, rows, own)
        block.operator = whole

    def apply_route(self, block: RowBlock, u: Tensor) -> Tensor:
        """Return (lora_alpha / r) S_b u of G projections' u, (..., G, r), in its shape."""
        return apply_operator(block.operator, u)

    def routes(self) -> dict[str, list[Tensor | None]]:
        """Return each slice's routes of each block, (..., M), 0 for rows that it does not answer."""
        return {name: [self._spread(name, route) for route in state.routes] for name, state in self.states.items()}

    def _spread(self, name: str, route: Tensor | None) -> Tensor | None:
        if route is None:
            return None
        spread = route.new_zeros(len(self.slices.place_B), *route.shape[1:])
        return spread.index_copy(0, self.slices.rows[name], route)


class RowBlock:
    """One block's part of a ``RowRouting``.

    Attributes:
        parts: The block's state in each slice.
        operator: (lora_alpha / r) S_b of every row, (..., r, r), once the block's first layer has routed; 0 for a row
            that has no slice.
    """

    def __init__(self, parts: list[BlockState]) -> None:
        self.parts = parts
        self.operator: Tensor | None = None

    @property
    def shared(self) -> SharedState:
        """What one slice's blocks have in common."""
        return self.parts[0].shared

    def gather(self) -> None:
        """Collect the earlier blocks' states for the depth summary, if all of them are there."""
        for part in self.parts:
            part.gather()


States = Mapping[str, RoutingState | RowRouting]
"""A pass's: of each adapter that all rows use, by its name; of rows' own slices, by a name for all those."""


def routes_of(states: States) -> dict[str, list[Any]]:
    """Return the routes of each block, (..., M), of each adapter that a pass used; None where a block did not route."""
    found: dict[str, list[Any]] = {}
    for name, state in states.items():
        for adapter, routes in ({name: state.routes} if isinstance(state, RoutingState) else state.routes()).items():
            # The first slice of some rows may be the second of others.
            found[adapter] = [*map(operator.add, found[adapter], routes)] if adapter in found else [*routes]
    return found

"""A matrix of low rank, kept as some of its own columns and what the others are of these.

Among the columns of a product left right of rank k, (n, r), are k that span the others (an interpolative decomposition;
Cheng, Gimbutas, Martinsson and Rokhlin 2005): M = M[:, places] [I | mix], up to the columns' order. The identity costs
nothing: k (n + r - k) numbers and k places are kept, where the two factors are k (n + r).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Factored:
    """A matrix of rank k, by k of its columns or, where it is wider than high, of its rows.

    Attributes:
        own: The columns (rows), one after the other, (k, n), n the length of each.
        places: Which columns (rows) they are, (k,) integers.
        mix: Each other column (row) in terms of them, (the others in their order, k).
        wide: Whether they are rows.
    """

    own: Tensor
    places: Tensor
    mix: Tensor
    wide: bool

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Factored:
        """Return the product of two matrices, (rows, k) and (k, columns), in float32."""
        wide = _is_wide(left.shape[0], right.shape[1])
        long, short = (right.T, left.T) if wide else (left, right)
        long, short = long.double().cpu(), short.double().cpu()
        # Partial pivoting picks rows of short.T, all of whose entries in L are at most 1: the columns that are kept.
        swaps, lower, upper = torch.linalg.lu(short.T)
        order, rank = swaps.argmax(dim=0), short.shape[0]
        places, top = order[:rank].sort()
        own = (long @ upper.T @ lower[:rank].T)[:, top].T
        others, rest = order[rank:].sort()
        mix = torch.linalg.solve_triangular(lower[:rank], lower[rank:][rest], upper=False, left=False)
        return cls(own.float().contiguous(), places.int(), mix[:, top].float().contiguous(), wide)

    @classmethod
    def read(cls, tensors: dict[str, Tensor], key: str, shape: torch.Size) -> Factored:
        """Take up what ``tensors`` gave of a matrix of this shape, each part under KEY|PART.

        Raises:
            ValueError: A part is missing.
        """
        names = {part: f"{key}|{part}" for part in ("own", "places", "mix")}
        if lacking := [name for name in names.values() if name not in tensors]:
            raise ValueError(f"{', '.join(lacking)} missing: it was not written whole, or by an earlier version")
        return cls(**{part: tensors[name] for part, name in names.items()}, wide=_is_wide(*shape))

    @property
    def num_numbers(self) -> int:
        """How many numbers it is kept as, places with them."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept, as named tensors; ``read`` takes them up."""
        return {"own": self.own, "places": self.places, "mix": self.mix}

    def matrix(self) -> Tensor:
        """Return the matrix, (rows, columns), float32, on the CPU: from the same tensors the same to the last bit."""
        size, places = len(self.places) + len(self.mix), self.places.long()
        found = torch.empty(size, self.own.shape[1])
        others = torch.ones(size, dtype=torch.bool)
        others[places] = False
        found[places], found[others] = self.own, self.mix @ self.own
        return found if self.wide else found.T


def _is_wide(rows: int, columns: int) -> bool:
    return rows < columns

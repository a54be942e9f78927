"""C-LoRA: one LoRA for all stages, whose low-rank space each stage uses in a way of its own.

Zhang et al. 2025, 'C-LoRA: Continual Low-Rank Adaptation for Pre-trained Models', arXiv 2502.17920:

    y = W h + (lora_alpha / r) B (R_old + R_new) A h,   loss + weight || R_old^T R_new ||_F^2

R_old, R_new are r x r. R_old is frozen, R_new is trained, and after its stage R_old becomes R_old + R_new: what is kept
does not grow with the stages. (In PEFT's notation; the paper's A and B are transposed.)

Its full text was not at hand: ours are the start of R_new (the identity in the first stage, where R_old is 0 and the
method is plain LoRA; 0 later, so that a stage starts from what the one before left), the square in the penalty, and the
choice between training A and B on, which the paper's theorem speaks of, and freezing them after the first stage.
Where R_old has full rank, the penalty can only be met by a small R_new: the method then gives up learning for keeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from continual.compat.peft import lora_pair
from continual.runtime.parameters import load_tensors, save_tensors
from continual.strategies.base import Strategy, require_at_least
from continual.strategies.plain_lora import check_plain_lora, lora_layers, lora_weights

if TYPE_CHECKING:
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule

_PAIR = "default"


class Routing(nn.Module):
    """One projection's R_old + R_new, (r, r)."""

    old: Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.register_buffer("old", torch.zeros(rank, rank))
        self.new = nn.Parameter(torch.zeros(rank, rank), requires_grad=False)

    def forward(self, part: nn.Module, inputs: Any, u: Tensor) -> Tensor:
        """Return (R_old + R_new) u for the low-rank states u = A h, (..., r): a forward hook of A."""
        return u @ (self.old + self.new).T.to(u.dtype)

    def overlap(self) -> Tensor:
        """Return || R_old^T R_new ||_F^2."""
        return (self.old.T @ self.new).square().sum()


class CLoRA(Strategy):
    """Routes all stages through one low-rank space (see the module's docstring).

    The adapter's folder holds A and B alone, the folder ``strategy`` the routing matrices: the model is both.

    Stores: 4 r^2 bytes an adapted projection, however many stages there are.

    Args:
        weight: Weight of the orthogonality penalty, at least 0.
        train_subspace: Train A and B in every stage; otherwise in the first one alone.
    """

    def __init__(self, weight: float = 0.5, train_subspace: bool = True) -> None:
        require_at_least(0, weight=weight)
        self.weight, self.train_subspace = weight, train_subspace
        self.routings: dict[str, Routing] = {}

    def check(self, module: AdaptedModule, stages: Sequence[StageData]) -> None:
        """Raise ConfigError for any adapter but plain LoRA on linear layers."""
        check_plain_lora(module, "CLoRA")

    def prepare(self, module: AdaptedModule) -> None:
        """Put the routing matrices in."""
        for name, layer in lora_layers(module).items():
            A, _ = lora_pair(layer, _PAIR)
            routing = Routing(len(A.weight)).to(A.weight.device)
            layer.routing = routing  # registered with the layer: it moves to the device with it
            A.register_forward_hook(routing.forward)
            self.routings[name] = routing

    def begin_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Train an R_new."""
        for routing in self.routings.values():
            nn.init.eye_(routing.new) if stage == 1 else nn.init.zeros_(routing.new)
            routing.new.requires_grad_(True)
        for layer in lora_layers(module).values():
            for part in lora_pair(layer, _PAIR):
                part.requires_grad_(self.train_subspace or stage == 1)

    def penalty(self, module: AdaptedModule, batch: dict[str, Any], outputs: Tensor) -> Tensor | None:
        """Return how far the new routing overlaps with the old one."""
        if self.stage < 2 or not self.weight:
            return None
        return self.weight * torch.stack([routing.overlap() for routing in self.routings.values()]).sum()

    @torch.no_grad()
    def end_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Make R_old + R_new the next stage's R_old."""
        for routing in self.routings.values():
            routing.old += routing.new
            routing.new.zero_().requires_grad_(False)

    def stored_parameters(self, module: AdaptedModule) -> int:
        """Return the numbers of A, B and R_old."""
        pairs = [weight for layer in lora_layers(module).values() for weight in lora_weights(layer, _PAIR)]
        return sum(tensor.numel() for tensor in [*pairs, *(routing.old for routing in self.routings.values())])

    def write(self, folder: Path) -> None:
        """Write the routing matrices."""
        save_tensors(folder, {name: routing.old for name, routing in self.routings.items()})

    def read(self, module: AdaptedModule, folder: Path) -> None:
        """Read the routing matrices."""
        tensors = load_tensors(folder)
        for name, routing in self.routings.items():
            routing.old.copy_(tensors[name])

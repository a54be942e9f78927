"""N-LoRA: each stage's update is kept sparse, so that updates of different stages hardly meet in the same weights.

Yang et al. 2024, 'Is Parameter Collision Hindering Continual Learning in LLMs?', arXiv 2410.10179:

    W_t = W_0 + (lora_alpha / r) sum_{i <= t} B_i A_i,   loss + weight || B_t A_t ||_1

B_i, A_i of earlier stages are frozen. (In PEFT's notation; the paper's A and B are transposed.) Two weights that are 0
in one of two updates do not collide, and updates without collisions are orthogonal; the reverse does not hold, which is
the paper's case against O-LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from continual.compat.peft import has_lora_pair
from continual.strategies.olora import ALL, NEW, OLoRA, layers
from continual.strategies.plain_lora import lora_weights

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule


class NLoRA(OLoRA):
    """Freezes earlier low-rank pairs and keeps the new pair's product small in L1 (see the module's docstring).

    The paper merges finished updates into the backbone; here they stay beside it in one LoRA of rank r t, which
    computes the same and leaves the backbone as it was. || . ||_1 sums over a projection's weights, and projections.

    Stores: every stage's pairs, 4 r (d_in + d_out) bytes a stage and adapted projection; they serve the model too.

    Args:
        weight: Weight of the L1 penalty, at least 0. It depends on the backbone's size, and the default is ours.
    """

    method = "NLoRA"

    def __init__(self, weight: float = 1e-5) -> None:
        super().__init__(weight)

    def penalty(self, module: AdaptedModule, batch: dict[str, Any], outputs: Tensor) -> Tensor | None:
        """Return the L1 norm of the new pairs' products."""
        return self.weight * torch.stack([update.abs().sum() for update in self.updates(module)]).sum()

    def updates(self, module: AdaptedModule) -> list[Tensor]:
        """Return B_t A_t, (d_out, d_in), of every adapted projection, for the pair that trains."""
        pairs = [lora_weights(layer, NEW if has_lora_pair(layer, NEW) else ALL) for layer in layers(module)]
        return [B @ A for A, B in pairs]

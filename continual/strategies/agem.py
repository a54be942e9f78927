"""A-GEM: a step must not raise the loss on remembered rows, to first order.

Chaudhry et al. 2019, 'Efficient Lifelong Learning with A-GEM', arXiv 1812.00420, equation 11: with g the gradient of
the batch and g_ref that of rows drawn from the memory, where <g, g_ref> < 0 the step is taken along

    g~ = g - (<g, g_ref> / <g_ref, g_ref>) g_ref          so that <g~, g_ref> = 0
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor

from continual.runtime import distributed
from continual.runtime.parameters import flat, flat_gradient, forward_context, trainable
from continual.strategies.base import require_at_least
from continual.strategies.replay import MemoryStrategy

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule


def project(gradient_P: Tensor, reference_P: Tensor) -> Tensor:
    """Return the gradient without its part against ``reference_P``; unchanged where there is no such part."""
    product = gradient_P @ reference_P
    share = (product / reference_P.square().sum().clamp_min(torch.finfo(reference_P.dtype).tiny)).clamp_max(0.0)
    return gradient_P - share * reference_P


class AGEM(MemoryStrategy):
    """Projects each step's gradient against that of remembered rows (see the module's docstring).

    Rows come from one reservoir over all earlier stages, where the paper keeps equal shares of each.

    Stores: the memory's token ids, about 4 (prompt + answer tokens) bytes a row before compression.

    Args:
        size: Rows kept in all, at least 1.
        memory_batch_size: Rows that the reference gradient is computed from, each step.
        class_balanced: Keep classes evenly (label tasks only); otherwise a fair sample of all rows seen.
    """

    def __init__(self, size: int = 100, memory_batch_size: int = 8, class_balanced: bool = False) -> None:
        super().__init__(size, class_balanced)
        require_at_least(1, memory_batch_size=memory_batch_size)
        self.memory_batch_size = memory_batch_size

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Project the gradients: after their norms are recorded, before they are clipped."""
        if not self.stage or not self.memory.items:
            return
        module: AdaptedModule = pl_module  # type: ignore[assignment]
        parameters = trainable(module)
        items = self.draw(self.memory_batch_size)
        with torch.enable_grad(), forward_context(module):
            batch = self.collate(module, [item.row for item in items])
            reference = flat_gradient(module.loss(batch, module.outputs(batch)), parameters)
        reference = distributed.mean(reference)  # each process drops other places
        gradient = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        projected = project(gradient, reference).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, projected, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

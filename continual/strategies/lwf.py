"""Learning without Forgetting: on the new rows, keep giving the answers that the adapter gave before the stage.

Li & Hoiem 2016, 'Learning without Forgetting', arXiv 1606.09282, equations 2 and 3, at the answers' tokens:

    weight T^2 KL( softmax(z_before / T) || softmax(z / T) )

The paper's cross-entropy is this and the constant entropy of softmax(z_before / T); T^2 keeps the gradient's scale
(Hinton et al. 2015). A regressor has no probabilities: there it is weight (f_before(x) - f(x))^2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from continual.runtime.parameters import evaluating
from continual.strategies.base import Strategy, require_at_least

if TYPE_CHECKING:
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule


class LwF(Strategy):
    """Distils the adapter as it was before the stage into the one being trained (see the module's docstring).

    No distillation in the first stage: nothing was learnt before it.

    Stores: nothing but the adapter itself, which is its own teacher when the next stage begins.

    Args:
        temperature: T, above 0.
        weight: Weight of the distillation, at least 0.
    """

    def __init__(self, temperature: float = 2.0, weight: float = 1.0) -> None:
        require_at_least(0, weight=weight)
        if not temperature > 0:
            raise ValueError(f"model.strategy.temperature must be above 0, got {temperature:g}")
        self.temperature, self.weight = temperature, weight
        self.teacher: dict[str, Tensor] = {}

    def begin_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Keep the adapter's parameters as they are now."""
        assert module.model is not None
        named = module.model.named_parameters() if stage > 1 else []
        self.teacher = {name: p.detach().clone() for name, p in named if p.requires_grad}

    def penalty(self, module: AdaptedModule, batch: dict[str, Any], outputs: Tensor) -> Tensor | None:
        """Return the distillation loss on the batch."""
        if not self.teacher or not self.weight:
            return None
        before, now = (module.answer_outputs(batch, each) for each in (self._before(module, batch), outputs))
        if module.backbone.kind == "regressor":
            return self.weight * F.mse_loss(now, before)
        log_p, log_q = ((logits / self.temperature).log_softmax(dim=-1) for logits in (before, now))
        return self.weight * self.temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def _before(self, module: AdaptedModule, batch: dict[str, Any]) -> Tensor:
        """Return the outputs of the adapter as it was."""
        self.teacher = {name: tensor.to(module.device) for name, tensor in self.teacher.items()}
        with evaluating(module):
            return module.outputs(batch, self.teacher)

"""MoE-LoRA: a token-routed mixture of LoRA experts in every adapted projection, as a PEFT method.

MixLoRA, Li et al. 2024, arXiv 2404.15159: a router takes the top k of E LoRA experts for each token, weighs them by the
softmax over those k, and a load-balancing loss keeps all experts in use. For one token h:

    g   = R h                                            routing logits, (E)
    w   = softmax over the top k of g                    weights, at most k non-zero, summing to 1
    y   = W h + (lora_alpha / r) sum_e w_e B_e A_e h
    L   = task loss + balance_weight * E sum_e F_e P_e   (``experts.balance_loss``)

With ``shared_A`` the experts share one A, as in HydraLoRA (arXiv 2404.19245). Shapes as in ``experts``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft.utils.peft_types import PeftType, register_peft_method
from torch import Tensor, nn

from continual.adapters.experts.experts import ExpertConfig, ExpertLinear, ExpertTuner, start_as_linear
from continual.adapters.queryable.router import top_k_softmax
from continual.compat.peft import cast_input, extend_peft_types

PEFT_NAME = "MOE_LORA"
extend_peft_types(PEFT_NAME)


@dataclass
class MoeLoraConfig(ExpertConfig):
    """Configuration of MoE-LoRA after MixLoRA (arXiv 2404.15159); importing it registers the method with PEFT.

    Unlike MixLoRA, whose experts are whole feed-forward blocks beside plain LoRA in the attention, every adapted
    projection has experts and a router (as in MoLA, 2402.08562, and LoRAMoE, 2312.09979), so that the mixture can stand
    wherever LoRA stands. Choices: routers start as linear layers do; the balance loss is a mean over projections, over
    the tokens that are no padding, and its F sums to 1 whatever top_k is.

    With ``top_k`` 1 the one weight is 1, so that only the balance loss trains the router.
    """

    top_k: int | None = field(
        default=2, metadata={"help": "Experts that a token may use, weights summing to 1; null: all."}
    )
    balance_weight: float = field(
        default=0.01, metadata={"help": "Weight of the load-balancing loss in training; 0: off."}
    )
    shared_A: bool = field(default=False, metadata={"help": "One A for all experts, a B for each (HydraLoRA)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_NAME]


class MoeLoraLinear(ExpertLinear):
    """A frozen linear layer with E pairs A (r x d_in), B (d_out x r) and a router R (E x d_in)."""

    def _add_experts(self, name: str, config: MoeLoraConfig) -> None:
        num_down = 1 if config.shared_A else config.num_experts
        self.expert_A[name] = start_as_linear(num_down, config.r, self.in_features)
        self.expert_B[name] = nn.Parameter(torch.zeros(self.out_features, config.num_experts, config.r))
        self.expert_router[name] = start_as_linear(config.num_experts, self.in_features)

    def _update(self, name: str, x: Tensor) -> Tensor:
        down, up = self.expert_A[name], self.expert_B[name]
        x = cast_input(self, x, down.dtype)
        logits = F.linear(x, self.expert_router[name])
        routes = top_k_softmax(logits, self.top_k[name])
        self._keep(name, logits, routes)
        u = F.linear(self.expert_dropout[name](x), down.flatten(0, 1)).unflatten(-1, down.shape[:2])  # (..., E or 1, r)
        return F.linear((routes.unsqueeze(-1) * u).flatten(-2), up.flatten(1)) * self.scaling[name]


class MoeLoraModel(ExpertTuner):
    """The tuner behind ``get_peft_model(model, MoeLoraConfig(...))``; reach it as ``peft_model.base_model``."""

    tuner_layer_cls = MoeLoraLinear


register_peft_method(name=PEFT_NAME.lower(), config_cls=MoeLoraConfig, model_cls=MoeLoraModel, prefix="expert_")

"""CoMoL: experts that are small core matrices between one shared A and B, merged for every token; as a PEFT method.

CoMoL, Cao et al. 2026, arXiv 2603.00573 (Findings of ACL 2026): the update U_B M V_A^T of a projection has directions
U_B, V_A that all experts share and an r x r core M_i of each expert's own. Routing reads the low-rank state ("core
space routing"), and cores are merged before they are applied ("soft merging"). For one token h:

    u   = V_A^T h                                        low-rank state, (r)
    w   = softmax(W_g u)                                 weights of the cores, (E)
    y   = W h + (lora_alpha / r) U_B (sum_i w_i M_i) u

Here expert_A = V_A^T, expert_B = U_B, expert_core = M, expert_router = W_g. Shapes as in ``experts``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import torch
import torch.nn.functional as F
from peft.utils.peft_types import PeftType, register_peft_method
from torch import Tensor, nn

from continual.adapters.config import AtomStart
from continual.adapters.experts.experts import ExpertConfig, ExpertLinear, ExpertTuner, start_as_linear
from continual.adapters.queryable.router import initial_atoms, top_k_softmax
from continual.compat.peft import cast_input, extend_peft_types

PEFT_NAME = "COMOL"
extend_peft_types(PEFT_NAME)


@dataclass
class CoMoLConfig(ExpertConfig):
    """Configuration of CoMoL (arXiv 2603.00573); importing it registers the method with PEFT.

    The paper's abstract and a summary with its equations were at hand, not its text. Choices where those are silent:
    A and B are trained and free (not held orthonormal), A starts as LoRA's and B at 0, so that the adapted model starts
    as the backbone; cores start as the atoms of ``QueryableLoraConfig`` do; the update is scaled by lora_alpha / r, as
    LoRA's; no balance loss. ``top_k`` cuts the softmax to the largest k (the paper merges all).
    """

    core_routing: bool = field(
        default=True,
        metadata={"help": "Route by the low-rank state; false: by the layer's input (the ablation w/o CR)."},
    )
    init_cores: AtomStart = field(
        default="orthogonal",
        metadata={"help": "Start: (1 - s) I + s Q with random rotations Q, I + s noise, or I; s is init_cores_scale."},
    )
    init_cores_scale: float = field(default=1.0, metadata={"help": "How far the cores start from the identity."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_NAME]
        if self.init_cores not in get_args(AtomStart):
            raise ValueError(f"init_cores must be one of {', '.join(get_args(AtomStart))}, got {self.init_cores!r}")


class CoMoLLinear(ExpertLinear):
    """A frozen linear layer with A (r x d_in), B (d_out x r), E cores (r x r) and a router (E x r, or E x d_in)."""

    adapter_layer_names = (*ExpertLinear.adapter_layer_names, "expert_core")
    other_param_names = (*ExpertLinear.other_param_names, "core_routing")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.expert_core = nn.ParameterDict()
        self.core_routing: dict[str, bool] = {}

    def _add_experts(self, name: str, config: CoMoLConfig) -> None:
        self.expert_A[name] = start_as_linear(config.r, self.in_features)
        self.expert_B[name] = nn.Parameter(torch.zeros(self.out_features, config.r))
        self.core_routing[name] = config.core_routing
        width = config.r if config.core_routing else self.in_features
        self.expert_router[name] = start_as_linear(config.num_experts, width)
        cores = initial_atoms(config.num_experts, config.r, config.init_cores, config.init_cores_scale)
        self.expert_core[name] = nn.Parameter(cores)

    def _update(self, name: str, x: Tensor) -> Tensor:
        down = self.expert_A[name]
        x = cast_input(self, x, down.dtype)
        u = F.linear(self.expert_dropout[name](x), down)
        logits = F.linear(u if self.core_routing[name] else x, self.expert_router[name])
        routes = top_k_softmax(logits, self.top_k[name])
        self._keep(name, logits, routes)
        # (w outer u) times the cores as one matrix is the merged core times u, without a core for every token.
        mixed = (routes.unsqueeze(-1) * u.unsqueeze(-2)).flatten(-2)
        cores = self.expert_core[name].transpose(1, 2).reshape(-1, down.shape[0])
        return F.linear(mixed @ cores, self.expert_B[name]) * self.scaling[name]


class CoMoLModel(ExpertTuner):
    """The tuner behind ``get_peft_model(model, CoMoLConfig(...))``; reach it as ``peft_model.base_model``."""

    tuner_layer_cls = CoMoLLinear


register_peft_method(name=PEFT_NAME.lower(), config_cls=CoMoLConfig, model_cls=CoMoLModel, prefix="expert_")

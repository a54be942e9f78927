"""Mixtures of LoRA experts: what MoE-LoRA and CoMoL share, from the router of each projection to the balance loss.

Every adapted projection has experts and a router of its own, and routes each token by that token alone: routing is
causal, a row never depends on its batch, a key/value cache stays valid, and no state passes between layers.

Shapes: E experts, r rank; `...` is whatever stands before the last axis of the layer's input, (B, T) or (B,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from continual.adapters.base_config import RoutedLoraConfig
from continual.adapters.routed_linear import RoutedLinear
from continual.adapters.tuner import RoutedTuner
from continual.compat.peft import move_to_base_layer


@dataclass
class ExpertConfig(RoutedLoraConfig):
    """The fields that both mixtures have.

    Raises:
        ValueError: Fields that contradict each other; the message names them.
    """

    num_experts: int = field(default=8, metadata={"help": "Experts of every adapted projection."})
    top_k: int | None = field(
        default=None, metadata={"help": "Experts that a token may use, weights summing to 1; all when not given."}
    )
    balance_weight: float = field(
        default=0.0, metadata={"help": "Weight of the load-balancing loss in training; 0: off. Needs top_k."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least_one("num_experts")
        if not 1 <= self.kept <= self.num_experts:
            raise ValueError(f"top_k must lie in 1 to num_experts ({self.num_experts}), got {self.top_k}")
        if self.balance_weight < 0:
            raise ValueError(f"balance_weight must not be negative, got {self.balance_weight}")
        if self.balance_weight and self.kept == self.num_experts:
            raise ValueError("balance_weight has no effect where every token uses all experts: lower top_k or set it 0")

    @property
    def kept(self) -> int:
        """How many experts a token uses."""
        return self.num_experts if self.top_k is None else self.top_k


@dataclass
class ExpertPass:
    """What the routers of one adapter leave behind in one forward pass.

    Attributes:
        mask_BT: 1 for tokens, 0 for padding: what the model was given as ``token_mask``, or as ``attention_mask``; None
            where it was given neither.
        routes: Each projection's routing weights, (..., E), in the order of the model.
        logits: Each projection's routing logits, (..., E).
    """

    mask_BT: Tensor | None
    routes: list[Tensor | None]
    logits: list[Tensor | None]


class ExpertLinear(RoutedLinear):
    """A frozen linear layer with experts of its own.

    Attributes:
        places: Adapter name -> place of this projection in the order of the model.
    """

    adapter_layer_names: tuple[str, ...] = ("expert_A", "expert_B", "expert_router")
    other_param_names: tuple[str, ...] = ("r", "scaling", "expert_dropout", "top_k", "places")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.expert_A = nn.ParameterDict()
        self.expert_B = nn.ParameterDict()
        self.expert_router = nn.ParameterDict()
        self.expert_dropout = nn.ModuleDict()
        self.top_k: dict[str, int] = {}
        self.places: dict[str, int] = {}

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add the adapter ``adapter_name``, started so that the layer computes what it did."""
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self.top_k[adapter_name] = config.kept
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.expert_dropout[adapter_name] = dropout
        self._add_experts(adapter_name, config)
        move_to_base_layer(self, adapter_name)
        self.set_adapter(self.active_adapters)

    def _add_experts(self, name: str, config: Any) -> None:
        """Create the adapter's tensors."""
        raise NotImplementedError

    def _keep(self, name: str, logits: Tensor, routes: Tensor) -> None:
        # No state: activation checkpointing computes the layer again, after the pass.
        if self.routing_state is not None:
            state = cast(ExpertPass, self.routing_state[name])
            state.logits[self.places[name]], state.routes[self.places[name]] = logits, routes


class ExpertTuner(RoutedTuner):
    """The tuner of both mixtures. A recorded block is one adapted projection: experts of two share nothing."""

    prefix = "expert_"
    tuner_layer_cls: ClassVar[type[ExpertLinear]] = ExpertLinear

    def _arrange(self, model: nn.Module, adapter_name: str) -> None:
        for place, layer in enumerate(self._layers(adapter_name)):
            layer.places[adapter_name] = place
        self._last: dict[str, ExpertPass] = {}

    def _begin_pass(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs.pop("token_mask", kwargs.get("attention_mask"))
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        states = {}
        for name in self.active_adapters:
            count = sum(name in layer.places for layer in self._adapted)
            states[name] = ExpertPass(mask, [None] * count, [None] * count)
        self._give(states)
        self._record(states)
        balanced = any(cast(ExpertConfig, self.peft_config[name]).balance_weight for name in states)
        self._last = states if balanced and model.training and torch.is_grad_enabled() else {}
        return args, kwargs

    def auxiliary_loss(self) -> Tensor | None:
        """Return the weighted balance loss of the last forward pass in training, a mean over projections.

        A second call for the same pass returns None, as does an adapter without ``balance_weight``.

        Raises:
            ValueError: The pass was made under reentrant checkpointing, so that its routes have no gradient.
        """
        passes, self._last = self._last, {}
        terms = []
        for name, state in passes.items():
            weight = cast(ExpertConfig, self.peft_config[name]).balance_weight
            pairs = zip(state.logits, state.routes, strict=True)
            seen = [(logits, routes) for logits, routes in pairs if logits is not None and routes is not None]
            if not weight or not seen:
                continue
            frozen = not any(layer.trains(name) for layer in self._layers(name))
            if not frozen and not all(logits.requires_grad for logits, _ in seen):
                raise ValueError(
                    "balance_weight needs non-reentrant activation checkpointing: call "
                    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
                )
            losses = [balance_loss(logits, routes, state.mask_BT) for logits, routes in seen]
            terms.append(weight * torch.stack(losses).mean())
        return torch.stack(terms).sum() if terms else None

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the last pass: its tensors belong to a graph."""
        return self.__dict__ | {"_last": {}}

    def accounting(self, adapter_name: str = "default") -> dict[str, dict[str, int]]:
        """Count parameters and FLOPs of one adapter by component, beside plain LoRA's of the same rank and targets.

        FLOPs are those of matrix products in a forward pass (2 per multiply-add); all experts are computed for every
        token, also those whose weight is 0: for experts this small that is faster than sorting tokens.

        Returns:
            Component ("A", "B", "router", "core" where there is one, "total", "lora") -> "parameters" (trainable),
            "flops_per_token", "flops_per_row" (0: nothing is spent once a row).
        """
        from continual.adapters.experts.accounting import account_experts

        return account_experts(list(self._layers(adapter_name)), adapter_name)


def balance_loss(logits: Tensor, routes: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Return E sum_e F_e P_e: 1 where experts are used alike, E where every token goes to one.

    MixLoRA (arXiv 2404.15159), after Switch Transformer (2101.03961, eq. 4 to 6): F_e is the share of the choices that
    fell on expert e (without a gradient), P_e the mean over tokens of the whole softmax's probability for e.

    Args:
        logits: Routing logits, (..., E).
        routes: Routing weights, (..., E), 0 for experts that were not chosen.
        mask_BT: 1 for tokens, 0 for padding, of the shape of ``...``; any other shape, or None, means no padding.
    """
    tokens = logits.new_ones(logits.shape[:-1], dtype=torch.float32)
    if mask_BT is not None and mask_BT.shape == tokens.shape:
        tokens = mask_BT.to(tokens)
    tokens = tokens.unsqueeze(-1)
    chosen = (routes > 0) * tokens
    share = chosen.flatten(0, -2).sum(dim=0) / chosen.sum()
    probability = (logits.float().softmax(dim=-1) * tokens).flatten(0, -2).sum(dim=0) / tokens.sum()
    return logits.shape[-1] * (share * probability).sum()


def start_as_linear(*shape: int) -> nn.Parameter:
    """Return a tensor, (..., d_in), that starts as the weight of a linear layer does (and as LoRA's A does)."""
    return nn.Parameter(torch.empty(*shape).uniform_(-1, 1) / math.sqrt(shape[-1]))

"""The adapted layer: y = W h + (lora_alpha / r) B S A h, with S from its block's routes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continual.adapters.config import QueryableLoraConfig
from continual.adapters.queryable.router import AtomBank, BlockState, RoutingState, recomputed
from continual.adapters.queryable.row_slices import RowBlock, RowRouting, States
from continual.adapters.routed_linear import RoutedLinear
from continual.compat.peft import cast_input, move_to_base_layer
from continual.compat.torch import live_modules, live_parameters

_READS = dict.fromkeys(["q_proj", "k_proj", "v_proj", "query", "key", "value"], "attention input")
_READS |= dict.fromkeys(["gate_proj", "up_proj"], "mlp input")
"""What projections read that transformers calls with one and the same tensor; others read something of their own."""


@dataclass
class SharedInput:
    """What projections that are given one tensor need of it during one pass, by one adapter: computed once for all.

    A step's cost is that of its kernels' number at these sizes, and so q, k and v take those of one projection. The
    first to be called computes for all of them; nothing is kept once the last has taken its part.

    Attributes:
        weights_A: A of each projection, (r, d_in), or each row's own, (B, r, d_in).
        leader: Index of the one whose state routes the block; None where none does.
        x: The tensor, while parts of it wait to be taken.
        parts: u = A h and (lora_alpha / r) S_b u, both (..., r), of each that is still to come.
    """

    weights_A: list[Tensor] = field(default_factory=list)
    leader: int | None = None
    x: Tensor | None = None
    parts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def join(self, weight_A: Tensor, leads: bool) -> int:
        """Add a projection; returns its index."""
        self.weights_A.append(weight_A)
        if leads:
            self.leader = len(self.weights_A) - 1
        return len(self.weights_A) - 1

    def take(self, index: int, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return a projection's part of what was computed for all, if it is of ``x``."""
        if self.x is not x or index not in self.parts:
            return None
        part = self.parts.pop(index)
        if not self.parts:
            self.x = None
        return part


@dataclass
class LayerUse:
    """One adapter in one layer during one pass, by its tensors: compiled code then does not depend on its name.

    Attributes:
        name: The adapter.
        weight_A: A, (r, d_in), or each row's own, (B, r, d_in).
        weight_B: B, (d_out, r), or each row's own, (B, d_out, r).
        dropout: What the layer's input goes through first; None for nothing.
        bank: The adapter's atoms and router; where rows have slices of their own, what routes by those.
        block: The state of the layer's block.
        shared: What it has in common with the other projections of its input.
        index: Which of them it is.
    """

    name: str
    weight_A: Tensor
    weight_B: Tensor
    dropout: nn.Module | None
    bank: AtomBank | RowRouting
    block: BlockState | RowBlock
    shared: SharedInput
    index: int

    @property
    def leads(self) -> bool:
        """Whether the layer is its block's first, the one whose state routes."""
        return self.shared.leader == self.index


class QueryableLinear(RoutedLinear):
    """A routed layer with A (r x d_in), B (d_out x r) of its own and a bank that it shares with all others.

    Attributes:
        blocks: Adapter name -> index of the block of layers that this projection belongs to.
        leads: Names of the adapters for which this projection is its block's first, the one whose state routes.
        frozen_A: Names of the adapters whose A is never trained.
        reads: The layer's input, by a name that it has in common with other layers of the same.
    """

    adapter_layer_names = ("queryable_A", "queryable_B")
    other_param_names = ("r", "scaling", "queryable_dropout")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.queryable_A = nn.ParameterDict()
        self.queryable_B = nn.ParameterDict()
        self.queryable_dropout = nn.ModuleDict()
        self.blocks: dict[str, int] = {}
        self.leads: set[str] = set()
        self.frozen_A: set[str] = set()
        self.reads = ""
        # What those hold, found without nn.Module's search, of which a pass would make hundreds.
        weights = live_parameters(self.queryable_A), live_parameters(self.queryable_B)
        self._entries: Any = *weights, live_modules(self.queryable_dropout)
        # A reference, not a submodule: the tuner owns the banks, so that each is saved once.
        self._banks: dict[str, AtomBank] = {}

    def update_layer(self, adapter_name: str, config: QueryableLoraConfig, bank: AtomBank, place: str) -> None:
        """Add the adapter ``adapter_name``: A as LoRA starts it, B = 0, so that the layer computes what it did.

        ``place`` is the layer's name in the model: it tells which others read the same, and with the configuration's
        seed it decides an A that is not trained.
        """
        parent, _, own = place.rpartition(".")
        self.reads = f"{parent}.{_READS.get(own, own)}"
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.lora_alpha / config.r
        if config.lora_dropout > 0:
            self.queryable_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        self.queryable_A[adapter_name] = nn.Parameter(torch.empty(config.r, self.in_features))
        self.queryable_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, config.r))
        generator = None
        if config.frozen_A_seed is not None:
            self.frozen_A.add(adapter_name)
            generator = torch.Generator().manual_seed(config.frozen_A_seed + zlib.crc32(place.encode()))
        nn.init.kaiming_uniform_(self.queryable_A[adapter_name], a=math.sqrt(5), generator=generator)
        self._banks[adapter_name] = bank
        move_to_base_layer(self, adapter_name)
        self.set_adapter(self.active_adapters)

    def in_use(self, states: States, inputs: dict[tuple[str, str], SharedInput]) -> list[LayerUse]:
        """Return what a pass's adapters have here, in the order of ``states``.

        Args:
            states: The pass's.
            inputs: Adapter and input -> what layers have in common that read it; the layer joins those.
        """
        uses = []
        for name, state in states.items():
            adapter = state.first if isinstance(state, RowRouting) else name
            if adapter in self.scaling:
                uses.append(self._use(name, adapter, state, inputs))
        return uses

    def _use(
        self,
        name: str,
        adapter: str,
        state: RoutingState | RowRouting,
        inputs: dict[tuple[str, str], SharedInput],
    ) -> LayerUse:
        weights_A, weights_B, dropouts = self._entries
        weight_A, weight_B, dropout = weights_A[adapter], weights_B[adapter], dropouts.get(adapter)
        bank: AtomBank | RowRouting = self._banks[adapter]
        if isinstance(state, RowRouting):
            weight_A, weight_B, bank = state.slices.pick(weights_A), state.slices.pick(weights_B), state
        shared = inputs.get((name, self.reads))
        # Dropout hides other places of the input from each projection.
        if shared is None or (self.training and dropout is not None):
            shared = inputs[name, self.reads] = SharedInput()
        return LayerUse(
            name=name,
            weight_A=weight_A,
            weight_B=weight_B,
            dropout=dropout,
            bank=bank,
            block=state.blocks[self.blocks[adapter]],
            shared=shared,
            index=shared.join(weight_A, adapter in self.leads),
        )

    def _with_updates(self, result: Tensor, x: Tensor) -> Tensor:
        if self.routing_state is None:
            raise RuntimeError("an adapted layer was called on its own: call the model that the adapter was put into")
        for use in self.routing_state:
            result = self._with_update(result, use, x)
        return result

    def _with_update(self, result: Tensor, use: LayerUse, x: Tensor) -> Tensor:
        u, routed = use.shared.take(use.index, x) or self._routed(use, x)
        state = use.block.shared
        if state.observe is not None:
            state.observe(self, use.name, u, routed)
        if routed.dtype != result.dtype:
            return result + _product(routed, use.weight_B).to(result.dtype)
        if use.weight_B.dim() == 3:
            return torch.baddbmm(_by_row(result), _by_row(routed), use.weight_B.mT).view(result.shape)
        # One kernel for the product with B and the sum.
        return torch.addmm(result.flatten(0, -2), routed.flatten(0, -2), use.weight_B.T).view(result.shape)

    def _routed(self, use: LayerUse, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return u and what B is applied to, both (..., r), having computed them for all that read ``x`` as well."""
        bank: Any = use.bank  # of the block's own kind
        block, shared = use.block, use.shared
        h = cast_input(self, x, use.weight_A.dtype)
        h = h if use.dropout is None else use.dropout(h)
        together = shared.x is None and len(shared.weights_A) > 1  # else others wait for parts of another tensor
        weights_A = shared.weights_A if together else [use.weight_A]
        leader = shared.leader if together else 0 if use.leads else None

        def project() -> Tensor:
            weight_A = torch.cat(weights_A, dim=-2) if together else use.weight_A
            return _product(h, weight_A).unflatten(-1, (len(weights_A), -1))

        routing_u = None
        if leader is not None:
            routing_u = project()
            bank.route(block, _each(routing_u)[leader])

        def update() -> list[tuple[Tensor, Tensor]]:
            u = project() if routing_u is None else routing_u
            return [*zip(_each(u), _each(bank.apply_route(block, u)), strict=True)]

        parts = recomputed(update)
        if not together:
            return parts[0]
        shared.parts = dict(enumerate(parts))
        shared.x = x
        return cast(tuple[Tensor, Tensor], shared.take(use.index, x))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these the active adapters; an A that is never trained stays without a gradient."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._keep_frozen()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch the gradients of the named adapters; an A that is never trained stays without one."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        for name in self.frozen_A:
            self.queryable_A[name].requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget the adapter ``adapter_name``."""
        self._banks.pop(adapter_name, None)
        self.blocks.pop(adapter_name, None)
        self.leads.discard(adapter_name)
        self.frozen_A.discard(adapter_name)
        super().delete_adapter(adapter_name)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x, (..., d_in), times a weight, (d_out, d_in), or times each row's own, (B, d_out, d_in): (..., d_out)."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    return torch.bmm(_by_row(x), weight.mT).view(*x.shape[:-1], -1)


def _each(parts: Tensor) -> Sequence[Tensor]:
    """Return the parts, (..., r), of G projections' (..., G, r); one alone takes no kernel on the way back."""
    return [parts.squeeze(-2)] if parts.shape[-2] == 1 else parts.unbind(-2)


def _by_row(x: Tensor) -> Tensor:
    """Return x, (B, ..., d), as (B, T, d)."""
    return x.reshape(len(x), -1, x.shape[-1])

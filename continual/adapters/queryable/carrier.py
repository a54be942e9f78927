"""How a forward pass's routing state reaches the adapted layers: as a keyword, through each decoder layer.

A projection is called with its input alone, so its routes have to come by another way. A keyword of the decoder layer
is repeated when activation checkpointing recomputes that layer, and so is the hook on its attention that takes the
keyword off: the layers see the state of the pass that is being recomputed, never that of a later one. What the decoder
layer gets is its own block's part of the state, so that layers of all blocks run, and compile to, the same code.
"""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from continual.adapters.queryable.layer import LayerUse, QueryableLinear, SharedInput
from continual.adapters.queryable.row_slices import States
from continual.compat.transformers import attention_of, checkpointing_of

ROW_KEYWORDS = ("text_ids", "row_features", "gate_instruction")
"""Keywords that the gate reads: token ids of each row's own text, (B, L), negative where padded; or its features as
they are, (B, F); and the encoding of its instruction, (B, E)."""

ROUTING_KEYWORDS = ("instruction_ids", "instruction_encoding", "text_ids", "row_features", "gate_instruction")
"""What routes are decided by, as keywords of the model that an adapter is put into."""


class RouteCarrier:
    """Gives a routing state to some layers; inside a decoder layer, keywords bring it.

    Args:
        layers: The adapted layers.
        decoder_layer: What they are part of, where keywords bring the state.
        attention: The decoder layer's attention, to which it hands its keywords on.
    """

    def __init__(
        self,
        layers: list[QueryableLinear],
        decoder_layer: nn.Module | None = None,
        attention: nn.Module | None = None,
    ) -> None:
        self.layers, self.decoder_layer, self.attention = layers, decoder_layer, attention

    def hook(self) -> list[Any]:
        """Put the hooks on decoder layer and attention; returns their handles."""
        modules = [(self.decoder_layer, self.narrow), (self.attention, self.receive)]
        return [m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in modules if m is not None]

    def give(self, states: States | None) -> None:
        """Set each layer's part of the state, or clear it."""
        self._set([None] * len(self.layers) if states is None else self._parts(states))

    def narrow(self, decoder_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Put the layers' parts in the place of the whole state among the decoder layer's keywords (a pre-hook)."""
        if (states := kwargs.get("routing_state")) is None:
            return args, kwargs
        parts = self._parts(states)
        for use in itertools.chain.from_iterable(parts):
            if use.leads:
                use.block.gather()
        return args, kwargs | {"routing_state": parts}

    def receive(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Take the layers' parts off the attention's keywords (a pre-hook)."""
        # Absent where the layers are called around the model: the adapted layers then say so.
        self._set(kwargs.pop("routing_state", None) or [None] * len(self.layers))
        return args, kwargs

    def _parts(self, states: States) -> list[list[LayerUse]]:
        inputs: dict[tuple[str, str], SharedInput] = {}
        return [layer.in_use(states, inputs) for layer in self.layers]

    def _set(self, parts: Sequence[list[LayerUse] | None]) -> None:
        for layer, part in zip(self.layers, parts, strict=True):
            layer.give(part)


def carriers_of(model: nn.Module, layers: Iterable[QueryableLinear]) -> list[RouteCarrier]:
    """Return a carrier for every decoder layer that hands its keywords on to its attention; none if one does not."""
    adapted = set(layers)
    carriers: list[RouteCarrier] = []
    for module in model.modules():
        attention = attention_of(module)
        if attention is None or not _takes_keywords(module):
            continue
        inside = [child for child in module.modules() if isinstance(child, QueryableLinear) and child in adapted]
        # The hook has to be in place on every layer, adapted or not: the keyword comes to all of them.
        carriers.append(RouteCarrier(inside, module, attention))
    return carriers


def patch_generate(model: nn.Module) -> None:
    """Let ``generate`` take the instruction keywords; it refuses what prepare_inputs_for_generation does not name."""
    if not hasattr(model, "prepare_inputs_for_generation") or "prepare_inputs_for_generation" in vars(model):
        return
    # A bound method, not a closure: copy.deepcopy of the model then binds the copy.
    vars(model)["prepare_inputs_for_generation"] = types.MethodType(_prepare_inputs_for_generation, model)


def _prepare_inputs_for_generation(
    self: Any,
    *args: Any,
    instruction_ids: Any = None,
    instruction_encoding: Any = None,
    text_ids: Any = None,
    row_features: Any = None,
    gate_instruction: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:
    inputs = type(self).prepare_inputs_for_generation(self, *args, **kwargs)
    values = (instruction_ids, instruction_encoding, text_ids, row_features, gate_instruction)
    given = zip(ROUTING_KEYWORDS, values, strict=True)
    return inputs | {name: value for name, value in given if value is not None}


def refuse_inexact_checkpointing(model: nn.Module, checkpointable: list[nn.Module], has_carriers: bool) -> None:
    """Raise ValueError where activation checkpointing would give wrong gradients.

    Args:
        model: The adapted model.
        checkpointable: Its modules that transformers can checkpoint (they have a flag ``gradient_checkpointing``).
        has_carriers: Whether the routing state travels as a keyword.
    """
    active = [module for module in checkpointable if module.gradient_checkpointing] if model.training else []
    if active and not has_carriers:
        raise ValueError(
            f"activation checkpointing is on, but the layers of {type(model).__name__} take no keywords, "
            "so that routes could not follow a recomputed layer: turn gradient checkpointing off"
        )
    for module in active:
        function = checkpointing_of(module)
        if getattr(function, "keywords", {}).get("use_reentrant", False):
            raise ValueError(
                "reentrant activation checkpointing recomputes with the wrong routes: call "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )


def _takes_keywords(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

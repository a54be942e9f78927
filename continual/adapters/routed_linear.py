"""What all adapted layers share: a frozen linear layer, and updates that each adapter in use adds to it."""

from __future__ import annotations

import re
from typing import Any, NoReturn, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

CANNOT_MERGE = (
    "this adapter routes each token by its own state, so no single weight matrix equals it: it cannot be merged into "
    "the backbone; save it with save_pretrained and load it beside the backbone instead"
)


class RoutedLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer to which each active adapter adds an update that it routes by the token.

    Attributes:
        routing_state: What the pass under way has for the layer; set for each pass, None outside.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _features(base_layer)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.routing_state: Any = None
        self.merged_adapters: list[str] = []

    @property
    def base_weight(self) -> Tensor:
        """The frozen layer's own weight."""
        return cast(Tensor, self.get_base_layer().weight)

    def give(self, state: Any) -> None:
        """Set ``routing_state``."""
        if torch.compiler.is_compiling():
            self.routing_state = state
        else:  # past nn.Module, which takes eight times as long, for hundreds of layers a pass
            vars(self)["routing_state"] = state

    def trains(self, adapter_name: str) -> bool:
        """Say whether the adapter's tensors here have gradients (all but an A that is never trained)."""
        return any(getattr(self, name)[adapter_name].requires_grad for name in self.adapter_layer_names)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x, (..., d_in), to (..., d_out)."""
        result = self.base_layer(x, *args, **kwargs)
        return result if self.disable_adapters else self._with_updates(result, x)

    def _with_updates(self, result: Tensor, x: Tensor) -> Tensor:
        """Return ``result``, (..., d_out), with what each adapter in use adds to it."""
        for name in self.active_adapters:
            if name in self.scaling:
                result = result + self._update(name, x).to(result.dtype)
        return result

    def _update(self, name: str, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the pass under way: activation checkpointing leaves one behind, with its graph."""
        return self.__dict__ | {"routing_state": None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raise ValueError: routing depends on the input."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""


def _features(layer: nn.Module) -> tuple[int, int]:
    while isinstance(layer, BaseTunerLayer):
        layer = layer.get_base_layer()
    if isinstance(layer, Conv1D):
        d_in, d_out = layer.weight.shape
        return d_in, d_out
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    raise ValueError(f"target modules must be linear layers, got {type(layer).__name__}")


def layer_of(module_name: str) -> str:
    """Return the part of a module's name up to its last index: 'model.layers.3' of 'model.layers.3.mlp.up_proj'."""
    match = re.match(r"(.*\.|^)\d+(?=\.|$)", module_name)
    return match.group(0) if match else module_name

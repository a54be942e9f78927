"""Training passes through torch.compile: the decoder layers share one code, for every length, batch and stage."""

from __future__ import annotations

import functools
import types
from typing import Any, cast

import torch
import torch.fx.experimental._config
from peft import PeftModel
from torch import nn

_NUM_GRAPHS = 128
"""Variants that the layers' code may have: a handful at a time, and as many again where a stage adds an adapter."""


def compile_layers(model: PeftModel) -> None:
    """Compile the decoder layers of a language model for passes that are trained on; others run as they did.

    Compiling layer by layer costs seconds where the whole model costs minutes, because layers of all depths are the
    same code, and hooks stay outside of it. Sums are taken in another order than without: results agree to rounding.

    Args:
        model: The adapted model; its decoder has ``layers``.

    Raises:
        ValueError: It has none.
    """
    decoder: Any = getattr(model.get_base_model(), "get_decoder", lambda: None)()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError("there are no decoder layers to compile: leave model.compile out")
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _NUM_GRAPHS)
    shapes: Any = torch.fx.experimental._config
    shapes.use_duck_shape = False  # a batch as large as the bank once would else have to be so always
    for layer in decoder.layers:
        # Bound methods, not closures over a layer: copy.deepcopy of the model then binds the copy.
        vars(layer)["forward"] = types.MethodType(_forward, layer)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    training = layer.training and torch.is_grad_enabled()
    function = _compiled(type(layer)) if training else type(layer).forward
    return cast(Any, function)(layer, *args, **kwargs)


@functools.cache
def _compiled(layer_type: type[nn.Module]) -> Any:
    return torch.compile(layer_type.forward, dynamic=True)

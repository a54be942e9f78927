"""Training passes through torch.compile: the decoder layers share one code, for every length, batch and stage."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from continual.backbones.base import decoder_of
from continual.compat.torch import compiling_many_shapes
from continual.compat.transformers import CACHE, checkpointing_of, forward_inside_checkpointing

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
    decoder = decoder_of(model)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError("there are no decoder layers to compile: leave model.compile out")
    for layer in decoder.layers:
        # Bound methods, not closures over a layer: copy.deepcopy of the model then binds the copy.
        vars(layer)["forward"] = types.MethodType(_forward, layer)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plain: Any = type(layer).forward
    if not (layer.training and torch.is_grad_enabled()):
        return plain(layer, *args, **kwargs)
    if not (isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing):
        return _compiled(plain)(layer, *args, **kwargs)
    # Checkpointing, which transformers puts into ``forward``, stays around what is compiled: the layer writes routes
    # where later layers find them, and a compiler takes no such writing inside of what is to be computed twice.
    # Recomputing would fill a cache twice, so there is none, as in transformers' own.
    uncached = kwargs | dict.fromkeys(kwargs.keys() & {CACHE, "layer_past"})
    forward = _compiled(forward_inside_checkpointing(layer))
    return checkpointing_of(layer)(functools.partial(forward, layer, **uncached), *args)


@functools.cache
def _compiled(forward: Callable[..., Any]) -> Any:
    compiled = torch.compile(forward, dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        with compiling_many_shapes(_NUM_GRAPHS):
            return compiled(*args, **kwargs)

    return call

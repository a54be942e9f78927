"""What we lean on inside transformers (read in 5.24)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import StaticCache, masking_utils
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from continual.compat.stand_in import stands_in_for

_READ_IN = "5.24.0"
_GENERATION = "transformers.GenerationMixin"
_LAYER = "transformers.modeling_layers.GradientCheckpointingLayer"

# -- key/value caches -------------------------------------------------------------------------------------------------

CACHE: str = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What models and ``generate`` call a key/value cache, as a keyword and in their output; renamed in 5.24."""


@stands_in_for(f"transformers.modeling_outputs.CausalLMOutputWithPast.{CACHE}", read_in=_READ_IN)
def cache_of(output: Any) -> Any:
    """Return the key/value cache of a model's output."""
    return getattr(output, CACHE)


@stands_in_for(
    f"{_GENERATION}._supports_default_dynamic_cache()",
    "transformers.StaticCache.layers",
    "transformers.cache_utils.StaticLayer",
    read_in=_READ_IN,
)
def static_cache(model: Any, max_length: int) -> StaticCache | None:
    """Return a cache with room for ``max_length`` tokens; None where a layer keeps anything but all that it saw.

    It is not asked for by ``cache_implementation``: ``generate`` makes each as large as the largest before.
    """
    if not model._supports_default_dynamic_cache():
        return None
    cache = StaticCache(model.config, max_cache_len=max_length)
    # A sliding window's layer counts in Python, which a recording would not repeat.
    return cache if all(type(layer) is StaticLayer for layer in cache.layers) else None


@stands_in_for("transformers.PreTrainedModel.get_compiled_call(self, compile_config)", read_in=_READ_IN)
@contextmanager
def stepping_by(model: Any, step: Callable[..., Any]) -> Iterator[None]:
    """Let ``generate`` call ``step`` inside the ``with``, where it would call the model compiled.

    It would for each batch over a static cache on a GPU.
    """
    vars(model)["get_compiled_call"] = lambda compile_config: step
    try:
        yield
    finally:
        del vars(model)["get_compiled_call"]


# -- attention --------------------------------------------------------------------------------------------------------


@stands_in_for("transformers.masking_utils.find_packed_sequence_indices(position_ids)", read_in=_READ_IN)
@contextmanager
def nothing_packed() -> Iterator[None]:
    """Spare transformers, inside the ``with``, to ask of each batch whether its rows are packed.

    It reads that off the positions' values, for which a GPU and its host wait for one another in every pass; and while
    a pass is recorded, when no value can be read, it makes a dense mask in case they are.
    """
    ask = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _nothing
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = ask


def _nothing(position_ids: Tensor) -> None:
    return None


@stands_in_for("transformers.models.llama.modeling_llama.LlamaAttention", read_in=_READ_IN)
def attention_of(layer: nn.Module) -> nn.Module | None:
    """Return a decoder layer's attention, by what transformers ends the names of its classes in; None without one."""
    return next((child for child in layer.children() if type(child).__name__.endswith("Attention")), None)


# -- activation checkpointing -----------------------------------------------------------------------------------------


@stands_in_for(f"{_LAYER}._gradient_checkpointing_func", read_in=_READ_IN)
def checkpointing_of(module: nn.Module) -> Any:
    """Return what a module checkpoints a call by, ``torch.utils.checkpoint`` with its options; None where nothing is.

    It takes the function to call and its positional arguments.
    """
    return getattr(module, "_gradient_checkpointing_func", None)


@stands_in_for(f"{_LAYER}.__init_subclass__(**kwargs)", read_in=_READ_IN)
def forward_inside_checkpointing(layer: nn.Module) -> Callable[..., Any]:
    """Return the forward method, unbound, that a decoder layer wraps into its checkpointing."""
    forward: Any = type(layer).forward
    return forward.__wrapped__

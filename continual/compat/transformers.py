"""What we lean on inside transformers (read in 5.24)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from transformers import StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE: str = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What models and ``generate`` call a key/value cache, as a keyword and in their output; renamed in 5.24."""


def cache_of(output: Any) -> Any:
    """Return the key/value cache of a model's output."""
    return getattr(output, CACHE)


def static_cache(model: Any, max_length: int) -> StaticCache | None:
    """Return a cache with room for ``max_length`` tokens; None where a layer keeps anything but all that it saw.

    It is not asked for by ``cache_implementation``: ``generate`` makes each as large as the largest before.

    Stands in for: ``GenerationMixin._supports_default_dynamic_cache``, which says whether a model takes such a cache.
    """
    if not model._supports_default_dynamic_cache():
        return None
    cache = StaticCache(model.config, max_cache_len=max_length)
    # A sliding window's layer counts in Python, which a recording would not repeat.
    return cache if all(type(layer) is StaticLayer for layer in cache.layers) else None


@contextmanager
def stepping_by(model: Any, step: Callable[..., Any]) -> Iterator[None]:
    """Let ``generate`` call ``step`` inside the ``with``, where it would call the model compiled.

    Stands in for: ``GenerationMixin.get_compiled_call``, called for each batch over a static cache on a GPU.
    """
    vars(model)["get_compiled_call"] = lambda compile_config: step
    try:
        yield
    finally:
        del vars(model)["get_compiled_call"]

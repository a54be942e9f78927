"""Names of transformers that differ between the versions that pyproject.toml allows; read in 5.23 and 5.24."""

from __future__ import annotations

import dataclasses

from transformers.modeling_outputs import CausalLMOutputWithPast


def cache_keyword() -> str:
    """Return the name of a language model's cache, among its keywords and in its output.

    ``cache`` since transformers 5.24, ``past_key_values`` before. The old name is taken with a warning until 5.40 by a
    model and until 6.0 by ``generate``.
    """
    names = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"

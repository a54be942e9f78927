"""Free answers, greedily, by transformers' own ``generate``.

Shapes: B rows, P prompt columns.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig


def generate(
    model: Any, inputs: dict[str, Tensor], max_new_tokens: int, end_token: int | None, pad_token: int, **more: Any
) -> Tensor:
    """Return the tokens that follow each prompt, (B, at most ``max_new_tokens``), padded after the end mark.

    Args:
        model: The adapted model, in evaluation mode.
        inputs: Left-padded prompts: input_ids and attention_mask, (B, P), and what routes are decided by.
        max_new_tokens: Longest answer, its end mark included.
        end_token: The end mark.
        pad_token: What follows it.
        more: Further keywords of transformers' ``generate``.
    """
    # The defaults that come with a model (a repetition penalty, say) are for chatting, and generate would add them.
    model.generation_config = GenerationConfig()
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    options |= {"eos_token_id": end_token, "pad_token_id": pad_token}
    return model.generate(**inputs, **options, **more)[:, inputs["input_ids"].shape[1] :]

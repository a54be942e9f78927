"""Free answers, greedily: by transformers' own ``generate``, whose steps a GPU may replay as a CUDA graph.

A step of one token a row is spent launching kernels. With a cache that grows each step differs in its shapes; in a
static cache, with room for the whole answer from the start, all steps of a batch are the same operations on the same
memory, so that one is recorded and the others are its replay. On its own a static cache costs: every step reads the
room that is still empty. So it comes with a recording or not at all.

transformers would hand the steps over a static cache to torch.compile, once for every number of rows and every length,
and again for every stage that adds a slice: minutes, where a batch is answered in seconds. A recording costs as much
as a step or two and lasts for its batch; nothing of it is kept, and no prompt has to be padded to be like another.

Shapes: B rows, P prompt columns, C columns of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer

from continual.compat.transformers import cache_keyword
from continual.graphed import recording

Record = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Takes a step and returns what repeats it, on the same tensors and into the same ones; it may run the step or not, but
leaves no trace of that."""

_LEAST_TOKENS = 8
"""Shorter answers have too few steps to replay for a recording to pay."""
_CHANGING = ("input_ids", "position_ids", "attention_mask")


def generate(
    model: Any,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    end_token: int | None,
    pad_token: int,
    record: Record | None = None,
) -> Tensor:
    """Return the tokens that follow each prompt, (B, at most ``max_new_tokens``), padded after the end mark.

    Args:
        model: The adapted model, in evaluation mode.
        inputs: Left-padded prompts: input_ids and attention_mask, (B, P), and what routes are decided by.
        max_new_tokens: Longest answer, its end mark included.
        end_token: The end mark.
        pad_token: What follows it.
        record: Records a step, ``on_cuda`` say; None for a cache that grows, without a recording.

    Raises:
        RunError: A step does what cannot be recorded.
    """
    base, width = model.get_base_model(), inputs["input_ids"].shape[1]
    # The defaults that come with a model (a repetition penalty, say) are for chatting, and generate would add them.
    model.generation_config = GenerationConfig()
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    options |= {"eos_token_id": end_token, "pad_token_id": pad_token}
    if (
        record is None
        or max_new_tokens < _LEAST_TOKENS
        or (cache := _static_cache(base, width, max_new_tokens)) is None
    ):
        return model.generate(**inputs, **options)[:, width:]
    with _stepping_by(base, RecordedSteps(base, record)):
        return model.generate(**inputs, **options, **{cache_keyword(): cache})[:, width:]


class RecordedSteps:
    """A language model's steps over one batch's static cache; call it as the model.

    The first step runs as it is, so that what is set up once is set up outside of a recording; the second is recorded.

    Args:
        model: The language model.
        record: Records a step.
    """

    def __init__(self, model: Any, record: Record) -> None:
        self._model, self._record = model, record
        self._is_first = True
        self._repeat: Callable[[], Any] | None = None
        self._buffers: dict[str, Any] = {}

    def __call__(self, **inputs: Any) -> Any:
        """Return the model's output; a later call writes into the same tensors."""
        if self._is_first:
            self._is_first = False
            return self._model(**inputs)
        given = {name: inputs[name] for name in _CHANGING if inputs.get(name) is not None}
        if self._repeat is None:
            model, self._buffers = self._model, _copied(given)
            fixed = inputs | self._buffers  # what rows are routed by is the same in every step
            with recording("step of a free answer"):
                self._repeat = self._record(lambda: model(**fixed))
        _copy_into(self._buffers, given)
        return self._repeat()


def on_cuda(step: Callable[[], Any]) -> Callable[[], Any]:
    """Record a step as a CUDA graph (a ``Record``)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def repeat() -> Any:
        graph.replay()
        return output

    return repeat


def _copied(given: Any) -> Any:
    """Return a copy of a tensor, or of tensors by name: some models take a mask for each kind of layer."""
    return {name: _copied(part) for name, part in given.items()} if isinstance(given, dict) else given.clone()


def _copy_into(buffers: Any, given: Any) -> None:
    """Write what is given into the tensors that ``_copied`` returned for a step before."""
    if isinstance(buffers, dict):
        for name, buffer in buffers.items():
            _copy_into(buffer, given[name])
    else:
        buffers.copy_(given)


def _static_cache(base: Any, width: int, max_new_tokens: int) -> StaticCache | None:
    """Return a cache with room for prompt and answer; None where the model's layers keep anything but all they saw.

    It is not asked for by ``cache_implementation``: transformers makes each as large as the largest before.
    """
    if not base._supports_default_dynamic_cache():
        return None
    cache = StaticCache(base.config, max_cache_len=width + max_new_tokens - 1)  # nothing follows the last token
    # A sliding window's layer counts in Python, which a recording would not repeat.
    return cache if all(type(layer) is StaticLayer for layer in cache.layers) else None


@contextmanager
def _stepping_by(base: Any, steps: RecordedSteps) -> Iterator[None]:
    """Let ``generate`` call ``steps`` inside the ``with``, where it would call a compiled model."""
    vars(base)["get_compiled_call"] = lambda compile_config: steps
    try:
        yield
    finally:
        del vars(base)["get_compiled_call"]

"""Free answers whose steps a GPU replays as a CUDA graph.

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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from continual.compat.transformers import CACHE, static_cache, stepping_by
from continual.scoring.generation import generate
from continual.training.cuda_graphs import recording

Record = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Takes a step and returns what repeats it, on the same tensors and into the same ones; it may run the step or not, but
leaves no trace of that."""

_LEAST_TOKENS = 8
"""Shorter answers have too few steps to replay for a recording to pay."""
_CHANGING = ("input_ids", "position_ids", "attention_mask")


def generate_recorded(
    model: Any,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    end_token: int | None,
    pad_token: int,
    record: Record | None = None,
) -> Tensor:
    """Return what ``scoring.generation.generate`` does, by recorded steps where there are enough of them.

    Args:
        model: The adapted model, in evaluation mode.
        inputs: Left-padded prompts: input_ids and attention_mask, (B, P), and what routes are decided by.
        max_new_tokens: Longest answer, its end mark included.
        end_token: The end mark.
        pad_token: What follows it.
        record: Records a step; as a CUDA graph by default.

    Raises:
        RunError: A step does what cannot be recorded.
    """
    given = (model, inputs, max_new_tokens, end_token, pad_token)
    base, width = model.get_base_model(), inputs["input_ids"].shape[1]
    length = width + max_new_tokens - 1  # nothing follows the last token
    if max_new_tokens < _LEAST_TOKENS or (cache := static_cache(base, length)) is None:
        return generate(*given)
    with stepping_by(base, RecordedSteps(base, record or on_cuda)):
        return generate(*given, **{CACHE: cache})


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

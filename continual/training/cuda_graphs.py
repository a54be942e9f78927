"""Training passes replayed as CUDA graphs: a launch or two in the place of thousands, for each shape of batch.

A small model leaves a GPU waiting: its processor launches a few thousand kernels a step and takes several times as long
over that as the GPU takes to run them. A graph is recorded once for a shape and launched whole from then on. What the
pass computes in Python is fixed by the recording, so that everything which differs between batches has to be a tensor.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continual.data.batch import IGNORED, PADDING, widen
from continual.data.packing import is_packed, widened
from continual.errors import RunError
from continual.runtime.parameters import trainable

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule

Capture = Callable[..., Callable[..., tuple[Tensor, ...]]]

_COLUMNS = 64
"""Widths are padded to a multiple of it, so that a stage has a handful of shapes."""
_SIGHTINGS = 3
"""How often a shape has to come before recording it pays: that costs as much as a few passes."""


class GraphedPasses:
    """A module's training passes; call it as ``module.training_pass``, with the same result up to rounding.

    Rows are padded on the right, which no token before the padding sees and no label asks for; behind packed rows, each
    token of padding is a row by itself. A shape's first passes are not recorded, nor are those that a strategy makes by
    itself. Gradients lie where the next replay writes its own: they have to be used, or copied, before it.

    Recordings serve later stages too, as long as their passes read and train the very same tensors (``hold``).

    Args:
        module: The module, on its device and with the parameters that the stage trains.
        capture: What records a pass, as ``torch.cuda.make_graphed_callables`` does.

    Raises:
        RunError: On a call: the pass does what cannot be recorded, such as waiting for the device.
    """

    def __init__(self, module: AdaptedModule, capture: Capture | None = None) -> None:
        self.module = module
        self._capture = capture or _on_cuda()
        self._sightings: Counter[Any] = Counter()
        self._passes: dict[Any, Callable[..., tuple[Tensor, ...]]] = {}
        self._read = _read_by(module)

    def hold(self) -> bool:
        """Say whether the module's passes still read what they read when this was made, and train the same of it."""
        return _read_by(self.module) == self._read

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return a batch's loss and, where the strategy asks for them, its outputs; see ``training_pass``."""
        padded, first = _padded(batch)
        tensors = {**padded["forward"], "labels": padded["labels"]}
        shape = tuple((name, *tensor.shape) for name, tensor in tensors.items())
        self._sightings[shape] += 1
        if shape not in self._passes and self._sightings[shape] >= _SIGHTINGS:
            self._passes[shape] = self._recorded(tensors)
        if shape in self._passes:
            loss, *outputs = self._passes[shape](*tensors.values())
            found = next(iter(outputs), None)
        else:
            with uncached_casts():  # padded and as recorded: what is computed, and compiled, is what is recorded
                loss, found = self.module.training_pass(padded)
        if found is not None and found.dim() > 1:
            found = found[:, first : first + batch["labels"].shape[-1]]
        return loss, found

    def _recorded(self, tensors: dict[str, Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        own = tuple(tensor.clone() for tensor in tensors.values())
        with recording("training pass"):
            return self._capture(_Pass(self.module, list(tensors)), own)

    def release(self) -> None:
        """Give up the recordings and their memory; what replays them refers to itself, so that it is collected."""
        self._passes.clear()
        gc.collect()
        if self.module.device.type == "cuda":
            torch.cuda.empty_cache()


class _Pass(nn.Module):
    """A training pass by its tensors; its parameters are those that have gradients."""

    def __init__(self, module: AdaptedModule, names: list[str]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trainable(module))
        self._names = names
        self._module = (module,)  # in a tuple, so that its frozen parameters are not this module's

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the loss, and the outputs where the strategy asks for them."""
        (module,) = self._module
        forward = dict(zip(self._names, tensors, strict=True))
        labels = forward.pop("labels")
        loss, outputs = module.training_pass({"forward": forward, "labels": labels})
        return (loss,) if outputs is None else (loss, outputs)


def _read_by(module: AdaptedModule) -> list[tuple[int, int, bool]]:
    """Return which tensors a training pass may read, where each lies and whether it is trained.

    Recordings hold on to those that they train: no other tensor can be taken for one of these.
    """
    growing = None if module.tuner is None else module.tuner.growing
    idle = set() if growing is None else {id(tensor) for tensor in growing.idle()}
    tensors = [*module.parameters(), *module.buffers()]
    return [(id(tensor), tensor.data_ptr(), tensor.requires_grad) for tensor in tensors if id(tensor) not in idle]


def _padded(batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return a batch with its widths rounded up, and the label column that was the first."""
    if is_packed(batch):
        return widened(batch), 0
    forward, labels = dict(batch["forward"]), batch["labels"]
    for name in forward.keys() & PADDING.keys():
        forward[name] = widen(forward[name], PADDING[name], _COLUMNS)
    if "input_ids" not in forward:
        return {"forward": forward, "labels": labels}, 0
    width = forward["input_ids"].shape[1]
    right = width - batch["forward"]["input_ids"].shape[1]
    columns = labels.shape[1] + right
    left = min(-columns % _COLUMNS, width - 1 - columns)
    return {"forward": forward, "labels": F.pad(labels, (left, right), value=IGNORED)}, left


def _on_cuda() -> Capture:
    # One memory pool for all shapes: a pass is over before the next begins.
    pool = torch.cuda.graph_pool_handle()

    def capture(callable: nn.Module, own: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
        graphed = torch.cuda.make_graphed_callables(
            callable, own, num_warmup_iters=1, allow_unused_input=True, pool=pool
        )
        torch.cuda.empty_cache()  # what warming up took lies with a stream that is never used again
        return cast(Callable[..., tuple[Tensor, ...]], graphed)

    return capture


@contextmanager
def recording(what: str) -> Iterator[None]:
    """Record inside the ``with``.

    Raises:
        RunError: ``what`` cannot be recorded.
    """
    try:
        with uncached_casts():
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise RunError(f"model.cuda_graphs cannot record this model's {what} ({why}): set it to false") from error


@contextmanager
def uncached_casts() -> Iterator[None]:
    """Let autocast, if it is on, keep no cast weights: a recording would read them after they are gone.

    Where it is off nothing is switched, since compiled code holds for one setting of the switch alone.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(before and not torch.is_autocast_enabled())
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)

"""What stands in for a GPU where passes are recorded: what a capture tells, and what it forbids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

Recorded = Callable[..., tuple[Tensor, ...]]


@contextmanager
def capturing() -> Iterator[None]:
    """Say that a stream is being captured, as a GPU would: transformers then looks at no value of a tensor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


class NoWaiting(TorchDispatchMode):
    """Raises at what copies between host and device, or makes the host wait for the device."""

    FORBIDDEN = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "lift_fresh", "unique", "_unique2"}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for given in args
            if isinstance(given, list | tuple)
            for index in given
        )
        if name in self.FORBIDDEN or by_mask:
            raise AssertionError(f"{name} cannot be recorded")
        return func(*args, **(kwargs or {}))


class Recorder:
    """Stands in for ``torch.cuda.make_graphed_callables``: a trace repeats tensor operations and runs no Python."""

    def __init__(self) -> None:
        self.shapes: list[tuple[torch.Size, ...]] = []

    def __call__(self, callable: torch.nn.Module, own: tuple[Tensor, ...]) -> Recorded:
        self.shapes.append(tuple(tensor.shape for tensor in own))
        # One mode for what a trace notes of its tensors: each would else make its own.
        with capturing(), tracing(TracingContext(FakeTensorMode())):
            trace = make_fx(lambda *tensors: callable(*tensors))(*own)

        def replay(*tensors: Tensor) -> tuple[Tensor, ...]:
            for static, given in zip(own, tensors, strict=True):
                assert static.shape == given.shape and static.data_ptr() != given.data_ptr()
                static.copy_(given)
            return trace(*own)

        return replay

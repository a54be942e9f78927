"""What stands in for a GPU where passes are recorded: what a capture tells, and what it forbids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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

"""What we lean on inside torch (read in 2.13)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn

from continual.compat.stand_in import stands_in_for

_READ_IN = "2.13.0"
_CONFIG = "torch.utils._config_module.ConfigModule"

# -- modules ----------------------------------------------------------------------------------------------------------


@stands_in_for("torch.nn.Module._parameters", read_in=_READ_IN)
def live_parameters(module: nn.Module) -> dict[str, Any]:
    """Return the mapping in which a module, or a ParameterDict, registers its own parameters, without a search."""
    return module._parameters


@stands_in_for("torch.nn.Module._buffers", read_in=_READ_IN)
def live_buffers(module: nn.Module) -> dict[str, Any]:
    """Return the mapping in which a module registers its own buffers."""
    return module._buffers


@stands_in_for("torch.nn.Module._modules", read_in=_READ_IN)
def live_modules(module: nn.Module) -> dict[str, Any]:
    """Return the mapping in which a module, or a ModuleDict, registers its own modules, without a search."""
    return module._modules


# -- tensors ----------------------------------------------------------------------------------------------------------


@stands_in_for("torch._foreach_norm", read_in=_READ_IN)
def each_norm(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the 2-norm of each tensor, all of them by a few kernels."""
    return torch._foreach_norm(tensors)  # type: ignore[reportPrivateImportUsage]


# -- torch.compile ----------------------------------------------------------------------------------------------------


@stands_in_for(
    "torch._dynamo.config.recompile_limit",
    "torch._dynamo.config.specialize_float",
    "torch.fx.experimental._config.use_duck_shape",
    f"{_CONFIG}._make_closure_patcher(self, **changes)",
    read_in=_READ_IN,
)
@contextmanager
def compiling_many_shapes(num_graphs: int) -> Iterator[None]:
    """Let what is compiled inside the ``with`` have up to ``num_graphs`` variants, and few for its shapes.

    Floats are constants: a norm's epsilon would else be a tensor that is read back in each pass. Sizes that are equal
    once, of a batch and of the bank say, need not be equal always. torch reads these switches where it compiles, which
    any call may: the ``with`` is put around each, and costs a few microseconds, as torch's own around every call does.
    """
    limits: Any = torch._dynamo.config
    limit = max(limits.recompile_limit, num_graphs)
    shapes: Any = torch.fx.experimental._config
    restore_limits = limits._make_closure_patcher(recompile_limit=limit, specialize_float=True)()
    restore_shapes = shapes._make_closure_patcher(use_duck_shape=False)()
    try:
        yield
    finally:
        restore_shapes()
        restore_limits()

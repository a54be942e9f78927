"""Checks of continual/compat/torch.py."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config as shapes
from behaviour import checks
from torch import nn

from continual.compat import torch as compat


def switches() -> tuple[Any, ...]:
    limits: Any = torch._dynamo.config
    return limits.recompile_limit, limits.specialize_float, shapes.use_duck_shape


@checks(compat.live_parameters, compat.live_buffers, compat.live_modules)
def what_is_registered_is_found() -> None:
    module, weight = nn.BatchNorm1d(3), nn.Parameter(torch.ones(2))
    assert compat.live_parameters(module) == {"weight": module.weight, "bias": module.bias}
    assert compat.live_buffers(module).keys() == {"running_mean", "running_var", "num_batches_tracked"}
    named = nn.ParameterDict()
    live = compat.live_parameters(named)
    named["one"] = weight
    assert live == {"one": weight} and live["one"] is weight
    del named["one"]
    assert not live
    modules = nn.ModuleDict({"one": module})
    assert compat.live_modules(modules) == {"one": module}


@checks(compat.each_norm)
def norms_are_those_of_each() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([[2.0]]), torch.zeros(3)]
    assert [norm.item() for norm in compat.each_norm(tensors)] == [5, 2, 0]


@checks(compat.compiling_many_shapes)
def switches_are_set_and_set_back() -> None:
    before = switches()
    with compat.compiling_many_shapes(1000):
        assert switches() == (1000, True, False)
        with compat.compiling_many_shapes(9):
            assert switches() == (1000, True, False)
        assert switches() == (1000, True, False)
    assert switches() == before
    try:
        with compat.compiling_many_shapes(1000):
            raise KeyError
    except KeyError:
        pass
    assert switches() == before
    two, eight = _graphs(torch.ones(2, 2), torch.ones(3, 4)), _graphs(*(torch.ones(n, 2) for n in range(2, 14)))
    assert (two, eight) == (1, 1)


def _graphs(*inputs: torch.Tensor) -> int:
    """Return how many graphs inputs of other shapes take, where each call is in the ``with``."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x * 2.5 + x.shape[0], backend=backend, dynamic=True)
    for x in inputs:
        with compat.compiling_many_shapes(64):
            assert torch.equal(compiled(x), x * 2.5 + x.shape[0])
    torch._dynamo.reset()
    return len(graphs)

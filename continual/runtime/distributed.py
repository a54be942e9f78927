"""Several devices, a process each: how Lightning's processes are joined, and what they tell one another.

Lightning (``trainer.devices=N trainer.strategy=ddp``), torchrun or srun runs the command once for each device, and all
of these processes run the same lines on the same seed. A training batch is the same whatever their number: each takes
every N-th of its rows (``batches.Collator``). Batches to be scored are dealt out whole (``scoring.data_module``), and
what was found in them is gathered before anything is computed from it. The first process alone writes, and speaks.

Lightning's ModelParallelStrategy cuts the frozen decoder layers into shards, one a device (``shard``): passes then have
to be made by all processes together, so that each scores every batch, and training rows alone are shared.
"""

from __future__ import annotations

import inspect
import itertools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from continual.backbones.base import decoder_of
from continual.compat.lightning import ddp_arguments, forks_or_spawns, tensor_parallel_size, wrap_by
from continual.errors import ConfigError, one_line

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule

_Found = TypeVar("_Found")
_SHARDED = "ModelParallelStrategy with data_parallel_size the number of devices and tensor_parallel_size 1"


# -- before anything is trained ---------------------------------------------------------------------------------------


def check(trainer: L.Trainer) -> None:
    """Raise ConfigError for a way of spreading work that a sequence of stages cannot take."""
    strategy = trainer.strategy
    if forks_or_spawns(strategy):
        raise ConfigError(
            "trainer.strategy: processes forked or spawned for one fit end with it, and a run has many: take ddp"
        )
    if isinstance(strategy, ModelParallelStrategy):
        if tensor_parallel_size(strategy) != 1:
            raise ConfigError(f"trainer.strategy: decoder layers are cut into shards alone: take {_SHARDED}")
    elif not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        name = type(strategy).__name__
        raise ConfigError(f"trainer.strategy: {name} is not supported: take ddp, or, for a large backbone, {_SHARDED}")
    if isinstance(strategy, DDPStrategy):  # which takes anything, and DDP nothing else, but in the middle of a run
        known = inspect.signature(DistributedDataParallel).parameters
        if unknown := sorted(set(ddp_arguments(strategy)) - set(known)):
            raise ConfigError(f"trainer.strategy: DistributedDataParallel has no argument {unknown[0]!r}")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and started != trainer.world_size:
        raise ConfigError(
            f"{started} processes were started and trainer.devices x trainer.num_nodes is {trainer.world_size}"
        )


def configure_ddp(trainer: L.Trainer, records: bool) -> None:
    """Let DDP leave out what no run needs: a second place for gradients, rounds of buffers, and a stream of its own.

    Args:
        trainer: Its strategy has not been set up yet.
        records: Whether passes are recorded: what adds up gradients must not have come on the stream of other work.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    # No pass changes a buffer, and all processes begin with the same. What was configured is left as it is.
    arguments = ddp_arguments(strategy)
    arguments.setdefault("broadcast_buffers", False)
    arguments.setdefault("gradient_as_bucket_view", True)
    if not records:
        wrap_by(strategy, _wrap_on_this_stream)


def _wrap_on_this_stream(wrap: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    # Lightning wraps on another stream, and each gradient would go over to it to be added up. DDP takes the nodes that
    # add them up where they are there already, with the stream that they came on.
    nodes = [get_gradient_edge(parameter) for parameter in model.parameters() if parameter.requires_grad]
    wrapped = wrap(model)
    del nodes  # kept until here
    return wrapped


def check_module(module: AdaptedModule, trainer: L.Trainer) -> None:
    """Raise ConfigError where the loaded module cannot be spread, or would learn something else than on one device."""
    if trainer.world_size == 1:
        return
    name = type(module.adapter).__name__
    if module.balances_experts or name == "LilyConfig":
        what = "balances its experts" if name != "LilyConfig" else "averages its routes"
        raise ConfigError(f"model.adapter: {name} {what} over a whole batch, which several devices share: take one")
    if isinstance(trainer.strategy, ModelParallelStrategy):
        if not any(_frozen(module, layer) for layer in _decoder_layers(module)):
            raise ConfigError("trainer.strategy: there are no frozen decoder layers to cut into shards: take ddp")
        for name, asked in (("model.compile", module.compiles), ("model.cuda_graphs", module.cuda_graphs)):
            if asked:
                raise ConfigError(f"{name} has not been made to work on shards: take it out, or ddp")


def check_rows(batch_size: int, num_scored: int, num_devices: int) -> None:
    """Raise ConfigError where a stage has too few rows for every device to get one."""
    for what, num_rows in (("data.batch_size", batch_size), ("rows to score", num_scored)):
        if num_rows < num_devices:
            raise ConfigError(f"{what} ({num_rows}): {num_devices} devices share them, and each needs one at least")


def join(trainer: L.Trainer, module: AdaptedModule) -> None:
    """Let Lightning start the other processes, where nobody has, and wait for them.

    They stay joined until the process ends: later trainers find them so. All but the first are silent from then on,
    but for errors.

    Raises:
        ConfigError: The cluster started other processes than the trainer asks for, or they cannot talk by its backend.
    """
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy):
        return
    strategy.connect(module)
    try:
        if strategy.launcher is None:
            strategy.setup_environment()
        else:
            strategy.launcher.launch(strategy.setup_environment, trainer=trainer)
    except (ValueError, RuntimeError, AssertionError) as error:  # torch asserts that it knows the backend
        raise ConfigError(f"trainer: {one_line(error)}") from error
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


# -- who takes what ---------------------------------------------------------------------------------------------------


def _are_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Say whether this process is the one that writes."""
    return not _are_joined() or dist.get_rank() == 0


def num_processes() -> int:
    """Return how many processes are joined."""
    return dist.get_world_size() if _are_joined() else 1


def own_rows() -> slice:
    """Return which of a training batch's rows this process takes."""
    return slice(dist.get_rank(), None, dist.get_world_size()) if _are_joined() else slice(None)


def own_batches(module: AdaptedModule) -> slice:
    """Return which of some batches, that all processes have in the same order, this one passes through the model."""
    return slice(None) if is_sharded(module) else own_rows()


# -- what was found ---------------------------------------------------------------------------------------------------


def gathered(found: _Found) -> list[_Found]:
    """Return what every process has found, in their order; all of them have to call it. Tensors lie on the CPU."""
    if num_processes() == 1:
        return [found]
    everything: list[Any] = [None] * num_processes()
    dist.all_gather_object(everything, found)
    return everything


def of_batches(found: _Found, module: AdaptedModule) -> list[_Found]:
    """Return what every process has found in its ``own_batches``; no batch counts twice."""
    return [found] if is_sharded(module) else gathered(found)


def in_order(found: list[_Found], module: AdaptedModule) -> list[_Found]:
    """Return what all processes found in their ``own_batches``, an entry a batch, in the batches' order.

    What one process has beyond the others comes last.
    """
    parts = of_batches(found, module)
    rounds = itertools.zip_longest(*([[entry] for entry in part] for part in parts), fillvalue=[])
    return [entry for each in rounds for own in each for entry in own]


def mean(values: Tensor) -> Tensor:
    """Return the mean over processes of a tensor on their devices."""
    if num_processes() > 1:
        dist.all_reduce(values := values.clone())
        values /= num_processes()
    return values


# -- a backbone in shards ---------------------------------------------------------------------------------------------


def is_sharded(module: AdaptedModule) -> bool:
    """Say whether the backbone lies in shards."""
    return num_processes() > 1 and module.device_mesh is not None


def shard(module: AdaptedModule) -> None:
    """Cut the frozen parameters of each decoder layer into shards, one a process (torch's FSDP2); once.

    A layer is put together for the time that it computes. Whatever is trained, and what the adapter has of its own, is
    on every device as it was: it is small, and strategies read and write it.
    """
    layers = _decoder_layers(module)
    if isinstance(layers[0], FSDPModule):
        return
    decoder = decoder_of(cast(Any, module.model))
    mesh = cast(Any, module.device_mesh)["data_parallel"]
    for layer in layers:
        frozen = set(_frozen(module, layer))
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=set(layer.parameters()) - frozen)
    # Their common root, with no shards of its own, lets a layer be put together while the one before computes.
    fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if not isinstance(p, DTensor)})


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Put the mean over processes in the place of each gradient, as DDP does by itself."""
    flat = mean(nn.utils.parameters_to_vector([_gradient(parameter) for parameter in parameters]))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad


def _decoder_layers(module: AdaptedModule) -> list[nn.Module]:
    return list(getattr(decoder_of(cast(Any, module.model)), "layers", []))


def _frozen(module: AdaptedModule, layer: nn.Module) -> list[nn.Parameter]:
    """Return a layer's frozen parameters that the adapter has not brought."""
    prefix = getattr(cast(Any, module.model).base_model, "prefix", None) or "\0"
    return [p for name, p in layer.named_parameters() if not p.requires_grad and prefix not in name]

"""Several devices, a process each: how Lightning's processes are joined, and what they tell one another.

Lightning (``trainer.devices=N trainer.strategy=ddp``), torchrun or srun runs the command once for each device, and all
of these processes run the same lines on the same seed. A training batch is the same whatever their number: each takes
every N-th of its rows (``batches.Collator``). Batches to be scored are dealt out whole (``stage_data.AllTasks``), and
what was found in them is gathered before anything is computed from it. The first process alone writes, and speaks.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from continual.errors import ConfigError, one_line

if TYPE_CHECKING:
    from continual.module import ContinualModule
    from continual.stage_data import StageData

_Found = TypeVar("_Found")


def check(trainer: L.Trainer) -> None:
    """Raise ConfigError for a way of spreading work that a sequence of stages cannot take."""
    strategy = trainer.strategy
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(
            "trainer.strategy: processes that are forked or spawned for one fit end with it, and a run has many: take ddp"
        )
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ConfigError(f"trainer.strategy: {type(strategy).__name__} is not supported: take ddp")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and started != trainer.world_size:
        raise ConfigError(
            f"{started} processes were started and trainer.devices x trainer.num_nodes is {trainer.world_size}"
        )


def check_fit(module: ContinualModule, data: StageData, num_devices: int) -> None:
    """Raise ConfigError for what ``num_devices`` devices cannot share, or would come out otherwise than on one."""
    if num_devices == 1:
        return
    for what, num_rows in (("data.batch_size", data.batch_size), ("rows to score", len(data.scored_rows))):
        if num_rows < num_devices:
            raise ConfigError(f"{what} ({num_rows}): {num_devices} devices share them, and each needs one at least")
    if module.cuda_graphs:
        raise ConfigError("model.cuda_graphs records one process's passes alone: take it out, or trainer.devices=1")
    name = type(module.adapter).__name__
    if getattr(module.adapter, "balance_weight", 0) or name == "LilyConfig":
        what = "balances its experts" if name != "LilyConfig" else "averages its routes"
        raise ConfigError(f"model.adapter: {name} {what} over a whole batch, which several devices share: take one")


def join(trainer: L.Trainer, module: ContinualModule) -> None:
    """Let Lightning start the other processes, where nobody has, and wait for them.

    They stay joined until the process ends: later trainers find them so.

    Raises:
        ConfigError: The cluster started other processes than the trainer asks for.
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
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error


def _are_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Say whether this process is the one that writes."""
    return not _are_joined() or dist.get_rank() == 0


def num_processes() -> int:
    """Return how many processes are joined."""
    return dist.get_world_size() if _are_joined() else 1


def own_share() -> slice:
    """Return which of some items, that all processes have in the same order, this one takes."""
    return slice(dist.get_rank(), None, dist.get_world_size()) if _are_joined() else slice(None)


def gathered(found: _Found) -> list[_Found]:
    """Return what every process has found, in their order; all of them have to call it."""
    if num_processes() == 1:
        return [found]
    everything: list[Any] = [None] * num_processes()
    dist.all_gather_object(everything, found)
    return everything


def in_order(found: list[_Found]) -> list[_Found]:
    """Return what all processes made of their ``own_share`` of some items, an entry an item, in the items' order."""
    parts = gathered(found)
    return [parts[place % len(parts)][place // len(parts)] for place in range(sum(map(len, parts)))]


def mean(values: Tensor) -> Tensor:
    """Return the mean over processes of a tensor on their devices."""
    if num_processes() > 1:
        dist.all_reduce(values := values.clone())
        values /= num_processes()
    return values

"""What we lean on inside Lightning (read in 2.6.6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from continual.compat.stand_in import stands_in_for

_READ_IN = "2.6.6"
_STRATEGIES = "lightning.pytorch.strategies"
_SIGNALS = "lightning.pytorch.trainer.connectors.signal_connector._SignalConnector"

# -- trainer and module -----------------------------------------------------------------------------------------------


@stands_in_for(
    "lightning.pytorch.Trainer._signal_connector", f"{_SIGNALS}._sigterm_notifier_fn(self, signum, _)", read_in=_READ_IN
)
def ignore_sigterm(trainer: L.Trainer) -> None:
    """Keep a trainer from handling SIGTERM, at which it would wait for the other processes; another handler stays."""
    cast(Any, trainer)._signal_connector._sigterm_notifier_fn = lambda *_: None


@stands_in_for("lightning.pytorch.LightningModule._trainer", read_in=_READ_IN)
def trainer_of(module: nn.Module) -> L.Trainer | None:
    """Return the trainer that a module is attached to, None without one; ``module.trainer`` raises then."""
    return getattr(module, "_trainer", None)


@stands_in_for(
    f"{_STRATEGIES}.Strategy.teardown(self)", "lightning.pytorch.LightningModule.cpu(self)", read_in=_READ_IN
)
@contextmanager
def on_device(module: L.LightningModule) -> Iterator[None]:
    """Leave a module on its device inside the ``with``.

    Lightning's strategies move a module to the host after each fit and each test, and back for the next: seconds a
    stage.
    """
    vars(module)["cpu"] = lambda: module
    try:
        yield
    finally:
        del vars(module)["cpu"]


# -- strategies -------------------------------------------------------------------------------------------------------


@stands_in_for(f"{_STRATEGIES}.launchers._MultiProcessingLauncher", read_in=_READ_IN)
def forks_or_spawns(strategy: Strategy) -> bool:
    """Say whether a strategy makes its processes by forking or spawning, for the time of one call."""
    return isinstance(strategy.launcher, _MultiProcessingLauncher)


@stands_in_for(f"{_STRATEGIES}.ModelParallelStrategy._tensor_parallel_size", read_in=_READ_IN)
def tensor_parallel_size(strategy: ModelParallelStrategy) -> int | str:
    """Return over how many devices a strategy cuts single tensors; "auto" for as many as fit."""
    return strategy._tensor_parallel_size


@stands_in_for(f"{_STRATEGIES}.DDPStrategy._ddp_kwargs", read_in=_READ_IN)
def ddp_arguments(strategy: DDPStrategy) -> dict[str, Any]:
    """Return the keywords that a strategy will give DistributedDataParallel; what is written into them counts."""
    return strategy._ddp_kwargs


@stands_in_for(f"{_STRATEGIES}.DDPStrategy._setup_model(self, model)", read_in=_READ_IN)
def wrap_by(strategy: DDPStrategy, wrap: Callable[[Callable[[nn.Module], nn.Module], nn.Module], nn.Module]) -> None:
    """Let ``wrap`` put a model into DistributedDataParallel; it is given Lightning's own way to, and the model."""
    cast(Any, strategy)._setup_model = partial(wrap, strategy._setup_model)

"""Checks of continual/compat/lightning.py."""

from __future__ import annotations

import os
import signal
from typing import Any, cast

import lightning as L
from behaviour import checks
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from continual.compat import lightning as compat


def trainer(**arguments: Any) -> L.Trainer:
    quiet: dict[str, Any] = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)
    return L.Trainer(accelerator="cpu", **{"devices": 1, **quiet, **arguments})


def takes_note_of_sigterm(trainer: L.Trainer) -> bool:
    connector = cast(Any, trainer)._signal_connector
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    connector.register_signal_handlers()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        return trainer.received_sigterm
    finally:
        connector.teardown()
        signal.signal(signal.SIGTERM, before)


@checks(compat.ignore_sigterm)
def sigterm_is_passed_over() -> None:
    assert takes_note_of_sigterm(trainer())
    ignoring = trainer()
    compat.ignore_sigterm(ignoring)
    assert not takes_note_of_sigterm(ignoring)


@checks(compat.trainer_of)
def a_module_knows_its_trainer() -> None:
    module, own = L.LightningModule(), trainer()
    assert compat.trainer_of(module) is None and compat.trainer_of(nn.Linear(1, 1)) is None
    module.trainer = own
    assert compat.trainer_of(module) is own


class Moved(L.LightningModule):
    """Counts how often it is moved to the host."""

    moves = 0

    def cpu(self) -> Moved:
        """Stay; note it."""
        self.moves += 1
        return self


@checks(compat.on_device)
def a_module_stays_where_it_is() -> None:
    module, strategy = Moved(), trainer().strategy
    strategy.connect(module)
    with compat.on_device(module):
        strategy.teardown()
    assert module.moves == 0
    strategy.teardown()
    assert module.moves == 1


@checks(compat.forks_or_spawns)
def launchers_are_told_apart() -> None:
    found = {name: compat.forks_or_spawns(trainer(strategy=name, devices=2).strategy) for name in ("ddp", "ddp_spawn")}
    assert found == {"ddp": False, "ddp_spawn": True}
    assert not compat.forks_or_spawns(trainer().strategy)


@checks(compat.tensor_parallel_size)
def sizes_are_as_configured() -> None:
    assert compat.tensor_parallel_size(ModelParallelStrategy(tensor_parallel_size=2)) == 2
    assert compat.tensor_parallel_size(ModelParallelStrategy()) == "auto"


@checks(compat.ddp_arguments)
def arguments_are_those_that_count() -> None:
    strategy = DDPStrategy(find_unused_parameters=True)
    assert compat.ddp_arguments(strategy) == {"find_unused_parameters": True}
    compat.ddp_arguments(strategy)["broadcast_buffers"] = False
    assert strategy._ddp_kwargs == {"find_unused_parameters": True, "broadcast_buffers": False}
    assert "_ddp_kwargs" in DDPStrategy._setup_model.__code__.co_names


@checks(compat.wrap_by)
def wrapping_is_replaced() -> None:
    strategy, model, given = trainer(strategy="ddp", devices=2).strategy, L.LightningModule(), []
    assert isinstance(strategy, DDPStrategy)
    own = strategy._setup_model
    compat.wrap_by(strategy, lambda wrap, module: given.append((wrap, module)) or module)
    strategy.model = model
    strategy.configure_ddp()
    assert given == [(own, model)]

"""One of the processes of a run on several devices, as torchrun would start it; only the first may write."""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

from recording import Recorder

from continual import run
from continual.data import batch_order, stage_data
from continual.engine.stage_loop import StageLoop
from continual.runtime import distributed
from continual.scoring import shared_passes
from continual.storage import manifest, records
from continual.strategies import Strategy
from continual.training import cuda_graphs
from continual.training.module import ContinualModule


def run_rank(rank: int, argv: list[str], dies: int = 0, together: bool = False, alike: bool = False) -> None:
    """Run a command line of ``continual.run`` as process ``rank``; ends this process.

    Args:
        rank: The process's rank; any but 0 ends at once where it writes anything.
        argv: The command line.
        dies: The signal that the first process sends itself in the second stage's second step; 0 for none.
        together: Whether tasks share passes, as on GPUs.
        alike: Whether to end with 96 where the processes' adapters are not the same, to the bit, after a stage, and
            with 0 after the last.
    """
    # Lightning's metrics and ours would gather tensors on the CPU, which NCCL, the GPUs' backend, does not take.
    sys.modules["torchmetrics.metric"].gather_all_tensors = _refuse  # type: ignore[attr-defined]
    # As on a GPU, but from the first pass on.
    ContinualModule._records = property(lambda module: module.cuda_graphs)  # type: ignore[assignment, method-assign]
    cuda_graphs._on_cuda, cuda_graphs._SIGHTINGS = Recorder, 1  # type: ignore[assignment]
    if together:
        _share_passes()
    if alike:
        _compare_replicas()
    if rank:
        for owner, names in (
            (records, ["append", "truncate"]),
            (manifest, ["create"]),
            (manifest.Manifest, ["commit"]),
            (Strategy, ["save"]),
            (ContinualModule, ["save_adapter"]),
        ):
            for name in names:
                setattr(owner, name, _refuse)
    elif dies:
        _die_in_training(dies)
    code = 98
    try:
        code = run.main(argv)
    finally:
        os._exit(code)


def _refuse(*_: Any, **__: Any) -> None:
    os._exit(97)


def _compare_replicas() -> None:
    fit = StageLoop._fit

    def compared(self: StageLoop, index: int) -> Any:
        trainer = fit(self, index)
        named = self.module.named_parameters()
        own = {name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for name, p in named if p.requires_grad}
        if any(other != own for other in distributed.gathered(own)):
            os._exit(96)
        if index == len(self.data):
            os._exit(0)
        return trainer

    StageLoop._fit = compared  # type: ignore[method-assign]


def _share_passes() -> None:
    grouped, size = shared_passes.grouped, batch_order.scoring_size("cpu", 0)._replace(shared=True)
    shared_passes.grouped = lambda loaders, max_tokens: grouped(loaders, 10 * max_tokens)
    stage_data.scoring_size = lambda *_: size


def _die_in_training(number: int) -> None:
    step = ContinualModule.training_step

    def dying(self: Any, batch: Any, index: int) -> Any:
        if self.trainer.datamodule.name == "colours" and index == 1:
            os.kill(os.getpid(), number)
        return step(self, batch, index)

    ContinualModule.training_step = dying  # type: ignore[method-assign]

"""A run, and what a kill would leave of it, gone on with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from continual.config import experiment
from continual.engine.stage_loop import StageLoop
from continual.storage import manifest
from continual.training.module import ContinualModule


def run_and_go_on(configuration: str, whole: Path, cut: Path, moment: str = "score") -> StageLoop:
    """Run three stages in ``whole``; in ``cut`` go on with what a kill before the third one's end leaves of them.

    Args:
        configuration: The text of a configuration file.
        whole: The run's directory.
        cut: That of the one that goes on.
        moment: "train", "score" or "commit": just before the third stage's second step, its scores or its commit.
    """
    run = StageLoop(experiment.parse(configuration, "strategy"), whole)
    run.prepare()
    with pytest.MonkeyPatch.context() as patch:
        _copy_at(patch, moment, whole, cut)
        run.run()

    state, resolved = manifest.read(cut)
    assert state.finished_stage == 2
    resumed = StageLoop(experiment.parse(resolved, "strategy"), cut)
    resumed.prepare(state)
    resumed.run()
    return run


def _copy_at(patch: pytest.MonkeyPatch, moment: str, run_dir: Path, copy: Path) -> None:
    owner, name = {
        "train": (ContinualModule, "training_step"),
        "score": (StageLoop, "_score"),
        "commit": (manifest.Manifest, "commit"),
    }[moment]
    original = getattr(owner, name)

    def copy_first(self: Any, *arguments: Any) -> Any:
        if moment == "train":
            last = self.strategy.stage == 3 and self.trainer.global_step == 1
        else:
            last = arguments[0] == 3 if moment == "score" else self.finished_stage == 3
        if last:
            shutil.copytree(run_dir, copy)
        return original(self, *arguments)

    patch.setattr(owner, name, copy_first)

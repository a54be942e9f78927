"""A run that kills itself at a point, as kill -9 would."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from continual import run
from continual.engine.stage_loop import StageLoop
from continual.storage import manifest, records
from continual.training.module import ContinualModule

POINTS = {
    "before stage 0 is scored": -1,
    "before stage 0 is committed": -1,
    "between stages": 1,
    "while stage 1 trains": 0,
    "while stage 2 trains": 1,
    "between two tables": 0,
    "inside a table": 0,
    "before the adapter is in place": 1,
    "inside the manifest": 1,
}
"""Where a run is killed, and the last stage that its manifest then holds."""


def run_until(point: str, *argv: str) -> int:
    """Run a command line of ``continual.run`` up to one of ``POINTS``."""
    _arm(point)
    return run.main(argv)


def _arm(point: str) -> None:
    if point == "before stage 0 is scored":
        _before(StageLoop, "_score", lambda loop, *_: loop.manifest.finished_stage == -1)
    elif point == "before stage 0 is committed":
        _before(manifest.Manifest, "commit", lambda state, *_: state.finished_stage == 0)
    elif point == "between stages":
        _before(StageLoop, "_fit", lambda loop, *_: loop.manifest.finished_stage == 1)
    elif point.startswith("while stage"):
        task = "animals" if "1" in point else "colours"
        _before(ContinualModule, "training_step", lambda own, _, i: own.trainer.datamodule.name == task and i == 2)
    elif point == "between two tables":
        _before(records, "append", lambda _, table, rows, *__: table == "routing" and rows[0]["stage"] == 1)
    elif point == "inside a table":
        _before(os, "replace", _second(lambda _, target: Path(target).name == "answers.parquet"))
    elif point == "before the adapter is in place":
        _before(os, "replace", lambda _, target: Path(target).name == "stage-02")
    else:
        assert point == "inside the manifest", point
        _before(os, "replace", lambda source, target: '"finished_stage": 2' in _text(source, target))


def _before(owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Die where owner.name is about to be called with arguments that fit."""
    call = getattr(owner, name)

    def dying(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **keywords)

    setattr(owner, name, dying)


def _second(fits: Callable[..., bool]) -> Callable[..., bool]:
    seen: list[bool] = []
    return lambda *arguments: fits(*arguments) and (seen.append(True) or len(seen) == 2)


def _text(source: Any, target: Any) -> str:
    return Path(source).read_text(encoding="utf-8") if Path(target).name == "manifest.json" else ""

"""A stage's context without a run, for tests of single recorders."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from continual.interfaces import StageContext


def context(
    stage: int = 1, stages: Sequence[Any] = (), seed: int = 0, last: int | None = None, name: str = "one"
) -> StageContext:
    """Return the context of stage ``stage`` of ``last``, by default as many as there are ``stages``; all are scored."""
    later = [SimpleNamespace(name=f"later-{index}") for index in range(len(stages), last or len(stages))]
    nothing: Any = None
    return StageContext(
        run="r",
        seed=seed,
        stage=stage,
        name=name,
        module=nothing,
        stages=[*stages, *later],
        scored=list(stages),
        recorders=[],
        score=nothing,
    )

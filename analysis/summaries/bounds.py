"""The bounds beside a run: which runs in RUN/bounds there are, and what they scored."""

from __future__ import annotations

import numpy as np

from analysis.measures import forgetting
from analysis.runs import tables
from analysis.runs.load import Run, RunReadError, load_run


def read(run: Run) -> dict[str, Run]:
    """Return the runs in the folder ``bounds`` of a run that can be read, by their name."""
    found: dict[str, Run] = {}
    for folder in sorted((run.directory / "bounds").glob("*")):
        try:
            found[folder.name] = load_run(folder)
        except RunReadError:  # one that never began; what needs it says that it is missing
            continue
    return found


def joint_scores(run: Run) -> list[float] | None:
    """Return a*_k, (S,), of the run's learnt tasks k from its joint bound; NaN where missing, None without that run."""
    joint = read(run).get("joint")
    if joint is None or joint.stages != run.stages or not run.learnt:
        return None
    num = len(run.learnt)
    matrix = np.full((num + 1, num), np.nan)
    known = tables.score_matrix(tables.headline(joint), joint.finished_stage)[: num + 1, :num]
    matrix[: len(known)] = known
    return forgetting.just_trained(matrix).tolist()

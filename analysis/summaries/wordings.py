"""How a finished model scores under reworded prompts, beside its scores in the trained ones."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.measures import hierarchy
from analysis.runs.frames import Frame
from analysis.runs.load import Run
from analysis.summaries.intervals import NUM_DRAWS

COLUMNS = ["words", "where", "options", "num_tasks", "score", "trained", "difference", "low", "high"]


def wording_table(run: Run, num_draws: int = NUM_DRAWS) -> Frame:
    """Return the scores of each kind of wording.

    All paraphrases of a file are one kind: a row's value is the mean over them. The interval redraws the test rows of
    every task, the same ones for both wordings.

    Returns:
        One line a kind: ``words`` (the file's name, "none" or "wrong"), ``where``, ``options``, ``num_tasks`` that it
        was scored on, ``score`` and ``trained`` (means over those tasks, of the rows' values), their ``difference``
        and its 95 % interval ``low`` to ``high``. No lines for a run that has not been scored under reworded prompts.
    """
    rows = run.tables["wording_answers"]
    answers = run.tables["answers"]
    trained = answers[answers["stage"] == run.finished_stage].astype({"task": str}).set_index(["task", "row"])["value"]
    rows = rows.assign(words=rows["wording"].str.replace(r"-\d+$", "", regex=True))
    found = []
    for kind, group in rows.groupby(["words", "where", "options"], sort=False):
        values = group.astype({"task": str}).groupby(["task", "row"])["value"].mean()
        pairs: Frame = pd.DataFrame({"own": values, "trained": trained.reindex(values.index)})
        by_task = pairs.groupby("task")
        score, base = by_task.mean().mean()
        drawn = np.zeros(num_draws)
        generator = np.random.default_rng(0)
        for _, pair in by_task:
            counts = generator.multinomial(len(pair), np.full(len(pair), 1 / len(pair)), size=num_draws)
            drawn += counts @ (pair["own"] - pair["trained"]).to_numpy() / len(pair) / by_task.ngroups
        low, high = hierarchy.interval(drawn)
        found.append([*kind, by_task.ngroups, score, base, score - base, low, high])  # type: ignore[misc]
    return pd.DataFrame(found, columns=COLUMNS)

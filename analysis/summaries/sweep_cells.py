"""One cell of a sweep: the run of one method, order and seed, reduced to its score matrix and its rows' scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.measures.forgetting import just_trained, micro_average_accuracy
from analysis.runs import tables
from analysis.runs.load import Run, RunReadError, load_run
from analysis.summaries.intervals import r2_by_row
from analysis.summaries.summary import SCORE_MEASURES, why_not_averaged

Array = NDArray[np.float64]

_TABLES = ("scores", "answers")
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RowScores:
    """What a task's test rows earned, by row index: after the last stage, and after the task's own.

    ``trained`` is NaN where the task was not scored after its own stage, and in a run without stages.
    """

    rows: NDArray[np.int64]
    final: Array
    trained: Array


@dataclass(frozen=True)
class SweepCell:
    """A cell, with its numbers where its run is finished and readable.

    Attributes:
        method: The method's name.
        order: The order's name.
        seed: The seed.
        directory: The run's directory, relative to the sweep's.
        status: "done", "failed" or "waiting", as sweep.json says; "unreadable" where the run cannot be read.
        error: Why it has no numbers, in one line; "" where it has.
        seconds: Wall-clock seconds.
        manifest: The run's manifest.
        stages: Its stages, which are its tasks, in order.
        matrix: R, shape (T + 1, T), or (1, T) for the untrained backbone; None without numbers. NaN where a run did
            not score a task after a stage; its last row is whole.
        num_rows: Each task's test rows behind its final score, in the order of ``stages``.
        rows: Its rows' scores by task.
        rows_problem: Why there are none, in one line.
    """

    method: str
    order: str
    seed: int
    directory: str
    status: str
    error: str = ""
    seconds: float | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    matrix: Array | None = None
    num_rows: list[float] = field(default_factory=list)
    rows: Mapping[str, RowScores] = field(default_factory=dict)
    rows_problem: str = ""

    @property
    def place(self) -> str:
        """What the cell is called in a sentence."""
        return f"{self.method}, {self.order}, seed {self.seed}"

    def final(self) -> dict[str, float]:
        """Return each task's final score."""
        return {} if self.matrix is None else dict(zip(self.stages, map(float, self.matrix[-1]), strict=True))

    def trained(self) -> dict[str, float]:
        """Return each task's score after its own stage; nothing for the untrained backbone."""
        if self.matrix is None or len(self.matrix) == 1:
            return {}
        return dict(zip(self.stages, map(float, just_trained(self.matrix)), strict=True))

    def constant(self, task: str) -> float:
        """Return what the best constant answer to ``task`` earns; NaN where the manifest does not say."""
        value = ((self.manifest.get("tasks") or {}).get(task) or {}).get("constant_score")
        return float(value) if isinstance(value, int | float) else float("nan")

    def measures(self) -> dict[str, float]:
        """Return the score measures of the run, NaN or missing where it lacks the scores that one needs."""
        if self.matrix is None:
            return {}
        if len(self.matrix) == 1:
            found = {"average_accuracy": float(self.matrix[-1].mean())}
        else:
            found = {key: measure(self.matrix) for key, measure in SCORE_MEASURES.items()}
        if self.num_rows:
            found["micro_average_accuracy"] = micro_average_accuracy(self.matrix[-1], self.num_rows)
        return found

    def by_stage(self) -> list[float]:
        """Return the mean score on the tasks learnt so far, after each stage 1..T; NaN where one was not scored."""
        if self.matrix is None:
            return []
        return [float(self.matrix[stage, :stage].mean()) for stage in range(1, len(self.matrix))]


def read_cell(directory: Path, entry: Mapping[str, Any]) -> SweepCell:
    """Read a cell as sweep.json names it; one that failed, waits or cannot be read has a line in ``error``.

    Raises:
        RunReadError: The entry lacks its method, order, seed or directory.
    """
    try:
        method, order, place = str(entry["method"]), str(entry["order"]), str(entry["dir"])
        seed = int(entry["seed"])
    except (KeyError, TypeError, ValueError):
        raise RunReadError("a cell lacks its method, order, seed or dir") from None
    status, seconds = str(entry.get("status", "waiting")), entry.get("seconds")
    cell = SweepCell(method, order, seed, place, status, seconds=float(seconds) if seconds is not None else None)
    error = " ".join(str(entry.get("error") or "").split())
    if status != "done":
        return replace(cell, error=error or ("it failed" if status == "failed" else "it is not finished"))
    try:
        run = load_run(directory / place, _TABLES)
        matrix = _matrix(run)
    except RunReadError as found:
        return replace(cell, status="unreadable", error=_relative(str(found), directory / place))
    rows, problem = _rows(run, matrix)
    found = replace(cell, manifest=run.manifest, stages=run.stages, matrix=matrix, num_rows=_num_rows(run))
    return replace(found, rows=rows, rows_problem=problem)


def _relative(message: str, directory: Path) -> str:
    """Return a message about a run without the run's own path."""
    return message.replace(f"{directory}/", "").removeprefix(f"{directory}: ")


def _matrix(run: Run) -> Array:
    """Return the score matrix of a finished run.

    Raises:
        RunReadError: It is not finished, a score is missing, or its scores cannot be averaged.
    """
    untrained = run.finished_stage == 0 and run.manifest.get("complete")
    if not run.complete and not untrained:
        raise RunReadError(f"{max(run.finished_stage, 0)} of {len(run.stages)} stages are finished")
    if "scores" in run.problems:
        raise RunReadError(run.problems["scores"])
    matrix = tables.score_matrix(tables.headline(run), run.finished_stage)
    lacking = [task for task, score in zip(run.stages, matrix[-1], strict=True) if np.isnan(score)]
    if lacking:  # earlier scores may be: a run may score some tasks after some stages only
        raise RunReadError(f"the final score of {lacking[0]} is missing")
    if why := why_not_averaged(run):
        raise RunReadError(why)
    return matrix


def _num_rows(run: Run) -> list[float]:
    """Return each task's number of test rows; nothing where a score is an R2, which is no mean over rows."""
    if any(run.metric(task) == "r2" for task in run.stages):
        return []
    return tables.row_counts(tables.headline(run), run.finished_stage).tolist()


def _rows(run: Run, matrix: Array) -> tuple[dict[str, RowScores], str]:
    """Return each task's row scores, or none and the reason."""
    if "answers" in run.problems:
        return {}, run.problems["answers"]
    answers = run.tables["answers"]
    codes, stages = answers["task"].cat.codes.to_numpy(), answers["stage"].to_numpy()
    ids, values = answers["row"].to_numpy(), answers["value"].to_numpy(dtype=float)
    last, found = len(matrix) - 1, {}
    for index, task in enumerate(run.stages):
        own = codes == index
        rows, final = _at(ids, values, own & (stages == last))
        again, trained = _at(ids, values, own & (stages == min(index + 1, last)))
        if np.isnan(matrix[min(index + 1, last), index]):  # joint training at the end alone, say
            again, trained = rows, np.full(len(rows), np.nan)
        if not len(rows) or not np.array_equal(rows, again):
            return {}, f"the answers of {task} are not recorded after its own and the last stage"
        if run.metric(task) == "r2":
            scores = np.array([matrix[-1, index], matrix[min(index + 1, last), index]])
            final, trained = r2_by_row(np.stack([final, trained]), scores)
        if not abs(final.mean() - matrix[-1, index]) <= _TOLERANCE * max(1.0, abs(matrix[-1, index])):
            return {}, f"the mean of the recorded answers of {task} is not its recorded score"
        found[task] = RowScores(rows, final, trained if last else np.full(len(rows), np.nan))
    return found, ""


def _at(ids: NDArray[np.int64], values: Array, chosen: NDArray[np.bool_]) -> tuple[NDArray[np.int64], Array]:
    """Return the chosen rows' indices, in order and once each (the last one written), and their values."""
    rows, first = np.unique(ids[chosen][::-1], return_index=True)
    return rows, values[chosen][::-1][first]

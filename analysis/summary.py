"""The numbers of summary.json: one value a measure, or null and the reason why the run cannot show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis import bounds, forgetting, intervals, routing, tables
from analysis.frames import Frame
from analysis.general import general_ability
from analysis.load import Run

Array = NDArray[np.float64]

SCORE_MEASURES: dict[str, Callable[[ArrayLike], float]] = {
    "average_accuracy": forgetting.average_accuracy,
    "backward_transfer": forgetting.backward_transfer,
    "forward_transfer": forgetting.forward_transfer,
    "forgetting": forgetting.forgetting,
    "average_incremental_accuracy": forgetting.average_incremental_accuracy,
    "learning_accuracy": forgetting.learning_accuracy,
}
ROUTE_MEASURES = ("routing_entropy_nats", "route_drift", "kl_separation", "dead_atoms")
KEYS = (
    "average_accuracy",
    "backward_transfer",
    "forward_transfer",
    "forgetting",
    "intransigence",
    "average_incremental_accuracy",
    "learning_accuracy",
    *ROUTE_MEASURES,
    "general_ability_change",
    "trainable_parameters",
)
_NEED_TWO_STAGES = ("backward_transfer", "forward_transfer", "forgetting", "route_drift", "kl_separation")
_SCALES = {"accuracy": "share in [0, 1]", "score": "share in [0, 1]"}


@dataclass
class Summary:
    """A run's numbers over its finished stages.

    ``matrix`` is R with a row for each finished stage and a column for every task, learnt or not; the measures use the
    columns of the learnt tasks only.
    """

    run: Run
    scores: Frame
    matrix: Array
    values: dict[str, float | int | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a value is None, by key; "intervals" says why there are none."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    drawn: Array | None = field(default=None, repr=False)
    """The learnt matrix with its test rows redrawn, shape (draws, S + 1, S); None where there are no intervals."""

    @property
    def learnt_matrix(self) -> Array:
        """R of the finished stages and the tasks they trained, shape (S + 1, S)."""
        return self.matrix[:, : len(self.run.learnt)]

    def to_json(self) -> dict[str, Any]:
        """Return summary.json's content: plain JSON, null for what is not defined."""
        run = self.run
        content: dict[str, Any] = {"run": run.name, "seed": run.manifest.get("seed")}
        content |= {key: _plain(self.values.get(key)) for key in KEYS}
        content |= {"complete": run.complete, "finished_stage": run.finished_stage, "stages": run.stages}
        content |= {"tasks": run.stages, "metrics": {task: run.metric(task) for task in run.stages}}
        content["score_matrix"] = [[_plain(value) for value in row] for row in self.matrix.tolist()]
        content["intervals_95"] = {key: [_plain(low), _plain(high)] for key, (low, high) in self.intervals.items()}
        content["reasons"] = dict(self.reasons)
        return content


def _plain(value: float | int | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value


def summarise(run: Run, joint: Sequence[float] | None = None) -> Summary:
    """Compute a run's numbers.

    Args:
        run: The run.
        joint: For intransigence, the score on each learnt task k of a model trained jointly on stages 1..k; by default
            from the run's own joint bound, where there is one.
    """
    joint = bounds.joint_scores(run) if joint is None else joint
    scores = tables.headline(run)
    summary = Summary(run, scores, tables.score_matrix(scores, run.finished_stage))
    _score_measures(summary, joint)
    _route_measures(summary)
    _general_measure(summary)
    _set(summary, "trainable_parameters", run.model.get("trainable_parameters"), "the manifest does not hold it")
    return summary


def _set(summary: Summary, key: str, value: float | int | None, reason: str) -> None:
    """Keep a value, or None and the reason."""
    summary.values[key] = None if value is None else _plain(value)
    if summary.values[key] is None:
        summary.reasons[key] = reason


def why_not_averaged(run: Run) -> str | None:
    """Return why the learnt tasks' scores cannot be averaged, or None when they can."""
    scales: dict[str, list[str]] = {}
    for task in run.learnt:
        metric = run.metric(task)
        if metric is None:
            return f"the manifest names no metric for {task}"
        if (run.tasks.get(task) or {}).get("higher_is_better") is False:
            return f"{metric}, the metric of {task}, is better when lower; the measures' signs need the opposite"
        scales.setdefault(_SCALES.get(metric, metric), []).append(task)
    if len(scales) > 1:
        parts = "; ".join(f"{scale}: {', '.join(tasks)}" for scale, tasks in scales.items())
        return f"the tasks are scored on unlike scales, which are not averaged ({parts})"
    return None


def _score_measures(summary: Summary, joint: Sequence[float] | None) -> None:
    run, matrix = summary.run, summary.learnt_matrix
    blocked = run.problems.get("scores") or ("no stage is finished" if not run.learnt else why_not_averaged(run))
    for key, measure in SCORE_MEASURES.items():
        value = None if blocked else measure(matrix)
        _set(summary, key, value, blocked or _why_undefined(summary, key))
    if joint is None or blocked:
        _set(
            summary,
            "intransigence",
            None,
            blocked or "it needs the scores of a joint run beside this one (bounds: [joint])",
        )
    else:
        _set(summary, "intransigence", forgetting.intransigence(matrix, joint), "a score is missing")
    if not blocked:
        _intervals(summary)


def _why_undefined(summary: Summary, key: str) -> str:
    if key in _NEED_TWO_STAGES and len(summary.run.learnt) < 2:
        return "it needs two finished stages"
    stages, columns = np.nonzero(np.isnan(summary.learnt_matrix))
    if not len(stages):
        return "it is not defined for this run"
    return f"the score of {summary.run.stages[columns[0]]} after stage {stages[0]} is missing"


def _intervals(summary: Summary) -> None:
    run, learnt = summary.run, len(summary.run.learnt)
    scores = summary.scores[summary.scores["task"].isin(run.learnt)].copy()
    scores["task"] = scores["task"].cat.set_categories(run.learnt)
    if "answers" in run.problems:
        summary.reasons["intervals"] = run.problems["answers"]
        return
    try:
        drawn = intervals.bootstrap_matrices(run.tables["answers"], scores, summary.matrix[:, :learnt])
    except ValueError as error:
        summary.reasons["intervals"] = str(error)
        return
    summary.drawn = drawn
    for key, measure in SCORE_MEASURES.items():
        if summary.values[key] is not None and (found := intervals.interval(drawn, measure)):
            summary.intervals[key] = found


def why_no_routes(run: Run, table: str = "routing") -> str:
    """Return why a run shows nothing of what ``table`` (routing, separation or drift) holds."""
    if table in run.problems or "routing" in run.problems:
        return run.problems.get(table) or run.problems["routing"]
    if run.finished_stage < 0:
        return "nothing is scored yet, and routes are recorded with the scores"
    adapter = str(run.model.get("adapter") or "the adapter").rsplit(".", 1)[-1]
    return f"the run recorded no routes ({adapter} does not route over atoms, or was not asked to record)"


def _general_measure(summary: Summary) -> None:
    run = summary.run
    found = general_ability(run)
    last = found.loc[found["stage"] == run.finished_stage, "change"]
    reason = run.problems.get("general") or "the run did not record it (general_ability: true)"
    if len(found) and not run.learnt:
        last, reason = last[:0], "no stage is finished"
    _set(summary, "general_ability_change", float(last.iloc[0]) if len(last) else None, reason)


def _route_measures(summary: Summary) -> None:
    run, usage = summary.run, tables.usage_array(summary.run)
    learnt, last = len(run.learnt), run.finished_stage
    few = "no stage is finished" if not learnt else "it needs two finished stages" if learnt < 2 else ""
    gap = "routes of a task or stage are missing"
    if usage is None or not learnt:
        reason = why_no_routes(run) if usage is None else few
        _set(summary, "routing_entropy_nats", None, reason)
        _set(summary, "dead_atoms", None, reason)
    else:
        now = usage[last, :learnt]
        whole = not np.isnan(now).any()
        _set(summary, "routing_entropy_nats", float(routing.entropy_nats(now).mean()), gap)
        _set(summary, "dead_atoms", int(routing.dead_atoms(now).sum()) if whole else None, gap)
    separation, drift = tables.separation(run), tables.drift(run)
    apart = tables.separation_matrix(separation, last, "kl")[:learnt, :learnt]
    reason = why_no_routes(run, "separation") if separation.empty else few or gap
    _set(summary, "kl_separation", routing.off_diagonal_mean(apart), reason)
    moved = tables.drift_matrix(drift, max(last, 0))
    reason = few or gap if len(drift) or len(separation) else why_no_routes(run, "drift")
    _set(summary, "route_drift", routing.route_drift(moved), reason)

"""The numbers of summary.json: one value a measure, or null and the reason why the run cannot show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from analysis.measures import forgetting, routing
from analysis.runs import tables
from analysis.runs.frames import Frame
from analysis.runs.load import Run
from analysis.summaries import bounds, intervals
from analysis.summaries.general import general_ability
from continual.measures import distances

Array = NDArray[np.float64]

SCORE_MEASURES: dict[str, Callable[[ArrayLike], float]] = {
    "average_accuracy": forgetting.average_accuracy,
    "backward_transfer": forgetting.backward_transfer,
    "forward_transfer": forgetting.forward_transfer,
    "forgetting": forgetting.forgetting,
    "average_incremental_accuracy": forgetting.average_incremental_accuracy,
    "learning_accuracy": forgetting.learning_accuracy,
}
ROUTE_MEASURES = (
    "routing_entropy_nats",
    "token_entropy_nats",
    "task_information_nats",
    "token_information_nats",
    "route_drift",
    "route_drift_null",
    "route_drift_kl",
    "route_drift_tv",
    "kl_separation",
    "kl_separation_null",
    "js_separation",
    "js_separation_null",
    "dead_atoms",
)
KEYS = (
    "average_accuracy",
    "micro_average_accuracy",
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
_NEED_TWO_STAGES = ("backward_transfer", "forward_transfer", "forgetting")
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


def other_measures(run: Run) -> dict[str, float | int | None]:
    """Return what stands beside a run's scores, by the keys of ``ROUTE_MEASURES`` and two more groups.

    general_ability_change; and moved_since_trained with moved_since_trained_null, in nats: the JS distance between a
    learnt task's usage after the last stage and after its own, and its split-half null, means over blocks and tasks.
    """
    summary = Summary(run, pd.DataFrame(), np.empty((0, len(run.stages))))
    _route_measures(summary)
    _general_measure(summary)
    moved = tables.drift(run)
    moved = moved[
        (moved["stage"] == run.finished_stage) & (moved["reference"] == "trained") & (moved["metric"] == "js")
    ]
    means = {"moved_since_trained": moved["value"].mean(), "moved_since_trained_null": moved["null"].mean()}
    return summary.values | {key: _plain(float(value)) for key, value in means.items()}


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
    micro = None if blocked or _has_r2(run) else _micro(summary)(matrix)
    reason = _R2_NO_MEAN if not blocked and _has_r2(run) else blocked or _why_undefined(summary, "")
    _set(summary, "micro_average_accuracy", micro, reason)
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


_R2_NO_MEAN = "R2 is not a mean over test rows"


def _has_r2(run: Run) -> bool:
    return any(run.metric(task) == "r2" for task in run.learnt)


def _micro(summary: Summary) -> Callable[[ArrayLike], float]:
    """Return the micro mean as a function of the learnt tasks' matrix."""
    counts = tables.row_counts(summary.scores, summary.run.finished_stage)[: len(summary.run.learnt)]
    return lambda matrix: forgetting.micro_average_accuracy(np.asarray(matrix)[-1], counts)


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
    for key, measure in {**SCORE_MEASURES, "micro_average_accuracy": _micro(summary)}.items():
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
    _usage_measures(summary)
    run, learnt, last = summary.run, len(summary.run.learnt), max(summary.run.finished_stage, 0)
    separation, drift = tables.separation(run), tables.drift(run)
    few, gap = _too_few(learnt, 2), "routes of a task or stage are missing"
    unseparated = why_no_routes(run, "separation") if separation.empty else few
    for metric in ("kl", "js"):
        apart = tables.separation_matrix(separation, last, metric)[:learnt, :learnt]
        _set(summary, f"{metric}_separation", routing.off_diagonal_mean(apart), unseparated or gap)
        null = None if unseparated else _split_half(separation, run, metric)
        _set(summary, f"{metric}_separation_null", null, unseparated or _NO_NULL)
    unmoved = few if len(drift) or len(separation) else why_no_routes(run, "drift")
    for key, metric in (("route_drift", "js"), ("route_drift_kl", "kl"), ("route_drift_tv", "tv")):
        moved = tables.drift_matrix(drift, last, metric)
        _set(summary, key, routing.route_drift(moved), unmoved or gap)
    null = routing.route_drift(tables.drift_matrix(drift, last, column="null"))
    _set(summary, "route_drift_null", null, unmoved or _NO_NULL)


_NO_NULL = "the split-half distances were not recorded"


def _too_few(learnt: int, needed: int) -> str:
    """Return why so few finished stages are not enough; "" where they are."""
    if not learnt:
        return "no stage is finished"
    return "" if learnt >= needed else "it needs two finished stages"


def _split_half(separation: Frame, run: Run, metric: str) -> float | None:
    """Return the mean split-half null of the learnt tasks after the last stage; None where one was not recorded."""
    now = separation[(separation["stage"] == run.finished_stage) & (separation["metric"] == f"{metric}_split_half")]
    values = now.loc[now["task"].isin(run.learnt), "value"]
    return float(values.mean()) if len(values) == len(run.learnt) else None


def _usage_measures(summary: Summary) -> None:
    """Set what one stage's usage says: entropies, information, dead atoms."""
    run, usage, learnt = summary.run, tables.usage_array(summary.run), len(summary.run.learnt)
    keys = ("routing_entropy_nats", "token_entropy_nats", "task_information_nats", "token_information_nats")
    if usage is None or not learnt:
        reason = why_no_routes(run) if usage is None else _too_few(learnt, 1)
        for key in (*keys, "dead_atoms"):
            _set(summary, key, None, reason)
        return
    now, gap = usage[-1, :learnt], "routes of a task or stage are missing"
    entropies = tables.entropies(run)
    entropies = entropies[(entropies["stage"] == run.finished_stage) & entropies["task"].isin(run.learnt)]
    by_task = entropies[entropies["metric"] == "token_entropy_nats"].set_index("task")["value"]
    tokens = np.array([float(by_task.get(task, np.nan)) for task in run.learnt])
    whole = distances.entropy_nats(now).mean(axis=-1)
    untold = "the entropies of tokens were not recorded" if by_task.empty else gap
    _set(summary, "routing_entropy_nats", float(whole.mean()), gap)
    _set(summary, "token_entropy_nats", float(tokens.mean()), untold)
    _set(summary, "task_information_nats", routing.task_information_nats(now), gap)
    _set(summary, "token_information_nats", routing.token_information_nats(whole, tokens), untold)
    dead = None if np.isnan(now).any() else int(routing.dead_atoms(now).sum())
    _set(summary, "dead_atoms", dead, gap)

"""From a run's recorded rows to the tidy frames that the figures draw and the numbers are computed from.

Every frame has the columns ``stage`` (0 = untrained) and ``task`` (an ordered category, in the order of training), and
``value``. Values "over blocks" are means of the per-block values. Where a table of distances was not written, or cannot
be read, the distances are computed from the recorded usage; their split-half nulls are then missing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.measures import routing
from analysis.runs.frames import Frame
from analysis.runs.load import Run
from continual.measures import distances

Array = NDArray[np.float64]

_DISTANCES: dict[str, routing.Distance] = {
    "js": distances.js_divergence,
    "kl": distances.kl_divergence,
    "tv": distances.total_variation,
}


def task_names(frame: Frame) -> list[str]:
    """Return the tasks of ``frame`` in the order of training."""
    column = frame["task"]
    names = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else pd.unique(column)
    return [str(name) for name in names]


def categories(names: list[str], order: list[str]) -> pd.Categorical:
    """Return ``names`` as a column ordered as ``order``."""
    return pd.Categorical(names, categories=order, ordered=True)


def headline(run: Run) -> Frame:
    """Return each task's headline score after each stage: columns stage, task, metric, value, count, constant.

    ``count`` is the number of test rows, ``constant`` what the best constant answer earns on the task, NaN where the
    manifest does not say.
    """
    frame = run.tables["scores"]
    frame = frame[frame["task"].isin(run.stages)]
    metrics = frame["task"].astype(str).map({task: run.metric(task) for task in run.stages})
    frame = frame[frame["metric"] == metrics].drop_duplicates(["stage", "task"], keep="last")
    constants = {task: (run.tasks.get(task) or {}).get("constant_score") for task in run.stages}
    frame = frame[["stage", "task", "metric", "value", "count"]].sort_values(["stage", "task"], ignore_index=True)
    frame["task"] = frame["task"].cat.set_categories(run.stages)
    frame["constant"] = pd.to_numeric(frame["task"].astype(str).map(constants), errors="coerce")
    return frame


def score_matrix(scores: Frame, last_stage: int) -> Array:
    """Return R, shape (last_stage + 1, T), from a frame as :func:`headline` gives it; NaN where none was recorded."""
    tasks = task_names(scores)
    matrix = np.full((last_stage + 1, len(tasks)), np.nan)
    known = scores[scores["stage"] <= last_stage]
    matrix[known["stage"], [tasks.index(str(task)) for task in known["task"]]] = known["value"]
    return matrix


def row_counts(scores: Frame, stage: int) -> Array:
    """Return how many test rows each task was scored on after ``stage``, shape (T,), NaN where it was not scored.

    ``scores`` is a frame as :func:`headline` gives it.
    """
    now = scores[scores["stage"] == stage].set_index("task")["count"]
    return np.array([float(now.get(task, np.nan)) for task in task_names(scores)])


def usage_array(run: Run) -> Array | None:
    """Return U, shape (S + 1, T, N, M), from the routing table, or None when it holds no usage.

    An atom that a stage did not yet have counts 0; a task that a stage did not score is NaN.
    """
    table = run.tables["routing"]
    rows = table[(table["metric"] == "usage") & (table["atom"] >= 0) & table["task"].isin(run.stages)]
    if rows.empty:
        return None
    by_block = rows[rows["block"] >= 0]
    rows = by_block if len(by_block) else rows.assign(block=0)
    num_atoms = max(int(run.model.get("num_atoms") or 0), int(rows["atom"].max()) + 1)
    shape = (run.finished_stage + 1, len(run.stages), int(rows["block"].max()) + 1, num_atoms)
    usage = np.full(shape, np.nan)
    tasks = rows["task"].cat.codes.to_numpy()
    usage[rows["stage"], tasks, rows["block"], rows["atom"]] = rows["value"]
    recorded = ~np.isnan(usage).all(axis=-1, keepdims=True)
    return np.where(recorded & np.isnan(usage), 0.0, usage)


def usage(array: Array, tasks: list[str]) -> Frame:
    """Return usage over blocks: columns stage, task, atom, value. ``array`` has shape (S + 1, T, N, M)."""
    return _tidy(array.mean(axis=2), tasks, "atom")


def usage_change(array: Array, tasks: list[str], reference: str) -> Frame:
    """Return how usage over blocks differs from an earlier stage's: columns stage, task, atom, value.

    Args:
        array: Shape (S + 1, T, N, M).
        tasks: The T tasks, in the order of training.
        reference: "previous", the stage before; or "trained", the stage that trained the task (rows after it only).
    """
    mean = array.mean(axis=2)
    if reference == "previous":
        change = np.full_like(mean, np.nan)
        change[1:] = mean[1:] - mean[:-1]
    else:
        change = np.full_like(mean, np.nan)
        for task in range(min(len(tasks), len(mean) - 2)):
            change[task + 2 :, task] = mean[task + 2 :, task] - mean[task + 1, task]
    return _tidy(change, tasks, "atom").dropna(subset="value", ignore_index=True)


def _tidy(array: Array, tasks: list[str], last_axis: str) -> Frame:
    stage, task, last = np.indices(array.shape)
    names = categories([tasks[index] for index in task.ravel()], tasks)
    return pd.DataFrame({"stage": stage.ravel(), "task": names, last_axis: last.ravel(), "value": array.ravel()})


def over_blocks(frame: Frame, keys: list[str]) -> Frame:
    """Return one row a combination of ``keys`` with the mean over blocks: the recorded one, or else computed."""
    per_block = frame[frame["block"] >= 0]
    frame = per_block if len(per_block) else frame
    return frame.groupby(keys, observed=True, as_index=False)["value"].mean()


def entropies(run: Run) -> Frame:
    """Return routing entropies over blocks: columns stage, task, metric, value (nats).

    The metrics are "usage_entropy_nats" and, where it was recorded, "token_entropy_nats".
    """
    table, usage_rows = run.tables["routing"], usage_array(run)
    table = table[table["metric"].isin(["usage_entropy_nats", "token_entropy_nats"]) & table["task"].isin(run.stages)]
    frame = over_blocks(table, ["stage", "task", "metric"])
    if usage_rows is not None and not (frame["metric"] == "usage_entropy_nats").any():
        values = _tidy(distances.entropy_nats(usage_rows), run.stages, "block").dropna(subset="value")
        computed = over_blocks(values, ["stage", "task"]).assign(metric="usage_entropy_nats")
        frame = pd.concat([frame, computed], ignore_index=True)
    frame["task"] = categories(frame["task"].astype(str).tolist(), run.stages)
    return frame


def atoms(usage_now: Array, tasks: list[str]) -> Frame:
    """Return what each atom is used for at one stage, over blocks.

    Args:
        usage_now: Shape (T, N, M).
        tasks: The T tasks.

    Returns:
        Columns atom, task, value (usage), share (of the atom's use, over tasks), entropy (over tasks / ln T), dead.
    """
    mean = usage_now.mean(axis=1)
    total = mean.sum(axis=0)
    share = np.divide(mean, total, out=np.full_like(mean, np.nan), where=total > 0)
    frame = _tidy(mean[None], tasks, "atom").drop(columns="stage")
    frame["share"] = share.ravel()
    frame["entropy"] = atom_entropies(usage_now)[frame["atom"]]
    frame["dead"] = routing.dead_atoms(usage_now)[frame["atom"]]
    return frame


def atom_entropies(usage_now: Array) -> Array:
    """Return each atom's entropy over tasks / ln T, shape (M,): the mean over the blocks that use the atom."""
    per_block = routing.atom_entropy(usage_now)
    known = ~np.isnan(per_block)
    total = np.where(known, per_block, 0.0).sum(axis=0)
    return np.divide(total, known.sum(axis=0), out=np.full(total.shape, np.nan), where=known.any(axis=0))


def separation(run: Run) -> Frame:
    """Return distances between tasks after each stage, over blocks: columns stage, task, other, metric, value.

    The metrics are "js" and "kl" (task against other) and, with other == task, their nulls "js_split_half" and
    "kl_split_half".
    """
    table = run.tables["separation"]
    table = table[table["task"].isin(run.stages) & table["other"].isin(run.stages)]
    frame = over_blocks(table, ["stage", "task", "other", "metric"])
    usage_rows = usage_array(run)
    if frame.empty and usage_rows is not None:
        parts = []
        for metric in ("js", "kl"):
            values = np.stack([routing.pairwise(stage, _DISTANCES[metric]) for stage in usage_rows])
            part = _tidy(values, run.stages, "other").dropna(subset="value")
            part["other"] = [run.stages[index] for index in part["other"]]
            parts.append(part[part["task"].astype(str) != part["other"]].assign(metric=metric))
        frame = pd.concat(parts, ignore_index=True)
    for column in ("task", "other"):
        frame[column] = categories(frame[column].astype(str).tolist(), run.stages)
    return frame


def separation_matrix(frame: Frame, stage: int, metric: str) -> Array:
    """Return one stage's task-separation matrix, shape (T, T), NaN where nothing was recorded.

    The diagonal holds each task's split-half null, 0 where none was recorded.
    """
    tasks = task_names(frame)
    now = frame[frame["stage"] == stage]
    matrix = np.full((len(tasks), len(tasks)), np.nan)
    np.fill_diagonal(matrix, 0.0)
    for name in (metric, f"{metric}_split_half"):
        rows = now[now["metric"] == name]
        matrix[rows["task"].cat.codes, rows["other"].cat.codes] = rows["value"]
    return np.where(np.isnan(matrix), matrix.T, matrix) if metric == "js" else matrix


def drift(run: Run) -> Frame:
    """Return how far each task's routes moved, over blocks: columns stage, task, reference, metric, value, null.

    ``reference`` is "previous" or "trained", the metrics "js", "kl" and "tv"; ``null`` is the split-half value of the
    same task, stage and metric, NaN where it was not recorded.
    """
    table = run.tables["drift"]
    frame = over_blocks(table[table["task"].isin(run.stages)], ["stage", "task", "reference", "metric"])
    usage_rows = usage_array(run)
    if frame.empty and usage_rows is not None:
        frame = _computed_drift(usage_rows, run.stages)
    frame["task"] = categories(frame["task"].astype(str).tolist(), run.stages)
    null = separation(run)
    null = null[null["task"].astype(str) == null["other"].astype(str)]
    null = null[null["metric"].str.endswith("_split_half")].assign(
        metric=null["metric"].str.removesuffix("_split_half")
    )
    null = null.rename(columns={"value": "null"})[["stage", "task", "metric", "null"]]
    return frame.merge(null, on=["stage", "task", "metric"], how="left")


def _computed_drift(usage_rows: Array, tasks: list[str]) -> Frame:
    rows = []
    for stage in range(1, len(usage_rows)):
        for task, name in enumerate(tasks):
            references = {"previous": stage - 1} | ({"trained": task + 1} if task + 1 < stage else {})
            for reference, reference_stage in references.items():
                for metric, distance in _DISTANCES.items():
                    value = distance(usage_rows[stage, task], usage_rows[reference_stage, task]).mean()
                    rows.append(
                        {"stage": stage, "task": name, "reference": reference, "metric": metric, "value": value}
                    )
    return pd.DataFrame(rows, columns=["stage", "task", "reference", "metric", "value"]).dropna(subset="value")


def drift_matrix(
    frame: Frame, last_stage: int, metric: str = "js", reference: str = "previous", column: str = "value"
) -> Array:
    """Return drift as a matrix, shape (last_stage, T): row s - 1 holds stage s; NaN where nothing was recorded.

    ``column`` is "value", or "null" for the split-half nulls.
    """
    tasks = task_names(frame)
    rows = frame[(frame["metric"] == metric) & (frame["reference"] == reference)]
    rows = rows[rows["stage"].between(1, last_stage)]
    matrix = np.full((last_stage, len(tasks)), np.nan)
    matrix[rows["stage"] - 1, rows["task"].cat.codes] = rows[column]
    return matrix


def sharing(usage_now: Array, tasks: list[str]) -> Frame:
    """Return the usage that each pair of tasks has in common at one stage: columns task, other, value (in [0, 1]), js.

    ``value`` is 1 - total variation, the mass of routing that falls on the same atoms; both are means over blocks.
    """
    common = 1 - routing.pairwise(usage_now, distances.total_variation)
    frame = _tidy(common[None], tasks, "other").drop(columns="stage")
    frame["js"] = routing.pairwise(usage_now).ravel()
    frame["other"] = categories([tasks[index] for index in frame["other"]], tasks)
    return frame


def drift_and_loss(drift_frame: Frame, matrix: Array) -> Frame:
    """Pair, for each learnt task and later stage, its route drift with the score it lost there.

    Args:
        drift_frame: As :func:`drift` returns it.
        matrix: R, shape (S + 1, T).

    Returns:
        Columns stage, task, value (JS against the stage before, nats), lost (R[s-1, j] - R[s, j]).
    """
    moved = drift_matrix(drift_frame, max(len(matrix) - 1, 0))
    tasks = task_names(drift_frame)
    pairs = [
        {
            "stage": stage,
            "task": name,
            "value": moved[stage - 1, task],
            "lost": matrix[stage - 1, task] - matrix[stage, task],
        }
        for stage in range(2, len(matrix))
        for task, name in enumerate(tasks[: stage - 1])
    ]
    frame = pd.DataFrame(pairs, columns=["stage", "task", "value", "lost"]).dropna(ignore_index=True)
    frame["task"] = categories(frame["task"].tolist(), tasks)
    return frame

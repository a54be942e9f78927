"""The frames ``separation`` and ``drift``, derived from usages: how far apart tasks route, and how far routes moved.

Every distance is computed for each block; block -1 holds the mean of the blocks' values.

Shapes: T tasks, N blocks, M atoms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.runs.frames import Frame
from continual.measures.distances import js_divergence, kl_divergence, total_variation
from continual.storage import records

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Stage:
    """One stage's usages: U, (T, N, M), the tasks in the order of the table, and the tokens that each is a mean of."""

    usage_TNM: Array
    tasks: list[str]
    counts: list[int]

    def of(self, task: str) -> Array:
        return self.usage_TNM[self.tasks.index(task)]


def separation(routing: Frame, halves: Frame) -> Frame:
    """Return the distances between tasks' usages after each stage, with the split-half null on the diagonal.

    Args:
        routing: The table ``routing``.
        halves: The table ``usage_halves``.

    Returns:
        A frame with the columns of ``records.SCHEMAS["separation"]``: metrics "js" and "kl" of task against other, and
        "js_split_half" and "kl_split_half" of a task's two halves, where other is the task.
    """
    parts = {side: _stages(own) for side, own in halves.groupby("half")}
    # Where a stage's halves are lost there is no null to set a distance beside.
    stages = {stage: found for stage, found in _stages(routing).items() if stage in parts.get(0, {})}
    frames = []
    for stage, found in stages.items():
        first, second = (parts[side][stage].usage_TNM for side in (0, 1))
        usage, own = found.usage_TNM, np.arange(len(found.tasks))
        for_metric = []
        for distance in (js_divergence, kl_divergence):
            values = distance(usage[:, None], usage[None, :])
            values[own, own] = distance(first, second)
            for_metric.append(_with_mean(values))
        values_TTmB = np.stack(for_metric, axis=2)
        num_tasks, _, _, num_blocks = values_TTmB.shape
        task, other, metric, block = (axis.ravel() for axis in np.indices(values_TTmB.shape))
        tasks, names = np.array(found.tasks, dtype=object), np.array(["js", "kl", "js_split_half", "kl_split_half"])
        columns = {
            "task": tasks[task],
            "other": tasks[other],
            "block": _blocks(num_blocks)[block],
            "metric": names[metric + 2 * (task == other)].astype(object),
            "value": values_TTmB.ravel(),
            "count": np.array(found.counts)[task],
        }
        frames.append(_frame(columns, stage))
    return _table("separation", frames, routing)


def drift(routing: Frame, stages: Sequence[str]) -> Frame:
    """Return how far each task's usage moved: since the stage before, and since the stage that trained it.

    Args:
        routing: The table ``routing``.
        stages: The stages' names, which are their tasks', in the order of training.

    Returns:
        A frame with the columns of ``records.SCHEMAS["drift"]``: metrics "js", "kl" and "tv" of the later usage
        against the earlier one.
    """
    found, frames = _stages(routing), []
    for stage, now in found.items():
        for task, count in zip(now.tasks, now.counts, strict=True):
            trained = stages.index(task) + 1
            references = {"previous": stage - 1} | ({"trained": trained} if trained < stage else {})
            for reference, earlier in references.items():
                if earlier not in found or task not in found[earlier].tasks:
                    continue
                pair = (now.of(task), found[earlier].of(task))
                values_mB = np.stack([_with_mean(d(*pair)) for d in (js_divergence, kl_divergence, total_variation)])
                metric, block = (axis.ravel() for axis in np.indices(values_mB.shape))
                columns = {
                    "task": task,
                    "reference": reference,
                    "reference_stage": earlier,
                    "block": _blocks(values_mB.shape[1])[block],
                    "metric": np.array(["js", "kl", "tv"], dtype=object)[metric],
                    "value": values_mB.ravel(),
                    "count": count,
                }
                frames.append(_frame(columns, stage))
    return _table("drift", frames, routing)


def _stages(table: Frame) -> dict[int, _Stage]:
    """Return each stage's usages, in the order of the table."""
    found: dict[int, dict[str, tuple[Array, int]]] = {}
    rows: Any = table[table["metric"] == "usage"] if "metric" in table else table
    for (stage, task), own in rows.groupby(["stage", "task"], sort=False, observed=True):
        usage = own["value"].to_numpy().reshape(own["block"].nunique(), -1)
        found.setdefault(int(stage), {})[str(task)] = (usage, int(own["count"].iloc[0]))
    return {
        stage: _Stage(
            np.stack([usage for usage, _ in tasks.values()]), [*tasks], [count for _, count in tasks.values()]
        )
        for stage, tasks in found.items()
    }


def _with_mean(values: Array) -> Array:
    """Return values of blocks, (..., N), with their mean behind them, (..., N + 1)."""
    return np.concatenate([values, values.mean(axis=-1, keepdims=True)], axis=-1)


def _blocks(num_values: int) -> NDArray[np.int64]:
    """Return the numbers of the blocks, the mean's -1 last."""
    return np.append(np.arange(num_values - 1), -1)


def _frame(columns: Mapping[str, Any], stage: int) -> Frame:
    return pd.DataFrame(columns).assign(stage=stage, direction="none")


def _table(name: str, frames: list[Frame], routing: Frame) -> Frame:
    """Return the frames as one, with the columns of a table; a run's rows all have its name and seed."""
    schema = records.SCHEMAS[name]
    empty = schema.empty_table().to_pandas()
    if not frames:
        return empty
    table = pd.concat(frames, ignore_index=True).assign(run=routing["run"].iloc[0], seed=routing["seed"].iloc[0])
    return table[schema.names].astype(empty.dtypes.to_dict())

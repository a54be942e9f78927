"""What the paper's studies ask of a sweep: stability, checkpoints, ablations, Pareto fronts, reuse and the bounds.

Frames in, frames out. ``load_cells`` reads a sweep's cells as tidy frames; everything else takes such frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.measures import hierarchy
from analysis.measures.pareto import SIZES
from analysis.runs.frames import Frame
from analysis.runs.load import RunReadError, load_run
from analysis.summaries.differences import verdict
from analysis.summaries.sweeps import Sweep

LAST_SHARE = 5
"""Training is judged over the last fifth of a stage's steps."""
BEST = "_best_training"
"""What stands behind a metric's name where the epoch of best training accuracy was scored (continual.callbacks)."""
ADAPTER_FIELDS = "model.adapter.init_args."
ABLATIONS: Mapping[str, str] = {
    "detach_query": "gradient from the routes into A",
    "query_source": "what asks the bank",
    "prior_weight": "the instruction prior",
    "use_depth_summary": "the summary of earlier blocks",
    "num_blocks": "routing anew in each block",
    "top_k": "keeping the top k atoms only",
}
"""Fields of the adapter that take one part of it away, and the part."""


def load_cells(sweep: Sweep, names: Sequence[str]) -> tuple[dict[str, Frame], list[str]]:
    """Read tables of every cell that has numbers, each one frame with the columns ``method`` and ``order`` before it.

    Args:
        sweep: The sweep.
        names: Keys of ``records.SCHEMAS``.

    Returns:
        The frames by name, and a line for each table that cannot be read; the cell then has no rows in it.
    """
    parts: dict[str, list[Frame]] = {name: [] for name in names}
    problems: list[str] = []
    for cell in sweep.cells:
        if cell.matrix is None:
            continue
        try:
            run = load_run(sweep.directory / cell.directory, names)
        except RunReadError as error:
            problems.append(str(error))
            continue
        problems += [f"{cell.directory}: {problem}" for problem in run.problems.values()]
        for name in names:
            rows = run.tables[name].assign(task=run.tables[name]["task"].astype(str))
            rows.insert(0, "method", cell.method)
            rows.insert(1, "order", cell.order)
            parts[name].append(rows.assign(seed=cell.seed))
    joined = {name: pd.concat(each, ignore_index=True) if each else pd.DataFrame() for name, each in parts.items()}
    return joined, problems


def loss_variance(gradients: Frame) -> Frame:
    """Return how much each stage's loss moves at the end: its variance over the last fifth of the steps.

    Args:
        gradients: The gradients tables of a sweep's cells.

    Returns:
        Columns method, order, seed, task, variance (of the loss, unbiased), steps (that it is over); a stage with fewer
        than two such steps has no row.
    """
    keys = ["method", "order", "seed", "stage", "task"]
    losses = _of_metric(gradients, "train_loss")
    rows = []
    for key, own in losses.groupby(keys, sort=False) if len(losses) else ():
        last = own.sort_values("step")["value"].to_numpy()[-max(1, round(len(own) / LAST_SHARE)) :]
        if len(last) > 1:
            place = dict(zip(keys, key, strict=True))
            rows.append(place | {"variance": float(np.var(last, ddof=1)), "steps": len(last)})
    return pd.DataFrame(rows, columns=[*keys, "variance", "steps"]).drop(columns="stage")


def final_scores(scores: Frame, metrics: Mapping[str, str]) -> Frame:
    """Return each cell's and task's last value of a metric: columns method, order, seed, task, value.

    Args:
        scores: The scores tables of a sweep's cells.
        metrics: The metric to take for each task.
    """
    keys = ["method", "order", "seed", "task"]
    rows = scores[scores["metric"] == scores["task"].map(metrics)] if len(scores) else scores
    if not len(rows):
        return pd.DataFrame({key: [] for key in (*keys, "value")}).astype({"value": float})
    return rows.sort_values("stage", kind="stable").groupby(keys, sort=False, as_index=False)["value"].last()


def spread(finals: Frame) -> Frame:
    """Return the mean over seeds of each method's task and its standard deviation (unbiased; NaN for one seed).

    Args:
        finals: As ``final_scores`` returns them.

    Returns:
        Columns method, task, mean, deviation, cells.
    """
    grouped = finals.groupby(["method", "task"], sort=False)["value"]
    return grouped.agg(mean="mean", deviation="std", cells="size").reset_index()


def by_cell(values: Frame) -> Frame:
    """Return the mean of ``value`` over each cell's tasks: columns method, order, seed, value."""
    return values.groupby(["method", "order", "seed"], sort=False, as_index=False)["value"].mean()


def paired_by_cell(values: Frame, baseline: str) -> Frame:
    """Compare methods with ``baseline`` on one number a cell, over the cells of one order and seed that both have.

    Draws take orders, then seeds within them; the seed is fixed. With one cell there is no interval.

    Args:
        values: Columns method, order, seed, value.
        baseline: A method's name.

    Returns:
        Columns method, cells, difference (method minus baseline), low, high, verdict, rough (five cells or fewer).
    """
    index = ["order", "seed"]
    reference = values[values["method"] == baseline].set_index(index)["value"]
    rows = []
    for method, own in values.groupby("method", sort=False):
        both = own.set_index(index)["value"].to_frame("own").join(reference.rename("other"), how="inner").dropna()
        if method == baseline or not len(both):
            continue
        differences = (both["own"] - both["other"]).to_numpy(dtype=float)
        orders = list(both.index.get_level_values("order"))
        low = high = float("nan")
        if len(differences) > 1:
            draws = hierarchy.cell_weights(orders, np.random.default_rng(0)) @ differences
            low, high = hierarchy.interval(draws)
        mean = float(hierarchy.mean_weights(orders) @ differences)
        rough = len(differences) <= hierarchy.FEW_CELLS
        rows.append((method, len(differences), mean, low, high, verdict(low, high), rough))
    return pd.DataFrame(rows, columns=["method", "cells", "difference", "low", "high", "verdict", "rough"])


def concentration_by_epoch(gradients: Frame) -> Frame:
    """Return the gradient concentration of each epoch, the mean over its steps and a cell's stages.

    Returns:
        Columns method, order, seed, epoch (from 1), value.
    """
    rows = _of_metric(gradients, "grad_concentration")
    if not len(rows):
        return pd.DataFrame(columns=["method", "order", "seed", "epoch", "value"])
    means = rows.groupby(["method", "order", "seed", "epoch"], sort=False, as_index=False)["value"].mean()
    return means.assign(epoch=means["epoch"] + 1)


def norms_by_layer(gradients: Frame) -> Frame:
    """Return the mean gradient norm of each method's layers, over steps, stages and cells: method, layer, value."""
    rows = _of_metric(gradients, "grad_norm")
    if not len(rows):
        return pd.DataFrame(columns=["method", "layer", "value"])
    return rows.groupby(["method", "layer"], sort=False, as_index=False)["value"].mean()


def sizes(sweep: Sweep) -> Frame:
    """Return what each routed method of a sweep costs and earns, where rank, atoms or top-k differ.

    Returns:
        Columns method, r, num_atoms, top_k, trainable_parameters, milliseconds_a_row, score (mean final score), means
        over cells; empty with fewer than four settings of r, num_atoms and top_k, which make no front.
    """
    rows = []
    for method in sweep.measured:
        cells = sweep.cells_of(method)
        model = cells[0].manifest.get("model") or {}
        if not all(isinstance(model.get(name), int) for name in SIZES):
            continue
        latencies = [_last(cell.manifest.get("milliseconds_a_row")) for cell in cells]
        row: dict[str, Any] = {"method": method} | {name: model[name] for name in SIZES}
        row |= {"trainable_parameters": float(model.get("trainable_parameters") or "nan")}
        row |= {"milliseconds_a_row": float(np.mean(latencies))}
        rows.append(row | {"score": float(np.mean([np.mean(list(cell.final().values())) for cell in cells]))})
    columns = ["method", *SIZES, "trainable_parameters", "milliseconds_a_row", "score"]
    found = pd.DataFrame(rows, columns=columns)
    return found if len(found.drop_duplicates(list(SIZES))) > 3 else found.iloc[:0]


def own_settings(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Return each method's settings without what tuning chose for it."""
    tuned = {method: (sweep.tuning.get(method) or {}).get("settings") or {} for method in sweep.methods}
    return {
        method: {key: value for key, value in settings.items() if key not in tuned[method]}
        for method, settings in sweep.methods.items()
    }


def whole_adapter(methods: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the method that others of a sweep are ablations of: their settings are its own and one part taken away."""
    best, most = None, 0
    for method in methods:
        count = sum(bool(ablated(methods, method, other)) for other in methods if other != method)
        if count > most:
            best, most = method, count
    return best


def ablated(methods: Mapping[str, Mapping[str, Any]], whole: str, method: str) -> dict[str, Any]:
    """Return the fields that ``method`` sets over ``whole``, by name; nothing where it differs in more than those."""
    own, full = methods[method], methods[whole]
    more = {key: value for key, value in own.items() if key not in full or full[key] != value}
    names = {key.removeprefix(ADAPTER_FIELDS): value for key, value in more.items()}
    if any(key not in own for key in full) or not set(names) <= set(ABLATIONS):
        return {}
    return names


def learning_curves(sweep: Sweep) -> Frame:
    """Return scores by the number of training rows, of tasks that are stages of several sizes (NAME-32, NAME-100 ...).

    Returns:
        Columns method, order, seed, task, rows, value (the score after the task's own stage).
    """
    rows = []
    for cell in sweep.cells:
        for name, value in cell.trained().items():
            task, _, size = name.rpartition("-")
            trained = ((cell.manifest.get("tasks") or {}).get(name) or {}).get("trained_rows")
            if task and size == str(trained) and not np.isnan(value):
                place = {"method": cell.method, "order": cell.order, "seed": cell.seed}
                rows.append(place | {"task": task, "rows": trained, "value": value})
    found: Frame = pd.DataFrame(rows, columns=["method", "order", "seed", "task", "rows", "value"])
    sizes_of = found.groupby("task")["rows"].nunique()
    return found[found["task"].isin(sizes_of.index[sizes_of > 1])].reset_index(drop=True)


def largest_ratios(theory: Frame) -> Frame:
    """Return the largest observed / bound of each metric at each step, over blocks (and runs): metric, step, value."""
    if not len(theory):
        return pd.DataFrame(columns=["metric", "step", "value"])
    return theory.groupby(["metric", "step"], sort=False, as_index=False)["value"].max()


def _of_metric(table: Frame, metric: str) -> Frame:
    return table[table["metric"] == metric] if len(table) else table


def _last(value: Any) -> float:
    """Return the last stage's number of numbers by stage; NaN for none."""
    return float(value[max(value, key=int)]) if isinstance(value, Mapping) and value else float("nan")

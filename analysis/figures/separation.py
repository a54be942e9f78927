"""Figures of distances between routes: task separation, stagewise drift (paper, Fig. 9) and who shares with whom."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.figures import style
from analysis.measures.clusters import Merge, average_linkage, leaf_order
from analysis.runs.frames import Frame
from analysis.runs.tables import separation_matrix as matrix_of
from analysis.runs.tables import task_names

Array = NDArray[np.float64]
_METRICS = (("kl", "KL"), ("js", "JS"))


def _task_labels(ax: Axes, names: list[str]) -> None:
    crowded = len(names) > 6
    labels = [style.short(name, 18) if crowded else style.wrapped(name, 11) for name in names]
    style.label_some(ax, "x", labels, 40, 90 if len(names) > 10 else 40)
    style.label_some(ax, "y", labels, 40)


def separation_matrix(separation: Frame) -> Figure:
    """Draw how far apart the tasks' routes are after the last stage: KL, which has a direction, and JS (Fig. 9).

    Args:
        separation: Columns stage, task, other, metric, value (``tables.separation``).
    """
    tasks, last = task_names(separation), int(separation["stage"].max())
    figure = style.new_figure(min(4.0, 1.4 + 0.45 * len(tasks)) + 1.1)
    axes = figure.subplots(1, 2)
    for place, ((metric, name), ax) in enumerate(zip(_METRICS, axes, strict=True)):
        matrix = matrix_of(separation, last, metric)
        top = float(np.nanmax(matrix)) if not np.isnan(matrix).all() else 0.0
        cells = style.heat(ax, matrix, style.amounts(), (0.0, max(top, 1e-3)), matrix if len(tasks) <= 10 else None)
        ax.set_aspect("equal")
        _task_labels(ax, tasks)
        if place:
            ax.set_yticklabels([])
        ax.set(
            xlabel="to task's routes",
            ylabel="from task's routes" if place == 0 else "",
            title=f"{name} after stage {last}",
        )
        style.colour_bar(figure, cells, [ax], f"{name} (nats)")
    return figure


def separation_by_stage(separation: Frame) -> Figure:
    """Draw the KL matrix after each stage, all on one colour scale, small (Fig. 9's evolution).

    Args:
        separation: Columns stage, task, other, metric, value (``tables.separation``).
    """
    tasks = task_names(separation)
    stages = sorted(separation["stage"].unique())
    matrices = [matrix_of(separation, stage, "kl") for stage in stages]
    columns = 5 if len(stages) <= 10 else 7
    figure, axes = style.panels(len(stages), columns, 1.9 if columns == 5 else 1.5)
    top = max(1e-3, *(float(np.nanmax(matrix)) for matrix in matrices))
    cells = None
    for stage, matrix, ax in zip(stages, matrices, axes, strict=True):
        cells = style.heat(ax, matrix, style.amounts(), (0.0, top))
        ax.set_aspect("equal")
        labels = [str(index + 1) for index in range(len(tasks))]
        style.label_some(ax, "x", labels, 7)
        style.label_some(ax, "y", labels, 7)
        mean = matrix[~np.eye(len(matrix), dtype=bool)].mean() if len(matrix) > 1 else np.nan
        ax.set_title(
            f"{'untrained' if stage == 0 else f'stage {stage}'}: {style.number(float(mean))}", fontweight="normal"
        )
        if 1 <= stage <= len(tasks):
            style.outline(ax, stage - 1, 0, len(tasks), linewidth=1)
    style.outer_labels(axes, columns, "to task", "from task")
    style.colour_bar(figure, cells, axes, "KL (nats)")
    return figure


def route_drift(drift: Frame) -> Figure:
    """Draw each task's route drift by stage in a panel, over its split-half null (Fig. 9).

    Args:
        drift: Columns stage, task, reference, metric, value, null (``tables.drift``).
    """
    js = drift[(drift["metric"] == "js")]
    tasks, last_stage = task_names(js), int(js["stage"].max())
    figure, axes = style.panels(len(tasks), 4, 1.85, sharex=True, sharey=True)
    kinds = (
        ("previous", style.ACCENT, "-", "against the stage before"),
        ("trained", style.MUTED, ":", "since it was trained"),
    )
    for task, (name, ax) in enumerate(zip(tasks, axes, strict=True)):
        own = js[js["task"] == name].sort_values("stage")
        null = own[own["reference"] == "previous"].dropna(subset="null")
        if len(null):
            ax.fill_between(
                null["stage"], 0, null["null"], color=style.FAINT, alpha=0.55, linewidth=0, label="split-half null"
            )
        style.trained_line(ax, task + 1, last_stage)
        for reference, color, line, label in kinds:
            rows = own[own["reference"] == reference]
            if len(rows):
                ax.plot(rows["stage"], rows["value"], line, color=color, marker="o", markersize=3.5, label=label)
        ax.set_title(style.short(name))
        style.stage_axis(ax, last_stage)
    for ax in axes:
        _root_scale(ax, float(np.nanmax(js[["value", "null"]].to_numpy())))
    style.outer_labels(axes, 4, "after stage", "JS (nats)")
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(list(found.values()), list(found), loc="outside upper right", ncols=3)
    return figure


def _root_scale(ax: Axes, top: float) -> None:
    """Space the y axis by the root, in which JS is a metric: small drifts stay readable beside a stage's own jump."""
    top = max(top, 1e-4)
    ax.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    ax.set_ylim(0, top * 1.1)
    ticks = [0.0]
    for tick in (1e-5, 1e-4, 1e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6):
        if tick <= top * 1.05 and np.sqrt(tick) - np.sqrt(ticks[-1]) > 0.16 * np.sqrt(top):
            ticks.append(tick)
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def sharing(shares: Frame) -> Figure:
    """Draw who shares atoms with whom: the usage two tasks have in common, tasks clustered by their JS distance.

    Args:
        shares: Columns task, other, value, js (``tables.sharing``).
    """
    tasks = task_names(shares)
    common, distance = (np.full((len(tasks), len(tasks)), np.nan) for _ in range(2))
    common[shares["task"].cat.codes, shares["other"].cat.codes] = shares["value"]
    distance[shares["task"].cat.codes, shares["other"].cat.codes] = shares["js"]
    merges = average_linkage(distance)
    order = leaf_order(merges, len(tasks))
    size = min(6.2, 2.2 + 0.5 * len(tasks))
    figure = style.new_figure(size, min(style.WIDTH_INCHES, size + 3.6))
    tree, ax = figure.subplots(1, 2, width_ratios=[0.28, 1])
    cells = style.heat(ax, common[np.ix_(order, order)], style.amounts(), (0.0, 1.0), common[np.ix_(order, order)])
    names = [tasks[index] for index in order]
    _task_labels(ax, names)
    ax.yaxis.tick_right()
    ax.set_xlabel("shares with task")
    _draw_tree(tree, merges, order)
    style.colour_bar(figure, cells, [ax], "usage in common (1 − TV)")
    return figure


def _draw_tree(ax: Axes, merges: list[Merge], order: list[int]) -> None:
    """Draw the dendrogram beside the heat map's rows, its leaves at the rows' middles."""
    places = {leaf: (0.0, row + 0.5) for row, leaf in enumerate(order)}
    for index, merge in enumerate(merges):
        (left_x, left_y), (right_x, right_y) = places[merge.left], places[merge.right]
        xs, ys = [left_x, merge.distance, merge.distance, right_x], [left_y, left_y, right_y, right_y]
        ax.plot(xs, ys, color=style.MUTED, linewidth=1.2)
        places[len(order) + index] = (merge.distance, (left_y + right_y) / 2)
    ax.set(ylim=(len(order), 0), yticks=[], xlabel="JS (nats)")
    ax.set_xlim(max([merge.distance for merge in merges], default=1.0) * 1.08 or 1.0, 0)
    ax.locator_params(axis="x", nbins=3)
    ax.spines["left"].set_visible(False)

"""Figures of the scores: the score matrix, each task's curve over stages, and score lost against route drift."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.runs.frames import Frame
from analysis.runs.tables import score_matrix as matrix_of
from analysis.runs.tables import task_names
from analysis.summaries import intervals

_FLOOR = -1.0
"""Scores below it (R2 has no lower end) are drawn at it, with their value written."""
_AXIS_NAMES = {"r2": "R²"}


def score_name(scores: Frame) -> str:
    """Return what to call the headline scores of ``scores`` on an axis."""
    metrics = {str(metric) for metric in scores["metric"]}
    if len(metrics) > 1:
        return "headline score"
    metric = next(iter(metrics), "score")
    return _AXIS_NAMES.get(metric, metric)


def score_matrix(scores: Frame) -> Figure:
    """Draw R as a heat map, stage x task, every cell's true value written and the just-trained cells framed.

    Args:
        scores: Columns stage, task, metric, value (``tables.headline``).
    """
    tasks, last_stage = task_names(scores), int(scores["stage"].max())
    matrix = matrix_of(scores, last_stage)
    crowded = len(tasks) > 8
    height = (1.5 if crowded else 1.1) + 0.36 * len(matrix)
    figure = style.new_figure(height, min(style.WIDTH_INCHES, max(5.6, 2.6 + 1.15 * len(tasks))))
    ax = figure.subplots()
    below = bool((matrix < 0).any())
    cmap, low = (style.gains_and_losses(), _FLOOR) if below else (style.amounts(), 0.0)
    cells = style.heat(ax, matrix, cmap, (low, 1.0), matrix)
    rows = ["untrained", *(f"{stage + 1}  {style.short(name)}" for stage, name in enumerate(tasks[:last_stage]))]
    style.label_some(ax, "y", rows, 40)
    columns = [style.short(name) if crowded else style.wrapped(name) for name in tasks]
    style.label_some(ax, "x", columns, 40, 40 if crowded else 0)
    for stage in range(1, min(last_stage, len(tasks)) + 1):
        style.outline(ax, stage, stage - 1, edgecolor="white", linewidth=3.4)
        style.outline(ax, stage, stage - 1, edgecolor=style.INK if below else style.WARM)
    ax.set(xlabel="scored on task", ylabel="after stage")
    cut = "min" if (matrix < low).any() else "neither"
    style.colour_bar(figure, cells, [ax], score_name(scores), cut)
    return figure


def score_curves(scores: Frame) -> Figure:
    """Draw each task's score by stage in a panel of its own, the other tasks behind it in grey.

    Args:
        scores: Columns stage, task, metric, value, constant (``tables.headline``).
    """
    tasks, last_stage = task_names(scores), int(scores["stage"].max())
    matrix = np.maximum(matrix_of(scores, last_stage), _FLOOR)
    figure, axes = style.panels(len(tasks), 4, 1.95, sharex=True, sharey=True)
    constants = scores.drop_duplicates("task").set_index("task")["constant"]
    stages = np.arange(last_stage + 1)
    low = min(0.0, float(np.nanmin(matrix)))
    for task, (name, ax) in enumerate(zip(tasks, axes, strict=True)):
        for other in range(len(tasks)):
            if other != task:
                ax.plot(stages, matrix[:, other], color=style.CONTEXT, linewidth=1, zorder=0)
        constant = constants.get(name, np.nan)
        if not np.isnan(constant):
            ax.axhline(constant, color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)), label="best constant answer")
        style.trained_line(ax, task + 1, last_stage)
        ax.plot(stages, matrix[:, task], color=style.ACCENT, marker="o", markersize=4, linewidth=1.8)
        ax.set_title(style.short(name))
        ax.set_ylim(low - 0.05 * (1 - low), 1.05)
        style.stage_axis(ax, last_stage)
        ax.set_xlim(right=last_stage + 0.25 + 0.2 * max(last_stage, 1))  # the last value stands right of its point
        _write_end(ax, scores, name, last_stage)
    style.outer_labels(axes, 4, "after stage", score_name(scores))
    return figure


def _write_end(ax: Axes, scores: Frame, task: str, last_stage: int) -> None:
    """Write the final score right of the curve's end, and above its point the value of what lies below the axis."""
    own = scores[scores["task"] == task]
    for stage, value in zip(own["stage"], own["value"], strict=True):
        if value >= _FLOOR and stage != last_stage:
            continue
        end = stage == last_stage
        ax.annotate(
            style.number(value),
            (stage, max(value, _FLOOR)),
            (6, 0) if end else (0, 5),
            textcoords="offset points",
            ha="left" if end else "center",
            va="center" if end else "bottom",
            fontsize=8.5 if end else 7.5,
            color=style.ACCENT,
            zorder=4,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
        )


def drift_against_loss(pairs: Frame, score: str = "score") -> Figure:
    """Draw score lost against route drift, one point a learnt task and later stage, with the rank correlation.

    Args:
        pairs: Columns stage, task, value (drift, nats), lost (``tables.drift_and_loss``).
        score: What the lost score is, for the axis.
    """
    figure = style.new_figure(4.2, 7.2)
    ax = figure.subplots()
    tasks = [name for name in task_names(pairs) if (pairs["task"] == name).any()]
    ax.axhline(0, color=style.FAINT, linewidth=1, zorder=0)
    few = len(tasks) <= len(style.COLORS)
    for index, name in enumerate(tasks):
        own = pairs[pairs["task"] == name]
        color = style.COLORS[index] if few else style.ACCENT
        ax.scatter(
            own["value"], own["lost"], s=42, color=color, edgecolor="white", linewidth=0.8, label=style.short(name)
        )
    if few:
        figure.legend(loc="outside right upper", title="task")
    if float(np.ptp(pairs["lost"])) > 5:
        ax.set_yscale("symlog", linthresh=1)
    for row in pairs.nlargest(3 if len(pairs) <= 40 else 1, "lost").itertuples():
        if row.lost > 0:
            text = f"stage {row.stage}" if few else f"{style.short(str(row.task))}, stage {row.stage}"
            ax.annotate(text, (row.value, row.lost), (7, -3), textcoords="offset points", fontsize=8, color=style.MUTED)
    ax.margins(0.12)
    ax.locator_params(axis="x", nbins=6)
    ax.set_xlabel("route drift: JS against the stage before (nats)")
    ax.set_ylabel(f"{score} lost at that stage")
    ax.set_title(correlation_text(pairs), fontweight="normal")
    return figure


def correlation_text(pairs: Frame) -> str:
    """Return the rank correlation of drift and score lost, with its interval, in words."""
    value = intervals.rank_correlation(pairs["value"], pairs["lost"])
    if np.isnan(value):
        return f"{len(pairs)} point{'s' * (len(pairs) != 1)}: no correlation can be given"
    text = f"Spearman correlation {style.number(value)}"
    found = intervals.correlation_interval(pairs["value"], pairs["lost"])
    if found is None:
        return f"{text}, {len(pairs)} points: too few for an interval"
    return f"{text}, 95 % interval {style.number(found[0])} to {style.number(found[1])}, {len(pairs)} points"

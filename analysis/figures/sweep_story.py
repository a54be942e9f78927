"""Figures of a few runs side by side, a panel a method: scores after every stage, and how far routes moved at each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.runs.frames import Frame
from analysis.runs.tables import task_names

_FLOOR = -1.0
"""Scores below it (R2 has no lower end) are drawn at it, with their value written."""


def score_matrices(scores: Frame) -> Figure:
    """Draw each method's score matrix, stage x task, the just-trained cells framed.

    Args:
        scores: Columns method, stage (0 = untrained), task (an ordered category), value; NaN where not scored.
    """
    below = bool((scores["value"] < 0).any())
    cmap, low = (style.gains_and_losses(), _FLOOR) if below else (style.amounts(), 0.0)
    figure, axes, cells = _panels(scores, cmap, (low, 1.0), style.number)
    style.colour_bar(figure, cells, axes, "score", "min" if (scores["value"] < low).any() else "neither")
    return figure


def moves_by_method(drift: Frame) -> Figure:
    """Draw how far each task's routes moved at each stage, a panel a method on one scale, the task's own stage framed.

    Args:
        drift: Columns method, stage (from 1), task (an ordered category), value (JS against the stage before, nats).
    """
    top = max(float(drift["value"].max()), 1e-3)
    figure, axes, cells = _panels(drift, style.amounts(), (0.0, top), _three_digits)
    style.colour_bar(figure, cells, axes, "JS (nats)")
    return figure


def _three_digits(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def _panels(
    frame: Frame, cmap: Any, limits: tuple[float, float], write: Callable[[float], str]
) -> tuple[Figure, list[Axes], Any]:
    """Draw a heat map of ``value`` a method, stage x task, each task's own stage framed; return what a bar needs."""
    methods, tasks = list(dict.fromkeys(frame["method"])), task_names(frame)
    first, last = int(frame["stage"].min()), int(frame["stage"].max())
    rows = last - first + 1
    crowded = len(tasks) > 4
    height = 1.15 + 0.36 * rows + 0.5 * crowded
    figure, axes = style.panels(len(methods), 2, height, sharex=True, sharey=True)
    cells = None
    for method, ax in zip(methods, axes, strict=True):
        own = frame[frame["method"] == method]
        values = np.full((rows, len(tasks)), np.nan)
        values[own["stage"] - first, own["task"].cat.codes] = own["value"]
        cells = style.heat(ax, values, cmap, limits, values, write=write)
        for task in range(len(tasks)):
            style.outline(ax, task + 1 - first, task, edgecolor="white", linewidth=3.4)
            style.outline(ax, task + 1 - first, task)
        ax.set_title(style.short(method, 40))
    names = ["untrained", *(f"{stage + 1}  {style.short(name)}" for stage, name in enumerate(tasks))]
    columns = [style.short(name) if crowded else style.wrapped(name) for name in tasks]
    for ax in axes:
        style.label_some(ax, "x", columns, 40, 40 if crowded else 0)
    style.label_some(axes[0], "y", names[first : last + 1], 40)
    style.outer_labels(axes, 2, "task", "after stage")
    return figure, axes, cells

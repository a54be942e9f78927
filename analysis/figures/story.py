"""Figures of the routing story: which atoms each task uses, and what moved at which stage."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.runs.frames import Frame
from analysis.runs.tables import drift_matrix, task_names


def atoms_by_task(usage: Frame) -> Figure:
    """Draw what share of its routing weight each task gives to each atom after the last stage, tasks x atoms.

    Args:
        usage: Columns stage, task, atom, value (``tables.usage``); the last stage is drawn.
    """
    tasks, last = task_names(usage), int(usage["stage"].max())
    now = usage[usage["stage"] == last]
    values = np.full((len(tasks), int(usage["atom"].max()) + 1), np.nan)
    values[now["task"].cat.codes, now["atom"]] = now["value"]
    num_atoms = values.shape[1]
    width = min(style.WIDTH_INCHES, max(5.6, 3.0 + 0.45 * num_atoms))
    figure = style.new_figure(1.1 + 0.32 * len(tasks), width)
    ax = figure.subplots()
    top = max(float(np.nanmax(values)) if not np.isnan(values).all() else 0.0, 2 / num_atoms)
    cells = style.heat(ax, values, style.amounts(), (0.0, top), values if num_atoms <= 18 else None)
    style.label_some(ax, "y", [style.short(name, 24) for name in tasks], 40)
    style.label_some(ax, "x", [str(atom) for atom in range(num_atoms)], 32)
    ax.set_xlabel("atom")
    style.colour_bar(figure, cells, [ax], f"usage (even: {style.number(1 / num_atoms)})")
    return figure


def moves(drift: Frame) -> Figure:
    """Draw how far each task's routes moved at each stage, in split-half nulls where there are any, tasks x stages.

    Args:
        drift: Columns stage, task, reference, metric, value, null (``tables.drift``).
    """
    tasks, last = task_names(drift), int(drift["stage"].max())
    moved = drift_matrix(drift, last).T
    null = drift_matrix(drift.assign(value=drift["null"]), last).T
    in_nulls = not np.isnan(null).all()
    values = np.divide(moved, null, out=np.full_like(moved, np.nan), where=null > 0) if in_nulls else moved
    figure = style.new_figure(1.15 + 0.32 * len(tasks), min(style.WIDTH_INCHES, max(5.6, 3.0 + 0.55 * last)))
    ax = figure.subplots()
    top = max(float(np.nanmax(values)) if not np.isnan(values).all() else 0.0, 2.0 if in_nulls else 1e-3)
    if in_nulls:  # some move by thousands of nulls, others by two
        cells = style.heat(ax, np.maximum(values, 1.0), style.amounts(), (1.0, top), values, logarithmic=True)
    else:
        cells = style.heat(ax, values, style.amounts(), (0.0, top), values)
    for task in range(min(len(tasks), last)):
        style.outline(ax, task, task)
    style.label_some(ax, "y", [style.short(name, 24) for name in tasks], 40)
    style.label_some(ax, "x", [str(stage) for stage in range(1, last + 1)], 32)
    ax.set_xlabel("at stage")
    label = "JS / split-half null" if in_nulls else "JS (nats)"
    style.colour_bar(figure, cells, [ax], label)
    return figure

"""Figures of what routing uses: usage by task (paper, Fig. 6), its change (Fig. 7), specialists (Fig. 8)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.figures import style
from analysis.runs.frames import Frame
from analysis.runs.tables import task_names

Array = NDArray[np.float64]


def _grid(frame: Frame) -> tuple[int, float, int, int]:
    """Return columns, panel height, number of atoms and first stage for one heat map a task."""
    num_atoms, first = int(frame["atom"].max()) + 1, int(frame["stage"].min())
    num_rows, num_tasks = int(frame["stage"].max()) - first + 1, frame["task"].nunique()
    columns = 4 if num_atoms <= 10 else 3 if num_atoms <= 24 or num_tasks > 6 else 2
    return columns, 0.75 + min(0.17 * max(num_rows, 5), 1.5), num_atoms, first


def _cells(frame: Frame, task: str, num_atoms: int, first: int, last: int) -> Array:
    own = frame[frame["task"] == task]
    values = np.full((last - first + 1, num_atoms), np.nan)
    values[own["stage"] - first, own["atom"]] = own["value"]
    return values


def _label_cells(ax: Axes, name: str, first: int, last: int, num_atoms: int, columns: int) -> None:
    ax.set_title(style.short(name, 26))
    style.label_some(ax, "y", [str(stage) for stage in range(first, last + 1)], 11)
    style.label_some(ax, "x", [str(atom) for atom in range(num_atoms)], 16 if columns <= 2 else 9)


def atom_usage(usage: Frame) -> Figure:
    """Draw one heat map a task, stages x atoms: the share of its routing weight that each atom gets (Fig. 6).

    Args:
        usage: Columns stage, task, atom, value (``tables.usage``).
    """
    columns, height, num_atoms, first = _grid(usage)
    tasks, last = task_names(usage), int(usage["stage"].max())
    figure, axes = style.panels(len(tasks), columns, height)
    top = max(float(usage["value"].max()), 2 / num_atoms)
    cells = None
    for task, (name, ax) in enumerate(zip(tasks, axes, strict=True)):
        values = _cells(usage, name, num_atoms, first, last)
        cells = style.heat(ax, values, style.amounts(), (0.0, top))
        _label_cells(ax, name, first, last, num_atoms, columns)
        if first <= task + 1 <= last:
            style.outline(ax, task + 1 - first, 0, num_atoms, linewidth=1.3)
    style.outer_labels(axes, columns, "atom", "after stage")
    style.colour_bar(figure, cells, axes, f"usage\n(even use: {1 / num_atoms:.3f})")
    return figure


def usage_drift(change: Frame, reference: str = "in one stage") -> Figure:
    """Draw one heat map a task, stages x atoms: usage minus an earlier stage's usage (Fig. 7).

    Args:
        change: Columns stage, task, atom, value (``tables.usage_change``).
        reference: Over what time the usage changed, for the colour bar's label; short.
    """
    columns, height, num_atoms, first = _grid(change)
    order, last = task_names(change), int(change["stage"].max())
    tasks = [name for name in order if (change["task"] == name).any()]
    figure, axes = style.panels(len(tasks), columns, height)
    top = max(float(change["value"].abs().max()), 1e-3)
    cells = None
    for name, ax in zip(tasks, axes, strict=True):
        values = _cells(change, name, num_atoms, first, last)
        cells = style.heat(ax, values, style.differences(), (-top, top))
        _label_cells(ax, name, first, last, num_atoms, columns)
        trained = order.index(name) + 1
        if first <= trained <= last and not np.isnan(values[trained - first]).all():
            style.outline(ax, trained - first, 0, num_atoms, linewidth=1.3, edgecolor=style.INK)
    style.outer_labels(axes, columns, "atom", "after stage")
    style.colour_bar(figure, cells, axes, f"change of usage\n{reference}")
    return figure


def routing_entropy(entropies: Frame, num_atoms: int) -> Figure:
    """Draw each task's routing entropy by stage in a panel, as a share of ln M: of its usage, and of its tokens.

    Args:
        entropies: Columns stage, task, metric, value in nats (``tables.entropies``).
        num_atoms: M.
    """
    tasks, last_stage = task_names(entropies), int(entropies["stage"].max())
    figure, axes = style.panels(len(tasks), 4, 1.8, sharex=True, sharey=True)
    kinds = (
        ("usage_entropy_nats", style.ACCENT, "-", "of the usage"),
        ("token_entropy_nats", style.WARM, "--", "of a token, mean"),
    )
    scale = np.log(num_atoms) if num_atoms > 1 else 1.0
    for task, (name, ax) in enumerate(zip(tasks, axes, strict=True)):
        ax.axvline(task + 1, color=style.FAINT, linewidth=1, zorder=0)
        for metric, color, line, label in kinds:
            own = entropies[(entropies["task"] == name) & (entropies["metric"] == metric)].sort_values("stage")
            if len(own):
                ax.plot(own["stage"], own["value"] / scale, line, color=color, marker="o", markersize=3.5, label=label)
        ax.set_title(style.short(name))
        ax.set_ylim(0, 1.05)
        style.stage_axis(ax, last_stage)
    style.outer_labels(axes, 4, "after stage", "entropy / ln M")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    return figure


def specialists(atoms: Frame) -> Figure:
    """Draw specialists against shared atoms: entropy over tasks against usage, and each atom's mix of tasks (Fig. 8).

    Args:
        atoms: Columns atom, task, value, share, entropy, dead (``tables.atoms``).
    """
    tasks, num_atoms = task_names(atoms), int(atoms["atom"].max()) + 1
    one = atoms.groupby("atom", as_index=False).agg(
        value=("value", "mean"), entropy=("entropy", "first"), dead=("dead", "first")
    )
    figure = style.new_figure(3.4 + 0.2 * max(len(tasks), 4))
    top, bottom = figure.subplots(2, 1, height_ratios=[3.0, 0.6 + 0.2 * max(len(tasks), 4)])
    _scatter_atoms(top, one, num_atoms)
    order = one.sort_values(["dead", "entropy", "atom"])["atom"].to_list()
    shares = np.full((len(tasks), num_atoms), np.nan)
    shares[atoms["task"].cat.codes, atoms["atom"]] = atoms["share"]
    cells = style.heat(bottom, shares[:, order], style.amounts(), (0.0, 1.0))
    style.label_some(bottom, "x", [str(atom) for atom in order], 64 if num_atoms <= 32 else 32)
    style.label_some(bottom, "y", [style.short(name, 22) for name in tasks], 20)
    num_dead = int(one["dead"].sum())
    if num_dead:
        bottom.axvline(num_atoms - num_dead, color=style.WARM, linewidth=1.6)
    bottom.set_xlabel("atom, specialists first" + (f"; right of the line: {num_dead} dead" if num_dead else ""))
    bottom.set_title("Whose atom is it: the share of an atom's use that each task makes")
    style.colour_bar(figure, cells, [bottom], "share of use")
    return figure


def _scatter_atoms(ax: Axes, atoms: Frame, num_atoms: int) -> None:
    alive, dead = atoms[~atoms["dead"]], atoms[atoms["dead"] & atoms["entropy"].notna()]
    ax.axvline(1 / num_atoms, color=style.FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    ax.scatter(
        alive["value"], alive["entropy"], s=34, color=style.ACCENT, edgecolor="white", linewidth=0.7, label="atom"
    )
    ax.scatter(
        dead["value"],
        dead["entropy"],
        s=26,
        marker="x",
        color=style.MUTED,
        linewidth=1,
        label="dead atom",
        clip_on=False,
    )
    few = pd.concat([alive.nsmallest(5, "entropy"), alive.nlargest(5, "value")])
    named: Frame = alive if num_atoms <= 20 else few
    for row in named.drop_duplicates("atom").itertuples():
        place = (row.value, row.entropy)
        ax.annotate(str(row.atom), place, (5, 3), textcoords="offset points", fontsize=8, color=style.MUTED)
    ax.set(xlabel="usage, mean over tasks (dashed: 1/M)", ylabel="entropy over tasks / ln T", ylim=(-0.04, 1.08))
    ax.set_xlim(left=0)
    ax.set_title("Low: a specialist of few tasks.  High: shared by all")
    if len(dead):
        ax.legend(loc="lower right")

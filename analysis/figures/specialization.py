"""Figures of what the atoms of a run's bank are for: each takes tidy frames of one run and returns its Axes.

They draw what the functions of ``analysis.summaries.specialization`` return, one picture each, for notebooks and
for whoever wants one figure alone: ``usage_map(frames.routing).figure``. A run that lacks what a figure needs gets an
empty one that says so. Of a growing bank, atoms are named by their slice and their number in it.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.figures import style
from analysis.runs.frames import Frame
from analysis.summaries import specialization

Array = NDArray[np.float64]

_NO_ROUTES = "This run has no routes recorded: its adapter has no atoms, or nothing is scored yet."
_NO_DRIFT = "No drift is recorded: it needs routes, and two scored stages."
_NO_TOKENS = "This run has no tokens recorded: token_sample is 0, its rows are numbers, or its adapter has no atoms."
_NOT_REMOVED = "No atom was taken out: python -m continual.ablate RUN does it where an adapter has atoms."
_BESIDE: Any = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
_ONE_TASK = "One task alone shares with nobody."


@style.look()
def usage_map(routing: Frame) -> Axes:
    """Draw how much of its routing each task gives to each atom after the last stage; atoms of like use stand together.

    Args:
        routing: The table routing.
    """
    used = specialization.usage(routing)
    if used.empty:
        return _sentence(_NO_ROUTES)
    order = _by_first_user(used.to_numpy())
    used = used.iloc[:, order]
    ax = _axes(used.shape)
    top = max(float(used.to_numpy().max()), 2 / used.shape[1])
    cells = style.heat(ax, used.to_numpy(), style.amounts(), (0.0, top))
    _label(ax, used, "atom, by the task that uses it most", "")
    return _finish(ax, cells, f"Usage (even use: {1 / used.shape[1]:.3f})")


@style.look()
def specialists(routing: Frame) -> Axes:
    """Draw each atom's entropy over tasks against its usage: specialists are low, shared atoms high.

    Args:
        routing: The table routing.
    """
    atoms = specialization.atoms(routing)
    if atoms["entropy"].isna().all():
        return _sentence(_NO_ROUTES if atoms.empty else _ONE_TASK)
    ax = style.new_figure(3.6, 7.5).subplots()
    tasks = [str(task) for task in specialization.usage(routing).index]
    colors = _colors(tasks)
    for task in tasks:
        own = atoms[(atoms["task"] == task) & ~atoms["dead"]]
        ax.scatter(own["usage"], own["entropy"], s=44, color=colors[task], edgecolor="white", label=style.short(task))
    dead = atoms[atoms["dead"] & atoms["entropy"].notna()]
    if len(dead):
        ax.scatter(dead["usage"], dead["entropy"], marker="x", color=style.MUTED, clip_on=False, label="dead")
    _name_apart(ax, atoms[~atoms["dead"]].sort_values("usage", ascending=False))
    ax.set_title("Low: a specialist of few tasks.  High: shared by all")
    ax.set(xlabel="usage, mean over tasks", ylabel="entropy over tasks / ln T", xlim=(0, None), ylim=(-0.05, 1.08))
    ax.legend(title="most used by", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


@style.look()
def entropy_map(routing: Frame, metric: str = "usage_entropy_nats") -> Axes:
    """Draw each task's routing entropy / ln M after each stage; the frame marks the stage that trained it.

    Args:
        routing: The table routing.
        metric: "usage_entropy_nats" or "token_entropy_nats".
    """
    whose = "of a task's usage" if metric == "usage_entropy_nats" else "of a token's routes, mean"
    frame = specialization.entropies(routing, metric)
    return _stage_map(frame, _task_order(routing), 1.0, f"Entropy / ln M, {whose}", _NO_ROUTES)


@style.look()
def drift_map(drift: Frame, reference: str = "previous") -> Axes:
    """Draw how far each task's routes moved at each stage, JS in nats; the frame marks the stage that trained it.

    Args:
        drift: The table drift.
        reference: "previous", from the stage before; "trained", from the stage that trained the task.
    """
    since = "the stage before" if reference == "previous" else "the stage that trained the task"
    frame = specialization.drift(drift, reference)
    return _stage_map(frame, _task_order(drift), None, f"Route drift from {since}, JS (nats)", _NO_DRIFT)


@style.look()
def sharing_graph(routing: Frame, least: float = 1.5) -> Axes:
    """Draw tasks and atoms as a graph: a line where a task gives an atom its weight, as wide as that weight.

    Tasks that meet in an atom share it. Atoms are placed near the tasks that use them.

    Args:
        routing: The table routing.
        least: Lines of less than this many times the even use, 1 / M, are left out.
    """
    used = specialization.usage(routing).drop(columns=specialization.NO_SLICE, errors="ignore")
    if used.empty:
        return _sentence(_NO_ROUTES)
    num_tasks, all_atoms = used.shape
    limit = min(least / all_atoms, float(used.to_numpy().max()))
    used = used.loc[:, (used >= limit).any()]
    values, num_atoms = used.to_numpy(), used.shape[1]
    drawn = values >= limit
    total = values.sum(axis=0)
    middle = np.divide(values.T @ np.arange(num_tasks), total, out=np.full(num_atoms, np.inf), where=total > 0)
    order = np.argsort(middle, kind="stable")
    place = np.empty(num_atoms)
    place[order] = np.linspace(0, 1, num_atoms) if num_atoms > 1 else 0.5
    rows = np.linspace(0, 1, num_tasks) if num_tasks > 1 else np.array([0.5])
    ax = style.new_figure(max(2.6, 0.26 * num_atoms + 0.6), 8.0).subplots()
    colors = _colors(list(used.index))
    for task, atom in np.argwhere(drawn):
        color = colors[str(used.index[task])]
        width = 9 * values[task, atom] / values.max()
        ax.plot([0, 1], [rows[task], place[atom]], color=color, linewidth=width, alpha=0.6, solid_capstyle="butt")
    for task, name in enumerate(used.index):
        ax.plot(0, rows[task], "o", color=colors[str(name)], markersize=9, zorder=3)
        ax.annotate(style.short(str(name), 24), (0, rows[task]), (-9, 0), **_BESIDE, ha="right")
    meet = drawn.sum(axis=0)
    for atom, name in enumerate(used.columns):
        color = style.INK if meet[atom] > 1 else style.MUTED
        ax.plot(1, place[atom], "s", color=color, markersize=6, zorder=3)
        said = f"{name}  shared by {meet[atom]}" if meet[atom] > 1 else str(name)
        ax.annotate(said, (1, place[atom]), (9, 0), **_BESIDE, ha="left", color=color)
    ax.set(xlim=(-0.35, 1.3), ylim=(1.06, -0.06))
    less = f"; {all_atoms - num_atoms} atoms get less from every task" if num_atoms < all_atoms else ""
    ax.set_title(f"Lines: at least {least:g} times the even use{less}")
    ax.set_axis_off()
    return ax


@style.look()
def token_map(tokens: Frame, num: int = 24) -> Axes:
    """Draw the tokens whose routing differs most from the usual, and how much of it each atom gets.

    Args:
        tokens: The table tokens.
        num: How many tokens.
    """
    weights = specialization.token_weights(tokens)
    if weights.empty:
        return _sentence(_NO_TOKENS)
    names = list(dict.fromkeys(weights["atom"]))
    wide = weights.pivot_table(index="token", columns="atom", values="weight", sort=False).fillna(0.0)[names]
    strength = weights.assign(lift=weights["lift"].abs()).groupby("token")["lift"].sum()
    wide = wide.loc[strength.sort_values(ascending=False, kind="stable").index[:num]]
    wide = wide.iloc[np.argsort(wide.to_numpy().argmax(axis=1), kind="stable")]
    counts = weights.drop_duplicates("token").set_index("token")["count"]
    wide.index = [f"{token}  x{counts[token]}" for token in wide.index]
    ax = _axes(wide.shape)
    cells = style.heat(ax, wide.to_numpy(), style.amounts(), (0.0, max(float(wide.to_numpy().max()), 1e-3)))
    _label(ax, wide, "atom", "token, times sampled")
    return _finish(ax, cells, "Where these tokens go, mean weight over blocks")


@style.look()
def removal_map(ablation: Frame) -> Axes:
    """Draw what taking each atom out costs each task; frames mark costs whose 95 % interval leaves out 0.

    Args:
        ablation: The table ablation.
    """
    costs = specialization.removal(ablation)
    if costs.empty:
        return _sentence(_NOT_REMOVED)
    wide = costs.pivot_table(index="task", columns="atom", values="cost", observed=True)
    sure = costs.assign(sure=(costs["low"] > 0) | (costs["high"] < 0))
    sure = sure.pivot_table(index="task", columns="atom", values="sure", observed=True, aggfunc="max")
    ax = _axes(wide.shape)
    top = max(float(np.abs(wide.to_numpy()).max()), 0.01)
    cells = style.heat(
        ax, wide.to_numpy(), style.differences(), (-top, top), wide.to_numpy() if wide.shape[1] <= 12 else None
    )
    for row, column in np.argwhere(sure.to_numpy().astype(bool)):
        style.outline(ax, row, column, edgecolor=style.INK, linewidth=1.2)
    _label(ax, wide, "atom taken out", "")
    return _finish(ax, cells, "Score lost without it (framed: the 95 % interval leaves out 0)")


@style.look()
def removal_against_usage(removal: Frame) -> Axes:
    """Draw what taking an atom out costs a task against how much the task uses it.

    Args:
        removal: What ``specialization.removal`` returns when it is given the table routing too.
    """
    if removal.empty:
        return _sentence(_NOT_REMOVED)
    ax = style.new_figure(3.4, 7.5).subplots()
    ax.axhline(0, color=style.FAINT, linewidth=1, zorder=0)
    colors = _colors(list(dict.fromkeys(removal["task"].sort_values().astype(str))))
    for task, color in colors.items():
        own = removal[removal["task"].astype(str) == task]
        spread = np.maximum([own["cost"] - own["low"], own["high"] - own["cost"]], 0)
        ax.errorbar(
            own["usage"],
            own["cost"],
            spread,
            fmt="o",
            color=color,
            elinewidth=0.8,
            markersize=5,
            label=style.short(task),
        )
    ax.set(xlabel="the atom's usage by the task", ylabel="score lost without it")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


# -- what they share --------------------------------------------------------------------------------------------------


def _sentence(text: str) -> Axes:
    """Return Axes that hold a sentence in the place of a figure."""
    ax = style.new_figure(0.7, 8.0).subplots()
    ax.text(0, 0.5, text, color=style.MUTED, va="center", transform=ax.transAxes)
    ax.set_axis_off()
    return ax


def _axes(shape: tuple[int, int]) -> Axes:
    """Return Axes for a heat map of so many rows and columns."""
    rows, columns = shape
    width = min(style.WIDTH_INCHES, 3.2 + max(0.45 * columns, 2.5))
    return style.new_figure(1.25 + 0.26 * max(rows, 3), width).subplots()


def _label(ax: Axes, frame: Frame, x_label: str, y_label: str) -> None:
    names = [str(name) for name in frame.columns]
    style.label_some(ax, "x", names, 40, 45 if max(map(len, names)) > 3 else 0)
    style.label_some(ax, "y", [style.short(str(name), 24) for name in frame.index], 40)
    ax.set(xlabel=x_label, ylabel=y_label)


def _finish(ax: Axes, cells: Any, title: str) -> Axes:
    """Give a heat map its title and its colour bar."""
    ax.set_title(title)
    style.colour_bar(cast(Figure, ax.figure), cells, [ax], "")
    return ax


def _name_apart(ax: Axes, atoms: Frame) -> None:
    """Write the atoms' names, the first ones' first, where they cover no other's."""
    span = max(float(atoms["usage"].max()), 1e-9) if len(atoms) else 1.0
    written: list[tuple[float, float]] = []
    for name, row in atoms.iterrows():
        here = (row["usage"] / span, row["entropy"])
        width = 0.03 + 0.013 * len(str(name))
        if all(abs(here[0] - x) > width or abs(here[1] - y) > 0.06 for x, y in written):
            written.append(here)
            ax.annotate(str(name), (row["usage"], row["entropy"]), (5, 3), textcoords="offset points", fontsize=8)


def _stage_map(frame: Frame, order: list[str], top: float | None, title: str, missing: str) -> Axes:
    """Draw a row a task and a column a stage; the frame marks the stage that trained the task."""
    if frame.empty:
        return _sentence(missing)
    values = frame.to_numpy()
    ax = _axes(values.shape)
    top = max(float(np.nanmax(values)), 1e-3) if top is None else top
    cells = style.heat(ax, values, style.amounts(), (0.0, top), values if values.shape[1] <= 12 else None)
    for row, name in enumerate(frame.index):
        trained = order.index(name) + 1
        if trained in frame.columns and not np.isnan(frame.loc[name, trained]):
            style.outline(ax, row, list(frame.columns).index(trained))
    _label(ax, frame, "after stage", "")
    return _finish(ax, cells, title)


def _task_order(table: Frame) -> list[str]:
    """Return all stages' tasks in the order of training."""
    return [str(name) for name in table["task"].cat.categories]


def _by_first_user(values: Array) -> list[int]:
    """Return the columns by the row that is largest in them, the largest first within a row."""
    alive = values.max(axis=0) > 1 / (10 * values.shape[1])
    rows = np.where(alive, values.argmax(axis=0), len(values))  # dead atoms come last
    return sorted(range(values.shape[1]), key=lambda column: (rows[column], -values[:, column].max()))


def _colors(names: list[str]) -> dict[str, Any]:
    """Return a colour a task; those beyond the ten that can be told apart are grey."""
    return {name: style.COLORS[place] if place < len(style.COLORS) else style.MUTED for place, name in enumerate(names)}

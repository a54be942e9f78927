"""Figures of a sweep: paired differences as a forest, final scores by task and method, mean score by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import style
from analysis.runs.frames import Frame

_FLOOR = -1.0
"""Scores below it (R2 has no lower end) are drawn at it, with their value written."""


def differences_forest(differences: Frame) -> Figure:
    """Draw each method's paired difference from the baseline with its interval, on the headline and on all tasks.

    Args:
        differences: Columns method, baseline, tasks ("headline" or "all"), difference, low, high, verdict.
    """
    methods = list(dict.fromkeys(differences["method"]))
    figure = style.new_figure(1.35 + 0.46 * len(methods), 6.8)
    ax = figure.subplots()
    ax.axvline(0, color=style.INK, linewidth=1, zorder=0)
    for row in differences.itertuples():
        headline = row.tasks == "headline"
        place = methods.index(row.method) + (-0.13 if headline else 0.17)
        color = {"above": style.ACCENT, "below": style.WARM}.get(row.verdict, style.MUTED)
        ax.plot((row.low, row.high), (place, place), color=color, linewidth=2.4 if headline else 1.2, zorder=2)
        face = color if headline else "white"
        ax.plot(
            row.difference, place, "o" if headline else "D", color=color, markerfacecolor=face, markersize=6, zorder=3
        )
        if headline or "headline" not in set(differences.loc[differences["method"] == row.method, "tasks"]):
            style.label_next_to(ax, place, style.signed(row.difference), color)
    ax.set_yticks(range(len(methods)), [style.short(method, 30) for method in methods])
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    ax.margins(x=0.08)
    ax.set_xlabel(f"mean final score minus that of {style.short(str(differences['baseline'].iloc[0]), 40)}")
    figure.legend(handles=_forest_key(differences), loc="outside upper center", ncols=5)
    return figure


def _forest_key(differences: Frame) -> list[Line2D]:
    """Return the legend of what the forest holds."""
    verdicts = [("above", style.ACCENT), ("not told apart", style.MUTED), ("below", style.WARM)]
    shown = set(differences["verdict"])
    keys = [Line2D([], [], color=color, linewidth=2.4, label=name) for name, color in verdicts if name in shown]
    marks = {"headline": ("o", style.INK, "headline tasks"), "all": ("D", "white", "all tasks")}
    for tasks, (marker, face, label) in marks.items():
        if tasks in set(differences["tasks"]):
            more: dict[str, Any] = {"markerfacecolor": face, "linestyle": "none", "label": label}
            keys.append(Line2D([], [], marker=marker, color=style.INK, **more))
    return keys


def scores_by_task(scores: Frame) -> Figure:
    """Draw the mean final score of every task under every method, the tasks out of the headline mean on the right.

    Args:
        scores: Columns method, task, value, headline (bool); a pair that was not measured is missing.
    """
    methods, tasks = list(dict.fromkeys(scores["method"])), list(dict.fromkeys(scores["task"]))
    inside = set(scores.loc[scores["headline"], "task"])
    tasks = [task for task in tasks if task in inside] + [task for task in tasks if task not in inside]
    matrix = np.full((len(methods), len(tasks)), np.nan)
    for row in scores.itertuples():
        matrix[methods.index(row.method), tasks.index(row.task)] = row.value
    crowded = len(tasks) > 7
    width = min(style.WIDTH_INCHES, max(5.6, 2.8 + 1.05 * len(tasks)))
    figure = style.new_figure((1.7 if crowded else 1.2) + 0.38 * len(methods), width)
    ax = figure.subplots()
    below = bool((matrix < 0).any())
    cmap, low = (style.gains_and_losses(), _FLOOR) if below else (style.amounts(), 0.0)
    cells = style.heat(ax, matrix, cmap, (low, 1.0), matrix)
    style.label_some(ax, "y", [style.short(method, 26) for method in methods], 60)
    columns = [style.short(task) if crowded else style.wrapped(task) for task in tasks]
    style.label_some(ax, "x", columns, 40, 40 if crowded else 0)
    if 0 < len(inside) < len(tasks):
        ax.axvline(len(inside), color=style.WARM, linewidth=2)
    style.colour_bar(figure, cells, [ax], "final score", "min" if (matrix < low).any() else "neither")
    return figure


def accuracy_by_stage(stages: Frame) -> Figure:
    """Draw the mean score on the tasks learnt so far by stage, a panel a method, the others in grey.

    Args:
        stages: Columns method, cell (a number), weight (the cell's in the mean), stage (1..T), value.
    """
    methods = list(dict.fromkeys(stages["method"]))
    figure, axes = style.panels(len(methods), 4, 2.05, sharex=True, sharey=True)
    means = {method: mean_by_stage(own) for method, own in stages.groupby("method")}
    last = int(stages["stage"].max())
    shown = stages["value"].clip(lower=_FLOOR)
    room = 0.06 * max(float(shown.max() - shown.min()), 0.1)
    for method, ax in zip(methods, axes, strict=True):
        for other in methods:
            if other != method:
                mean = means[other].clip(lower=_FLOOR)
                ax.plot(mean.index, mean, _line(mean.index), color=style.CONTEXT, linewidth=1, zorder=0)
        _draw_method(ax, stages[stages["method"] == method], means[method].clip(lower=_FLOOR))
        ax.set_title(style.short(method))
        ax.set_xlim(0.75, last + 0.1 + 0.18 * max(last - 1, 1))  # the last value stands right of its point
        ax.set_xticks(range(1, last + 1, style.step_of(last, 10)))
        ax.set_ylim(float(shown.min()) - room, float(shown.max()) + 2.2 * room)
    style.outer_labels(axes, 4, "after stage", "mean score so far")
    return figure


def mean_by_stage(own: Frame) -> Frame:
    """Return one method's weighted mean of ``value``, indexed by stage; columns weight, stage and value are needed."""
    weighted = (own["value"] * own["weight"]).groupby(own["stage"]).sum()
    return weighted / own.groupby("stage")["weight"].sum()


def _line(stages: Any) -> str:
    """Return how a line over these stages is drawn: dotted where some are missing in between."""
    return ":" if len(stages) > 1 and int(np.diff(stages).max()) > 1 else "-"


def _draw_method(ax: Axes, own: Frame, mean: Frame) -> None:
    """Draw a method's cells thinly, what lies between them as a band, and its mean with the last value written.

    Over stages that were not scored lines are dotted, and there is no band.
    """
    line: dict[str, Any] = {"color": style.ACCENT, "linestyle": _line(mean.index)}
    for _, cell in own.groupby("cell"):
        ax.plot(cell["stage"], cell["value"].clip(lower=_FLOOR), alpha=0.35, linewidth=0.8, zorder=1, **line)
    if line["linestyle"] == "-":
        spread = own.groupby("stage")["value"].agg(["min", "max"]).clip(lower=_FLOOR)
        band = (spread.index, spread["min"], spread["max"])
        ax.fill_between(*band, color=style.ACCENT, alpha=0.12, linewidth=0, zorder=1)
    ax.plot(mean.index, mean, marker="o", markersize=3.5, linewidth=1.8, zorder=3, **line)
    ax.annotate(
        style.number(float(mean.iloc[-1])),
        (float(mean.index[-1]), float(mean.iloc[-1])),
        (5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=style.ACCENT,
        zorder=4,
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
    )


def methods_compared(methods: Frame, baseline: str) -> Figure:
    """Draw the methods side by side: each one's score with its interval and, beside it, its paired difference.

    Args:
        methods: Columns method, bound (bool), value, low, high, difference, difference_low, difference_high, verdict;
            what is not known is NaN, and the baseline has no difference.
        baseline: The baseline's name; "" leaves the differences out.
    """
    paired = bool(baseline) and bool(methods["difference"].notna().any())
    figure = style.new_figure(0.95 + 0.34 * len(methods), style.WIDTH_INCHES if paired else 6.5)
    axes = figure.subplots(1, 1 + paired, sharey=True, squeeze=False)[0]
    for place, row in enumerate(methods.itertuples()):
        face = "white" if row.bound else style.ACCENT
        spot: dict[str, Any] = {"color": style.ACCENT, "markerfacecolor": face}
        _dot(axes[0], place, (row.value, row.low, row.high), style.signed(row.value).lstrip("+"), **spot)
        if paired and not np.isnan(row.difference):
            color = {"above": style.ACCENT, "below": style.WARM}.get(str(row.verdict), style.MUTED)
            spot = {"color": color, "markerfacecolor": "white" if row.bound else color}
            span = (row.difference, row.difference_low, row.difference_high)
            _dot(axes[1], place, span, style.signed(row.difference), **spot)
        elif paired and row.method == baseline:
            axes[1].annotate("baseline", (0, place), (6, 0), textcoords="offset points", va="center", fontsize=8.5)
    names = [style.short(method, 28) + (" (bound)" if bound else "") for method, bound in _named(methods)]
    axes[0].set_yticks(range(len(methods)), names)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    axes[0].set_xlabel("mean final score")
    if paired:
        axes[1].axvline(0, color=style.INK, linewidth=1, zorder=0)
        axes[1].set_xlabel(f"minus {style.short(baseline, 30)}, paired")
    for ax in axes:
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
        ax.margins(x=0.1)
        ax.locator_params(axis="x", nbins=6)
    return figure


def _named(methods: Frame) -> list[tuple[str, bool]]:
    return [(str(row.method), bool(row.bound)) for row in methods.itertuples()]


def _dot(ax: Axes, place: int, span: tuple[float, float, float], text: str, **spot: Any) -> None:
    """Draw a number with its interval, and write it at the right edge."""
    value, low, high = span
    if not np.isnan(low):
        ax.plot((low, high), (place, place), color=spot["color"], linewidth=2.2, zorder=2)
    ax.plot(value, place, "o", markersize=6, zorder=3, **spot)
    style.label_next_to(ax, place, text, spot["color"])


def words_by_method(words: Frame, methods: Sequence[str]) -> Figure:
    """Draw what each method loses under reworded prompts, with its interval: a panel a kind of words, a row a method.

    Each panel has a scale of its own, for a wrong instruction may cost twenty times what a paraphrase does.

    Args:
        words: Columns kind, method, difference, low, high (``sweep_wordings.wording_differences``, kinds named).
        methods: The methods in the order of the rows; one that is not in ``words`` is left out.
    """
    kinds, methods = list(dict.fromkeys(words["kind"])), [one for one in methods if one in set(words["method"])]
    columns = style.balanced(len(kinds), 4)
    figure, axes = style.panels(len(kinds), columns, 0.9 + 0.26 * len(methods), sharey=True)
    for kind, ax in zip(kinds, axes, strict=True):
        ax.axvline(0, color=style.INK, linewidth=1, zorder=0)
        ax.axvline(-0.02, color=style.MUTED, linewidth=1, linestyle="--", zorder=0)
        for row in words[words["kind"] == kind].itertuples():
            place = methods.index(str(row.method))
            color = style.WARM if row.high < 0 else style.ACCENT if row.low > 0 else style.MUTED
            _dot(ax, place, (row.difference, row.low, row.high), style.signed(row.difference), color=color)
        ax.set_title(style.wrapped(kind, 30), fontsize=9)
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
        ax.set_xlim(min(-0.06, ax.get_xlim()[0]), max(0.03, ax.get_xlim()[1]))
        ax.locator_params(axis="x", nbins=3)
    axes[0].set_yticks(range(len(methods)), [style.short(method, 22) for method in methods])
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    style.outer_labels(axes, columns, "minus trained words", "")
    return figure

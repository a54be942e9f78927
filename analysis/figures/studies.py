"""Figures of the paper's studies: each takes a tidy frame (``analysis.summaries.studies``) and returns its axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from analysis.figures import style
from analysis.figures.training import BANK, place_of
from analysis.measures.pareto import SIZES, on_front
from analysis.runs.frames import Frame

_MOST_LINES = 6
"""As many lines with bands are told apart in one panel."""

RATIO_NAMES = {
    "weights": "convex hull: sum of |weights| / 1",
    "operator": "routed operator's norm / largest atom's",
    "update": "update's norm / its bound",
    "summary": "summary's norm / largest earlier state's",
}


def stability(deviations: Frame, variances: Frame, baseline: str | None) -> list[Axes]:
    """Draw each method's spread over seeds and its loss's variance, a faint dot a task, the (geometric) mean bold.

    Args:
        deviations: Columns method, deviation (``studies.spread``).
        variances: Columns method, task, order, seed, variance (``studies.loss_variance``).
        baseline: The method that is drawn first, if any.
    """
    methods = list(dict.fromkeys([*([baseline] if baseline else []), *deviations["method"], *variances["method"]]))
    methods = [method for method in methods if method in set(deviations["method"]) | set(variances["method"])]
    panels = [("variance of the loss, last fifth of the steps", variances, "variance")]
    if (deviations["deviation"] > 0).any():
        panels.insert(0, ("spread over seeds (standard deviation)", deviations, "deviation"))
    figure = style.new_figure(1.2 + 0.36 * len(methods))
    axes = list(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)))
    generator = np.random.default_rng(0)
    for ax, (label, frame, column) in zip(axes, panels, strict=True):
        for place, method in enumerate(methods):
            values = frame.loc[(frame["method"] == method) & (frame[column] > 0), column].to_numpy()
            if not len(values):
                continue
            ax.plot(
                values,
                place + generator.uniform(-0.22, 0.22, len(values)),
                ".",
                color=style.ACCENT,
                alpha=max(0.12, min(0.5, 12 / len(values))),
            )
            mean = float(np.exp(np.log(values).mean()))
            ax.plot(mean, place, "D", color=style.WARM, markersize=6, zorder=3)
            ax.annotate(f"{mean:.2g}", (mean, place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        if high > 10 * low:  # a decade has ticks enough
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(label)
        ax.grid(axis="x")
    axes[0].set_yticks(range(len(methods)), [style.short(method, 26) for method in methods])
    axes[0].set_ylim(len(methods) - 0.4, -0.75)
    return axes


def concentration_by_epoch(concentration: Frame) -> list[Axes]:
    """Draw the gradient concentration by epoch, a line a method and a band over its cells (the paper's Fig. 4).

    More methods than are told apart by colour have a panel each, with the others' lines in grey.

    Args:
        concentration: Columns method, order, seed, epoch, value (``studies.concentration_by_epoch``).
    """
    own = {
        str(method): rows.groupby("epoch")["value"].agg(["mean", "min", "max"])
        for method, rows in concentration.groupby("method", sort=False)
    }
    if len(own) > _MOST_LINES:
        _, axes = style.panels(len(own), 4, 1.9, sharex=True, sharey=True)
        for (method, frame), ax in zip(own.items(), axes, strict=True):
            for other in own.keys() - {method}:
                ax.plot(own[other].index, own[other]["mean"], color=style.CONTEXT, linewidth=1, zorder=0)
            _line_and_band(ax, frame, style.ACCENT)
            ax.set_title(style.short(method))
        style.outer_labels(axes, 4, "epoch", "largest / mean norm")
        return axes
    ax = style.new_figure(3.2, 7.5).subplots()
    for method, color in _colors(list(own)).items():
        _line_and_band(ax, own[method], color, method)
    ax.set(xlabel="epoch", ylabel="largest / mean norm")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return [ax]


def _line_and_band(ax: Axes, frame: Frame, color: Any, label: str | None = None) -> None:
    ax.fill_between(frame.index, frame["min"], frame["max"], color=color, alpha=0.12, linewidth=0)
    ax.plot(frame.index, frame["mean"], color=color, marker="o", markersize=3.5, linewidth=1.7, label=label)
    ax.locator_params(axis="x", integer=True)


def norms_by_layer(norms: Frame) -> list[Axes]:
    """Draw the mean gradient norm by depth, a panel a kind of layer and a line a method (the paper's Fig. 3).

    More methods than are told apart by colour have a panel each where layers are of one kind, the others' lines grey.

    Args:
        norms: Columns method, layer, value (``studies.norms_by_layer``).
    """
    places = norms["layer"].map(place_of)
    norms = norms.assign(kind=[kind for kind, _ in places], depth=[depth for _, depth in places])
    counts = norms.groupby("kind")["depth"].nunique()
    deep = [kind for kind in dict.fromkeys(norms["kind"]) if kind != BANK and counts[kind] > 1]
    alone = [kind for kind in dict.fromkeys(norms["kind"]) if kind not in deep]
    if norms["method"].nunique() > _MOST_LINES and len(deep) == 1:
        return _norms_by_method(norms, deep[0], alone)
    figure, axes = style.panels(len(deep) + len(alone), 4, 2.8)
    colors = _colors(norms["method"])
    for kind, ax in zip([*deep, *alone], axes, strict=True):
        own = norms[norms["kind"] == kind]
        ax.set_title(style.short(kind.rsplit(".", 1)[-1], 22))
        if kind in deep:
            for method, rows in own.sort_values("depth").groupby("method", sort=False):
                ax.plot(rows["depth"], rows["value"], color=colors[method], marker=".", linewidth=1.5, label=method)
            ax.set_xlabel("layer depth")
            ax.locator_params(axis="x", integer=True, nbins=8)
        else:
            bars = [method for method in colors if method in set(own["method"])]
            values = own.groupby("method")["value"].mean()
            ax.bar(range(len(bars)), [values[method] for method in bars], color=[colors[method] for method in bars])
            ax.set_xticks([])
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("gradient norm")
    handles = [style.key_line(color, method) for method, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=6)
    return axes


def _norms_by_method(norms: Frame, deep: str, alone: Sequence[str]) -> list[Axes]:
    """Draw a panel a method, and one a layer that is alone of its kind."""
    layers = norms[norms["kind"] == deep]
    own = {str(method): rows.sort_values("depth") for method, rows in layers.groupby("method", sort=False)}
    _, axes = style.panels(len(own) + len(alone), 4, 1.9)
    for (method, rows), ax in zip(own.items(), axes, strict=False):
        for other in own.keys() - {method}:
            ax.plot(own[other]["depth"], own[other]["value"], color=style.CONTEXT, linewidth=1, zorder=0)
        ax.plot(rows["depth"], rows["value"], color=style.ACCENT, marker=".", markersize=4, linewidth=1.5)
        ax.set(title=style.short(method), ylim=(0, 1.08 * layers["value"].max()))
        ax.locator_params(axis="x", integer=True, nbins=8)
    style.outer_labels(axes, 4, "layer depth", "gradient norm")
    for kind, ax in zip(alone, axes[len(own) :], strict=True):
        values = norms[norms["kind"] == kind].groupby("method", sort=False)["value"].mean()[::-1]
        ax.barh([style.short(str(method)) for method in values.index], values, color=style.ACCENT, height=0.7)
        ax.set(title=style.short(kind, 22), xlabel="gradient norm", ylabel="")
        ax.tick_params(axis="y", labelsize=6.5)
    return axes


def pareto(sizes: Frame) -> list[Axes]:
    """Draw score against latency and against parameters, the front as a line, dominated points dimmed (Fig. 5).

    Args:
        sizes: Columns r, num_atoms, top_k, trainable_parameters, milliseconds_a_row, score (``studies.sizes``).
    """
    costs = [("milliseconds_a_row", "milliseconds a row"), ("trainable_parameters", "trainable parameters")]
    costs = [(column, label) for column, label in costs if sizes[column].notna().any()]
    figure, axes = style.panels(len(costs), 2, 3.6, sharey=True)
    for ax, (column, label) in zip(axes, costs, strict=True):
        front = on_front(sizes[column], sizes["score"])
        ax.plot(sizes.loc[~front, column], sizes.loc[~front, "score"], "o", color=style.FAINT, markersize=5)
        best = sizes[front].sort_values(column)
        ax.plot(best[column], best["score"], color=style.ACCENT, linewidth=1.4, drawstyle="steps-post", zorder=2)
        ax.plot(best[column], best["score"], "o", color=style.ACCENT, markersize=7, zorder=3)
        for place, row in enumerate(best.itertuples()):
            text, below = f"{row.r} · {row.num_atoms} · {row.top_k}", place % 2 == 0  # by turns, or neighbours collide
            ax.annotate(
                text,
                (getattr(row, column), row.score),
                (4, -11) if below else (-4, 5),
                textcoords="offset points",
                ha="left" if below else "right",
                fontsize=8,
                zorder=4,
            )
        ax.set_xlabel(label)
        ax.margins(x=0.12, y=0.12)
        ax.grid(alpha=0.6)
        if column == "trainable_parameters" and sizes[column].max() > 10 * sizes[column].min():
            ax.set_xscale("log")
    axes[0].set_ylabel("mean final score")
    axes[0].set_title(" · ".join(name.replace("num_", "").replace("_", "-") for name in SIZES))
    return axes


def contributions(earned: Frame) -> Axes:
    """Draw what each part of the adapter earns: the whole minus the adapter without it, with its interval.

    Args:
        earned: Columns method, without (what is taken away), difference, low, high, verdict ("above": the part earns).
    """
    earned = earned.sort_values("difference", ascending=False)
    ax = style.new_figure(1.1 + 0.44 * len(earned), 7.6).subplots()
    ax.axvline(0, color=style.INK, linewidth=1, zorder=0)
    for place, row in enumerate(earned.itertuples()):
        color = {"above": style.ACCENT, "below": style.WARM}.get(row.verdict, style.MUTED)
        ax.plot((row.low, row.high), (place, place), color=color, linewidth=2.4)
        ax.plot(row.difference, place, "o", color=color, markersize=6)
        style.label_next_to(ax, place, style.signed(row.difference), color)
    ax.set_yticks(range(len(earned)), [style.short(without, 44) for without in earned["without"]])
    ax.set_ylim(len(earned) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    ax.set_xlabel("mean final score: the whole adapter minus the one so changed")
    return ax


def learning_curves(curves: Frame) -> list[Axes]:
    """Draw scores by training rows, a panel a task, a line a method with the range of its cells.

    Args:
        curves: Columns method, order, seed, task, rows, value (``studies.learning_curves``).
    """
    tasks = list(dict.fromkeys(curves["task"]))
    figure, axes = style.panels(len(tasks), 3, 2.9, sharey=True)
    colors = _colors(curves["method"])
    for task, ax in zip(tasks, axes, strict=True):
        for method, color in colors.items():
            chosen = curves[(curves["task"] == task) & (curves["method"] == method)]
            own = chosen.groupby("rows")["value"].agg(["mean", "min", "max"])
            ax.fill_between(own.index, own["min"], own["max"], color=color, alpha=0.12, linewidth=0)
            ax.plot(own.index, own["mean"], color=color, marker="o", markersize=4, linewidth=1.7)
        ax.set_xscale("log")
        sizes = sorted(curves["rows"].unique())
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.minorticks_off()
        ax.set_title(style.short(task, 26))
    style.outer_labels(axes, 3, "training rows", "score")
    figure.legend(
        handles=[style.key_line(color, method) for method, color in colors.items()], loc="outside upper center", ncols=6
    )
    return axes


def bounds(ratios: Frame) -> list[Axes]:
    """Draw the largest observed / bound of each of the theory's bounds by step; none may pass 1.

    Args:
        ratios: Columns metric, step, value and perhaps method (``studies.largest_ratios``).
    """
    metrics = [metric for metric in RATIO_NAMES if metric in set(ratios["metric"])]
    _, axes = style.panels(len(metrics), 2, 2.1, sharex=True)
    for metric, ax in zip(metrics, axes, strict=True):
        own = ratios[ratios["metric"] == metric].sort_values("step")
        ax.axhline(1, color=style.WARM, linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
        ax.plot(own["step"], own["value"], color=style.ACCENT, linewidth=1.5, marker=".", markersize=4)
        ax.set_title(RATIO_NAMES[metric])
        ax.locator_params(axis="x", integer=True)
        ax.set_ylim(0, max(1.12, 1.05 * float(own["value"].max())))
        ax.annotate(
            f"largest {own['value'].max():.3f}",
            (0.99, 0.08),
            xycoords="axes fraction",
            ha="right",
            fontsize=8.5,
            color=style.ACCENT,
        )
    style.outer_labels(axes, 2, "step of a stage", "observed / bound")
    return axes


def _colors(methods: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Return a colour for each method, apart however many there are."""
    names = list(dict.fromkeys(methods))
    own = style.COLORS if len(names) <= len(style.COLORS) else sns.husl_palette(len(names), s=0.75, l=0.55)
    return dict(zip(names, own, strict=False))

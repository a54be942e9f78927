"""Figures of training: loss, gradient norms by layer (paper, Fig. 3), their concentration (Fig. 4), general ability."""

from __future__ import annotations

import re

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from analysis.figures import style
from analysis.runs.frames import Frame

BANK = "bank"


def timeline(rows: Frame) -> Frame:
    """Return ``rows`` with a column ``when``: the step counted from the first stage's first step.

    Steps that start anew at each stage are put one stage after the other; steps already counted through are kept.
    """
    rows = rows.sort_values(["stage", "step"], kind="stable").copy()
    rows["when"] = rows["step"]
    end = -1
    for stage, steps in rows.groupby("stage")["step"]:
        start = 0 if steps.min() > end else end + 1 - int(steps.min())
        rows.loc[rows["stage"] == stage, "when"] = steps + start
        end = int(steps.max()) + start
    return rows


def _by_stage(ax: Axes, rows: Frame) -> None:
    """Shade every second stage and name the stages above the axes."""
    spans = rows.groupby("stage")["when"].agg(["min", "max"])
    names = rows.drop_duplicates("stage").set_index("stage")["task"].astype(str)
    many = len(spans) > 6
    for index, (stage, span) in enumerate(spans.iterrows()):
        if index % 2 == 0:
            ax.axvspan(span["min"] - 0.5, span["max"] + 0.5, color=style.GRID, alpha=0.55, linewidth=0, zorder=0)
        text = str(stage) if many else style.short(names[stage], max(8, 100 // len(spans)))
        middle = (span["min"] + span["max"]) / 2
        ax.annotate(
            text,
            (middle, 1.015),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=style.MUTED,
        )
    ax.set_xlim(rows["when"].min() - 0.5, rows["when"].max() + 0.5)
    ax.set_xlabel("training step, all stages" + ("; stages numbered above" if many else ""))


def _faint_and_smooth(ax: Axes, rows: Frame, label: str) -> None:
    """Draw every step faintly and a running median over a twentieth of a stage's steps."""
    for index, (_, own) in enumerate(rows.groupby("stage")):
        window = max(1, len(own) // 20) | 1
        smooth = own["value"].rolling(window, center=True, min_periods=1).median()
        ax.plot(own["when"], own["value"], color=style.ACCENT, alpha=0.25, linewidth=0.8)
        ax.plot(own["when"], smooth, color=style.ACCENT, linewidth=1.6, label=label if index == 0 else None)


def training_loss(gradients: Frame) -> Figure:
    """Draw the training loss over all stages' steps.

    Args:
        gradients: The gradients table; rows of metric "train_loss" are drawn.
    """
    rows = timeline(gradients[gradients["metric"] == "train_loss"])
    figure = style.new_figure(3.0)
    ax = figure.subplots()
    _by_stage(ax, rows)
    _faint_and_smooth(ax, rows, "running median")
    low, high = rows["value"].min(), rows["value"].max()
    if low > 0 and high / low > 50:
        ax.set_yscale("log")
    ax.set_ylabel("training loss")
    ax.legend(loc="upper right")
    return figure


def gradient_concentration(gradients: Frame) -> Figure:
    """Draw how unevenly the gradient lies over layers: the largest norm / the mean norm, a step and an epoch (Fig. 4).

    Args:
        gradients: The gradients table; rows of metric "grad_concentration" are drawn.
    """
    rows = timeline(gradients[gradients["metric"] == "grad_concentration"])
    figure = style.new_figure(3.0)
    ax = figure.subplots()
    _by_stage(ax, rows)
    ax.plot(rows["when"], rows["value"], ".", color=style.ACCENT, alpha=0.25, markersize=3.5, label="a step")
    epochs = rows.groupby(["stage", "epoch"]).agg(start=("when", "min"), end=("when", "max"), value=("value", "mean"))
    for index, row in enumerate(epochs.itertuples()):
        span = (row.start - 0.5, row.end + 0.5)
        ax.plot(
            span, (row.value,) * 2, color=style.WARM, linewidth=2.2, label="mean of an epoch" if index == 0 else None
        )
    ax.set_ylim(bottom=min(1.0, float(rows["value"].min())))
    ax.set_ylabel("largest / mean norm")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def place_of(layer: str) -> tuple[str, int]:
    """Split a module's name into its kind (its name without numbers) and its depth (the first number in it)."""
    found = re.search(r"\d+", layer)
    kind = ".".join(part for part in layer.split(".") if not part.isdigit())
    return kind, int(found.group()) if found else 0


def gradient_norms(gradients: Frame) -> Figure:
    """Draw the mean gradient norm by depth, a panel a kind of layer and a line a stage; the bank by stage (Fig. 3).

    Args:
        gradients: The gradients table; rows of metric "grad_norm" are drawn.
    """
    rows = gradients[gradients["metric"] == "grad_norm"]
    means = rows.groupby(["stage", "layer"], as_index=False)["value"].mean()
    places = {layer: place_of(layer) for layer in means["layer"].unique()}
    means["kind"] = means["layer"].map(lambda layer: places[layer][0])
    means["depth"] = means["layer"].map(lambda layer: places[layer][1])
    kinds = sorted(set(means["kind"]) - {BANK}) + [BANK] * (BANK in set(means["kind"]))
    stages = sorted(means["stage"].unique())
    figure, axes = style.panels(len(kinds), 4, 2.3)
    colors = sns.color_palette("mako_r", len(stages) + 2)[1:-1]
    for kind, ax in zip(kinds, axes, strict=True):
        _draw_kind(ax, means[means["kind"] == kind], kind, dict(zip(stages, colors, strict=True)))
    _same_scale(axes[: len(axes) - (kinds[-1] == BANK)], means[means["kind"] != BANK]["value"])
    style.outer_labels(axes, 4, axes[0].get_xlabel(), "gradient norm")
    axes[-1].set_xlabel("stage" if kinds[-1] == BANK else axes[-1].get_xlabel())
    handles, labels = axes[0].get_legend_handles_labels()
    chosen = slice(None, None, style.step_of(len(labels), 8))
    figure.legend(handles[chosen], labels[chosen], loc="outside upper right", ncols=8)
    return figure


def _draw_kind(ax: Axes, means: Frame, kind: str, colors: dict[int, tuple[float, float, float]]) -> None:
    ax.set_title(style.short(kind.rsplit(".", 1)[-1], 22))
    if kind == BANK:
        ax.bar(means["stage"], means["value"], color=[colors[stage] for stage in means["stage"]], width=0.7)
        ax.set_xticks(sorted(colors)[:: style.step_of(len(colors), 10)])
        return
    for stage, own in means.groupby("stage"):
        own = own.sort_values("depth")
        ax.plot(
            own["depth"],
            own["value"],
            color=colors[stage],
            marker=".",
            markersize=4,
            linewidth=1.2,
            label=f"stage {stage}",
        )
    ax.set_xlabel("layer depth")
    if means["depth"].nunique() == 1:  # a head, say: matplotlib would make up a scale around its one place
        ax.set_xticks(means["depth"].unique())
    else:
        ax.locator_params(axis="x", integer=True, nbins=8)


def _same_scale(axes: list[Axes], values: pd.Series) -> None:
    """Give the layers' panels one y axis, a logarithmic one where the norms span more than a decade."""
    low, high = float(values.min()), float(values.max())
    logarithmic = low > 0 and high / low > 10
    for ax in axes:
        ax.set_yscale("log" if logarithmic else "linear")
        ax.set_ylim((low / 1.3, high * 1.3) if logarithmic else (0, high * 1.08 or 1.0))


def general_ability(found: Frame) -> Figure:
    """Draw the relative change of general ability by stage.

    Args:
        found: Columns stage and change (``general.general_ability``).
    """
    figure = style.new_figure(2.4, 6.5)
    ax = figure.subplots()
    for level, dashes in ((0.0, "-"), (-0.01, (0, (4, 3)))):
        ax.axhline(level, color=style.FAINT if level == 0 else style.MUTED, linewidth=1, linestyle=dashes, zorder=0)
    ax.plot(found["stage"], found["change"], color=style.ACCENT, marker="o", markersize=4, linewidth=1.8)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    style.stage_axis(ax, int(found["stage"].max()))
    ax.set_xlabel("after stage")
    ax.set_ylabel("change against untrained")
    return figure

"""A sweep's report on training: stability by method, gradients by method, and the theory's bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from analysis.figures import studies as plots
from analysis.figures.style import figure_of, number
from analysis.report.content import ReportTable, TableCell, cell, make_table
from analysis.report.page import ReportFigure
from analysis.report.study_parts import Studies
from analysis.report.sweep_content import spanned
from analysis.runs.frames import Frame
from analysis.summaries import studies
from analysis.summaries.sweeps import Sweep


def add_stability(sweep: Sweep, cells: Mapping[str, Frame], found: Studies) -> None:
    """Add the score's spread over cells and the loss's variance at the end, by method."""
    variances = studies.loss_variance(cells["gradients"])
    if not len(variances):
        return
    metrics = {task: "rmse" if metric == "r2" else metric for task, metric in _metrics(sweep).items()}
    label = "test RMSE" if set(metrics.values()) == {"rmse"} else "test score"
    finals = studies.final_scores(cells["scores"], metrics)
    best = studies.final_scores(cells["scores"], {task: metric + studies.BEST for task, metric in metrics.items()})
    deviations = studies.spread(finals)
    found.report_figures.append(
        ReportFigure(
            "spread_and_stability",
            "stability",
            "Spread and stability by method",
            f"Left: standard deviation over cells of each task's {label} (a dot a task). Right: variance of the "
            "training loss over the last fifth of each stage's steps (a dot a stage and cell). Diamonds: geometric "
            "means; lower is steadier.",
            "Dot plots of the spread over seeds and of the loss's variance, a row a method.",
            lambda: figure_of(plots.stability(deviations, variances, sweep.baseline)),
        )
    )
    found.tables["spread_and_stability"] = [_stability_table(sweep, finals, best, variances, label)]


def _stability_table(sweep: Sweep, finals: Frame, best: Frame, variances: Frame, label: str) -> ReportTable:
    baseline = sweep.baseline or ""
    deviations = studies.spread(finals)
    logs = studies.by_cell(variances.assign(value=np.log(variances["variance"].clip(lower=1e-30))))
    numbers = {"final": studies.by_cell(finals), "log": logs, "best": studies.by_cell(best)}
    paired = {name: studies.paired_by_cell(frame, baseline).set_index("method") for name, frame in numbers.items()}
    rows = []
    for method in sweep.measured:
        mean = {name: float(frame.loc[frame["method"] == method, "value"].mean()) for name, frame in numbers.items()}
        variance = float(np.exp(mean["log"]))
        spread = float(deviations.loc[deviations["method"] == method, "deviation"].mean())
        line = [TableCell(method), cell(mean["final"], 3), _paired(paired["final"], method), cell(spread, 3)]
        line += [TableCell(f"{variance:.2e}", variance), _paired(paired["log"], method, ratio=True)]
        if len(best):
            line += [cell(mean["best"], 3), _paired(paired["best"], method)]
        seconds = [one.seconds for one in sweep.cells_of(method) if one.seconds is not None]
        rows.append([*line, cell(float(np.mean(seconds)) if seconds else None, 1)])
    minus = f"minus {sweep.baseline or 'the baseline'}"
    names = ["method", label, minus, "spread over cells", "loss variance", "ratio to the baseline's"]
    names += ["best training checkpoint", f"its {minus}"] * bool(len(best))
    note = f"{label[0].upper()}{label[1:]}: mean over tasks of the last value"
    note += ", lower is better. " if label == "test RMSE" else ", higher is better. "
    note += "Spread: mean over tasks of the standard deviation over cells. Loss variance: over the last fifth of a "
    note += "stage's steps, geometric mean. Differences and ratios are paired by order and seed; 95 % intervals redraw "
    note += "cells, not test rows."
    if len(best):
        note += " Best training checkpoint: the same score under the epoch of best training accuracy."
    return make_table("stability", "Score, spread and stability", [*names, "seconds"], rows, note)


def add_gradients(gradients: Frame, found: Studies) -> None:
    """Add the gradient norms by layer and the concentration by epoch, a line a method."""
    norms, concentration = studies.norms_by_layer(gradients), studies.concentration_by_epoch(gradients)
    if len(norms) and norms["method"].nunique() > 1:
        found.report_figures.append(
            ReportFigure(
                "gradient_norms_by_method",
                "gradients",
                "Gradient norms by layer and method (Fig. 3)",
                "L2 norm of the gradient of each layer's own adapter weights, mean over recorded steps, stages and "
                "cells. A bank that all layers share has a panel of its own, and so has a layer that is alone of its "
                "kind; many methods have a panel each, the others grey.",
                "Line charts of gradient norm by layer depth, a line a method.",
                lambda: figure_of(plots.norms_by_layer(norms)),
            )
        )
    if len(concentration) and concentration["method"].nunique() > 1:
        means = concentration.groupby("method", sort=False)["value"].mean()
        found.report_figures.append(
            ReportFigure(
                "concentration_by_epoch",
                "gradients",
                "Gradient concentration by epoch (Fig. 4)",
                "Largest norm over layers / mean norm, mean over an epoch's steps and over stages; 1 = spread evenly. "
                "Bands: from the lowest to the highest cell; many methods have a panel each, the others' means grey.",
                "Line chart of gradient concentration by epoch, a line a method. Means: "
                + ", ".join(f"{method} {number(value)}" for method, value in means.items())
                + ".",
                lambda: figure_of(plots.concentration_by_epoch(concentration)),
            )
        )


def add_bounds(theory: Frame, found: Studies) -> None:
    """Add the largest observed / bound along the runs."""
    if not len(theory):
        return
    ratios = studies.largest_ratios(theory)
    largest = ratios.groupby("metric")["value"].max()
    found.report_figures.append(bounds_figure(ratios, "bounds"))
    rows = [[TableCell(plots.RATIO_NAMES[metric]), cell(float(largest[metric]), 3)] for metric in largest.index]
    found.tables["theory_bounds"] = [make_table("bounds", "Largest observed / bound", ["bound", "largest ratio"], rows)]


def bounds_figure(ratios: Frame, section: str) -> ReportFigure:
    """Return the figure of the theory's bounds."""
    largest = ratios.groupby("metric")["value"].max()
    told = ", ".join(f"{metric} {value:.3f}" for metric, value in largest.items())
    return ReportFigure(
        "theory_bounds",
        section,
        "The theory's bounds along training",
        "The largest observed / bound over a batch's tokens and all blocks (and runs), by step; the dashed line is the "
        "bound. Convex hull: sum of the routing weights' magnitudes. Operator: Theorem D.8. Update: Corollary D.8.1. "
        "Summary: a convex mix of earlier states. A ratio of 1 is reached where one atom, or the only earlier state, "
        "has all the weight.",
        f"Line charts of observed / bound by step. Largest: {told}.",
        lambda: figure_of(plots.bounds(ratios)),
    )


def _metrics(sweep: Sweep) -> dict[str, str]:
    """Return each task's headline metric."""
    facts = {name: task for one in sweep.cells for name, task in (one.manifest.get("tasks") or {}).items()}
    return {name: str(task.get("metric")) for name, task in facts.items()}


def _paired(frame: Frame, method: str, ratio: bool = False) -> TableCell:
    if method not in frame.index:
        return cell(None)
    row = frame.loc[method]
    values = [float(row[name]) for name in ("difference", "low", "high")]
    return spanned(*(map(math.exp, values) if ratio else values))

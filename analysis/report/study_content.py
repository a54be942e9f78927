"""The paper's studies in a sweep's report: ablations, reuse, Pareto fronts and accounting, where their data are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from analysis.figures import studies as plots
from analysis.figures.style import figure_of, number
from analysis.measures.pareto import SIZES, on_front
from analysis.report.content import TableCell, cell, make_table
from analysis.report.page import ReportFigure
from analysis.report.study_extras import add_routes, add_words
from analysis.report.study_parts import Studies
from analysis.report.study_training import add_bounds, add_gradients, add_stability
from analysis.report.sweep_content import spanned
from analysis.runs.frames import Frame
from analysis.summaries import studies
from analysis.summaries.differences import ALL, paired_differences
from analysis.summaries.sweeps import ABOVE, BELOW, EVEN, Sweep

_FLIPPED = {ABOVE: BELOW, BELOW: ABOVE, EVEN: EVEN}


def study_parts(sweep: Sweep) -> Studies:
    """Return the studies' figures and tables of a sweep, those that its cells have data for."""
    cells, problems = studies.load_cells(sweep, ("scores", "gradients", "theory", "wordings", "wording_answers"))
    found = Studies(problems)
    add_words(sweep, cells, found)
    add_routes(sweep, cells["scores"], found)
    _ablations(sweep, found)
    _reuse(sweep, found)
    add_stability(sweep, cells, found)
    add_gradients(cells["gradients"], found)
    _pareto(sweep, found)
    add_bounds(cells["theory"], found)
    _accounting(sweep, found)
    return found


def earned(sweep: Sweep) -> Frame:
    """Return what each part of the adapter earns: the whole minus the adapter without it, over all tasks.

    Returns:
        Columns method, without, cells, difference, low, high, verdict ("above": the part earns), rough; empty where no
        method is an ablation of another.
    """
    methods = studies.own_settings(sweep)
    whole = studies.whole_adapter(methods)
    frame = paired_differences(sweep, whole or "")
    frame = frame[(frame["measure"] == "average_accuracy") & (frame["tasks"] == ALL)]
    changed = {method: studies.ablated(methods, whole, method) if whole else {} for method in methods}
    frame = frame[np.array([bool(changed[method]) for method in frame["method"]], dtype=bool)].copy()
    frame["without"] = [_in_words(changed[method]) for method in frame["method"]]
    frame["difference"], frame["low"], frame["high"] = -frame["difference"], -frame["high"], -frame["low"]
    frame["verdict"] = frame["verdict"].map(_FLIPPED)
    columns = ["method", "without", "cells", "difference", "low", "high", "verdict", "rough"]
    return frame[columns].reset_index(drop=True)


def _in_words(changed: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={str(value).lower()}" for name, value in changed.items())


def _ablations(sweep: Sweep, found: Studies) -> None:
    frame = earned(sweep)
    if not len(frame):
        return
    methods = studies.own_settings(sweep)
    whole = str(studies.whole_adapter(methods))
    told = "; ".join(f"{row.without} {number(row.difference)} ({row.verdict})" for row in frame.itertuples())
    found.report_figures.append(
        ReportFigure(
            "contributions",
            "ablations",
            "What each part earns",
            f"Mean final score over all tasks of {whole} minus that of the adapter with the setting on the left, with "
            "its 95 % interval: paired by order, seed and test row. Blue: the part earns; red: it costs; grey: not "
            "told apart.",
            f"Forest plot of what each part of the adapter earns. {told}.",
            lambda: figure_of(plots.contributions(frame)),
        )
    )
    rows = []
    words = {ABOVE: "earns", BELOW: "costs", EVEN: EVEN}
    for row in frame.sort_values("difference", ascending=False).to_dict("records"):
        changed = studies.ablated(methods, whole, row["method"])
        parts = ", ".join(studies.ABLATIONS[name] for name in changed)
        line = [TableCell(row["method"]), TableCell(parts), TableCell(row["without"]), cell(row["cells"])]
        rows.append([*line, spanned(row["difference"], row["low"], row["high"]), TableCell(words[row["verdict"]])])
    columns = ["method", "part", "setting", "cells", f"{whole} minus it", "the part"]
    found.tables["contributions"] = [make_table("contributions", "What each part earns, in numbers", columns, rows)]


def _reuse(sweep: Sweep, found: Studies) -> None:
    curves = studies.learning_curves(sweep)
    if not len(curves):
        return
    rows = []
    for (task, size), own in curves.groupby(["task", "rows"], sort=False):
        differences = studies.paired_by_cell(own, sweep.baseline or "").set_index("method")
        for method, values in own.groupby("method", sort=False)["value"]:
            line = [
                TableCell(str(task)),
                cell(int(cast(Any, size))),
                TableCell(str(method)),
                cell(float(values.mean()), 3),
            ]
            apart = [TableCell("baseline" if method == sweep.baseline else "–"), TableCell("–")]
            if method in differences.index:
                one = differences.loc[method]
                apart = [spanned(one["difference"], one["low"], one["high"]), TableCell(one["verdict"])]
            rows.append([*line, *apart])
    found.report_figures.append(
        ReportFigure(
            "learning_curves",
            "reuse",
            "Score by the number of training rows",
            "Score after the task's own stage. Lines: means over cells; bands: from the lowest to the highest cell.",
            f"Line charts of score by training rows for {', '.join(curves['task'].unique())}.",
            lambda: figure_of(plots.learning_curves(curves)),
        )
    )
    columns = ["task", "rows", "method", "score", f"minus {sweep.baseline or 'the baseline'}", "verdict"]
    note = "Differences are paired by order and seed; intervals redraw cells, not test rows."
    found.tables["learning_curves"] = [make_table("learning_curves", "Scores by rows", columns, rows, note)]


def _pareto(sweep: Sweep, found: Studies) -> None:
    frame = studies.sizes(sweep)
    if not len(frame):
        return
    fronts = {name: on_front(frame[name], frame["score"]) for name in ("milliseconds_a_row", "trainable_parameters")}
    rows = []
    for place, row in enumerate(frame.to_dict("records")):
        line = [TableCell(row["method"]), *(cell(int(row[name])) for name in SIZES), cell(row["score"], 3)]
        line += [cell(row["milliseconds_a_row"], 3), cell(int(row["trainable_parameters"]))]
        rows.append([*line, *(TableCell("yes" if front[place] else "no") for front in fronts.values())])
    best = frame.loc[fronts["milliseconds_a_row"] | fronts["trainable_parameters"], "method"]
    found.report_figures.append(
        ReportFigure(
            "pareto_fronts",
            "pareto",
            "Score against latency and parameters (Fig. 5)",
            "Blue: settings that no other one beats in both; grey: beaten ones. Written: rank · atoms · top-k. Latency "
            "is the median over scoring batches of the last stage, and depends on the machine and what else it did.",
            f"Scatter plots of mean final score against latency and parameters. On a front: {', '.join(best)}.",
            lambda: figure_of(plots.pareto(frame)),
        )
    )
    columns = ["method", "rank", "atoms", "top-k", "score", "milliseconds a row", "trainable parameters"]
    columns += ["front: latency", "front: parameters"]
    found.tables["pareto_fronts"] = [make_table("pareto", "Every setting", columns, rows)]


def _accounting(sweep: Sweep, found: Studies) -> None:
    """Parameters and FLOPs a token by component, of the methods whose manifests hold them."""
    rows = []
    for method in sweep.measured:
        table = (sweep.cells_of(method)[0].manifest.get("model") or {}).get("accounting")
        for part, entry in (table or {}).items():
            named = "plain LoRA of its rank" if part == "lora" else part.replace("_", " ")
            line = [cell(entry[key]) for key in ("parameters", "flops_per_token", "flops_per_row")]
            rows.append([TableCell(method), TableCell(named), *line])
    if rows:
        columns = ["method", "component", "trainable parameters", "FLOPs a token", "FLOPs a row"]
        note = "Matrix products of a forward pass beside the backbone's, 2 a multiply-add; a row's are spent once."
        found.tables["details"] = [make_table("accounting", "Parameters and FLOPs by component", columns, rows, note)]

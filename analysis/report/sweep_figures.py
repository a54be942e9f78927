"""Which figures a sweep's report has: each with its caption and alternative text, or why it cannot be drawn."""

from __future__ import annotations

import pandas as pd

from analysis import figures
from analysis.figures.style import number
from analysis.measures.hierarchy import FEW_CELLS, mean_weights
from analysis.report.page import OPENING, ReportFigure, unless
from analysis.report.sweep_content import Comparison, span_of
from analysis.runs.frames import Frame
from analysis.summaries.differences import FEW
from analysis.summaries.sweeps import BOUNDS, HEADLINE_MARGIN, Sweep


def sweep_figures(compared: Comparison) -> list[ReportFigure]:
    """Return the figures of a sweep's report, in order."""
    return [_methods(compared), _forest(compared), _tasks(compared.sweep), _stages(compared.sweep)]


def side_by_side(compared: Comparison) -> Frame:
    """Return the methods' scores and paired differences, best first, bounds last.

    Returns:
        Columns method, bound, value, low, high, difference, difference_low, difference_high, verdict; NaN for none.
    """
    rows = []
    for row in compared.methods.to_dict("records"):
        method, none = row["method"], (float("nan"), float("nan"))
        span = span_of(compared, method, compared.key) or none
        found = compared.difference(compared.differences, method) or {}
        pair = [found.get(key, float("nan")) for key in ("difference", "low", "high")]
        rows.append([method, method in BOUNDS, row[compared.key], *span, *pair, found.get("verdict", "")])
    columns = ["method", "bound", "value", "low", "high", "difference", "difference_low", "difference_high", "verdict"]
    frame = pd.DataFrame(rows, columns=columns).dropna(subset="value")
    return frame.sort_values(["bound", "value"], ascending=[True, False], ignore_index=True)


def _methods(compared: Comparison) -> ReportFigure:
    sweep, frame = compared.sweep, side_by_side(compared)
    spans = [f"{row.method} {number(row.value)}" for row in frame.itertuples()]
    tasks = "the headline tasks" if sweep.headline_names else "all tasks"
    hollow = " Hollow: bounds, which do not compete." if frame["bound"].any() else ""
    ones = bool(len(frame)) and bool((compared.methods["cells"] == 1).any())
    rows = " A method of one cell has its test rows redrawn alone." if ones else ""
    right = ""
    if frame["difference"].notna().any():
        right = (
            f" Right: what it has more than {sweep.baseline}, over the same cells and rows; grey where the interval "
        )
        right += "holds 0, so that the two are not told apart; blue above, red below."
    return ReportFigure(
        "methods_side_by_side",
        OPENING,
        "Methods side by side",
        f"{'Left: each' if right else 'Each'} method's mean final score on {tasks} with its 95 % "
        f"interval.{right}{hollow}{rows}",
        f"Dot plot of mean final score by method, with intervals. {'; '.join(spans)}.",
        *unless(
            "" if len(frame) else "no cell is finished", lambda: figures.methods_compared(frame, sweep.baseline or "")
        ),
    )


def _forest(compared: Comparison) -> ReportFigure:
    sweep, frame = compared.sweep, compared.told
    frame = frame[(frame["measure"] == "average_accuracy") & (frame["tasks"] != FEW)]
    why = "" if len(frame) else why_no_differences(sweep)
    rough = f" Intervals over {FEW_CELLS} cells or fewer are rough." if len(frame) and frame["rough"].any() else ""
    first = frame.drop_duplicates("method")
    spans = [
        f"{row.method} {number(row.difference)} ({number(row.low)} to {number(row.high)}), {row.verdict}"
        for row in first.itertuples()
    ]
    return ReportFigure(
        "paired_differences",
        "differences",
        f"Paired differences from {sweep.baseline}" if sweep.baseline else "Paired differences",
        "Mean final score of each method minus the baseline's over the cells that both have, with its 95 % interval: "
        "orders, seeds and test rows redrawn, the same for both. Written: on the headline tasks. Blue: "
        "above; red: below; grey: the interval holds 0, so the two are not told apart."
        f"{rough}",
        f"Forest plot of differences in mean final score. {'; '.join(spans)}.",
        *unless(why, lambda: figures.differences_forest(frame)),
    )


def why_no_differences(sweep: Sweep) -> str:
    """Return why a sweep shows no paired difference."""
    if len(sweep.methods) == 1:
        return "the sweep has one method, and a difference takes two"
    if not sweep.baseline:
        return "the sweep names no baseline to compare with"
    if not sweep.cells_of(sweep.baseline):
        return f"the baseline {sweep.baseline} has no finished cell"
    return f"no other method has a finished cell of the same order and seed as {sweep.baseline}, with its answers"


def task_scores(sweep: Sweep) -> Frame:
    """Return the mean final score over cells of each method and task: columns method, task, value, headline."""
    rows = []
    for method in sweep.measured:
        for task in sweep.tasks:
            cells = [cell for cell in sweep.cells_of(method) if task in cell.stages]
            if cells:
                value = mean_weights([cell.order for cell in cells]) @ [cell.final()[task] for cell in cells]
                inside = task in sweep.headline_names
                rows.append({"method": method, "task": task, "value": float(value), "headline": inside})
    return pd.DataFrame(rows, columns=["method", "task", "value", "headline"])


def _tasks(sweep: Sweep) -> ReportFigure:
    frame = task_scores(sweep)
    outside = [task for task in sweep.tasks if task not in sweep.headline_names]
    line = ""
    if outside and len(outside) < len(sweep.tasks):
        line = f" Right of the line: tasks out of the headline mean ({', '.join(outside)})."
    means = frame.groupby("method", sort=False)["value"].mean()
    return ReportFigure(
        "scores_by_task",
        "tasks",
        "Final score by task and method",
        f"Mean over a method's cells of each task's score after the last stage; higher is better.{line} A task is in "
        f"the headline mean where its bound beats the best constant answer by {HEADLINE_MARGIN}.",
        f"Heat map of final score by method and task. Means over {len(sweep.tasks)} tasks: "
        + ", ".join(f"{method} {number(value)}" for method, value in means.items())
        + ".",
        *unless("" if len(frame) else "no cell is finished", lambda: figures.scores_by_task(frame)),
    )


def stage_scores(sweep: Sweep) -> Frame:
    """Return the mean score on the tasks learnt so far: columns method, cell, weight, stage, value.

    ``weight`` is the cell's in the method's mean.
    """
    rows = []
    for method in sweep.measured:
        cells = [cell for cell in sweep.cells_of(method) if cell.by_stage()]
        for index, (cell, weight) in enumerate(zip(cells, mean_weights([one.order for one in cells]), strict=True)):
            place = {"method": method, "cell": index, "weight": float(weight)}
            rows += [place | {"stage": stage, "value": value} for stage, value in enumerate(cell.by_stage(), start=1)]
    return pd.DataFrame(rows, columns=["method", "cell", "weight", "stage", "value"]).dropna(ignore_index=True)


def _stages(sweep: Sweep) -> ReportFigure:
    frame = stage_scores(sweep)
    ends = ", ".join(
        f"{method} {number(float(figures.mean_by_stage(own).iloc[-1]))}"
        for method, own in frame.groupby("method", sort=False)
    )
    scored = frame.groupby("method")["stage"].agg(["nunique", "min", "max"])
    whole = bool((scored["nunique"] > scored["max"] - scored["min"]).all())
    gaps = "" if whole else " Dotted: the stages between were not scored on all tasks learnt."
    return ReportFigure(
        "accuracy_by_stage",
        "stages",
        "Mean score so far, stage by stage",
        "After each stage, the mean score on the tasks learnt so far. A panel a method: the thick line is the mean "
        "over its cells, thin lines are the cells and the band their spread; grey: the other methods' means. Orders "
        f"differ in which tasks come first, so part of the spread is theirs.{gaps}",
        f"Line charts of the mean score on the tasks learnt so far, one a method. After the last stage: {ends}.",
        *unless("" if len(frame) else "no cell with stages is finished", lambda: figures.accuracy_by_stage(frame)),
    )

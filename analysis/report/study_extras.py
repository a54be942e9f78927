"""A sweep's report beyond scores: its methods under reworded prompts, their routes, and what untouched text lost."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.figures import sweeps as plots
from analysis.figures.style import number
from analysis.report.content import ReportTable, TableCell, cell, make_table, spanned
from analysis.report.page import ReportFigure
from analysis.report.study_parts import Studies
from analysis.runs.frames import Frame
from analysis.runs.load import RunReadError, load_run
from analysis.summaries.summary import other_measures
from analysis.summaries.sweep_wordings import KIND, wording_differences
from analysis.summaries.sweeps import Sweep, cell_measures

_PLACES = {"gate": "gate alone", "prompt": "prompt alone", "both": "prompt and gate"}
_NAMES = {"none": "no instruction", "wrong": "a wrong instruction"}
_BESIDE = {
    "learning_accuracy": "learning accuracy",
    "moved_since_trained": "moved since trained (nats)",
    "moved_since_trained_null": "its split-half null",
    "task_information_nats": "I(atom; task)",
    "token_information_nats": "I(atom; token | task)",
    "routed_home": "rows sent home",
    "abstained": "rows left to the backbone",
    "general_ability_change": "untouched text",
}


def kind_name(words: str, where: str, options: str) -> str:
    """Return what a kind of rewording is called."""
    if words in _NAMES:
        return _NAMES[words]
    return f"{words}, {_PLACES[where]}" + ("" if options == "kept" else f", options {options}")


def add_words(sweep: Sweep, cells: Mapping[str, Frame], found: Studies) -> None:
    """Add what each method loses under reworded prompts, and how it then stands to the baseline."""
    frame = wording_differences(sweep, cells["wording_answers"], cells["wordings"])
    if not len(frame):
        return
    frame = frame.assign(kind=[kind_name(*names) for names in frame[KIND].itertuples(index=False)])
    told = "; ".join(f"{row.method}, {row.kind}: {number(float(row.difference))}" for row in frame.itertuples())
    found.report_figures.append(
        ReportFigure(
            "words_by_method",
            "words",
            "Lost under reworded prompts",
            "Mean final score under reworded prompts minus that in the words trained on, with its 95 % interval, "
            "paired by test row. The dashed line stands at a loss of 0.02. Scales differ. Where the gate alone reads "
            "reworded prompts, a method without one has no row.",
            f"Dot plots of what each method loses, a panel a kind of words. {told}.",
            lambda: plots.words_by_method(frame, sweep.measured),
        )
    )
    found.tables["words_by_method"] = [_words_table(sweep, frame)]


def _words_table(sweep: Sweep, frame: Frame) -> ReportTable:
    rows = []
    for row in frame.to_dict("records"):
        apart: list[TableCell] = [TableCell("baseline" if row["method"] == sweep.baseline else "–"), TableCell("–")]
        if not math.isnan(row["apart"]):
            apart = [spanned(row["apart"], row["apart_low"], row["apart_high"]), TableCell(row["verdict"])]
        line = [TableCell(row["kind"]), TableCell(row["method"]), cell(row["cells"]), cell(row["num_tasks"])]
        line += [cell(row["score"], 3), cell(row["trained"], 3)]
        rows.append([*line, spanned(row["difference"], row["low"], row["high"]), *apart, _share(row["abstained"])])
    columns = ["words", "method", "cells", "tasks", "score", "trained words", "difference"]
    columns += [f"minus {sweep.baseline or 'the baseline'}", "verdict", "left to the backbone"]
    note = "Paraphrases of one file together. Differences are paired: from the words trained on by cell and test row, "
    note += "from the baseline, in the same words, over the cells that both have. Intervals redraw orders, seeds and "
    note += "test rows. Left to the backbone: rows that a gate gave to no stage."
    return make_table("words_by_method", "Scores under reworded prompts", columns, rows, note)


def add_routes(sweep: Sweep, scores: Frame, found: Studies) -> None:
    """Add a table of routes, gates and untouched text, a mean over each method's cells, where anything is recorded."""
    frame = measures_by_method(sweep, scores, found.problems)
    shown = [name for name in _BESIDE if name != "learning_accuracy" and name in frame and frame[name].notna().any()]
    if not shown:
        return
    rows = []
    for row in frame.to_dict("records"):
        line = [TableCell(row["method"]), cell(row["cells"]), cell(row["learning_accuracy"], 3)]
        for name in shown:
            line.append(
                _share(row[name])
                if name in ("routed_home", "abstained", "general_ability_change")
                else _nats(row[name])
            )
            if name == "moved_since_trained_null":
                line.append(_ratio(row["moved_since_trained"], row[name]))
        rows.append(line)
    columns = ["method", "cells", _BESIDE["learning_accuracy"]]
    for name in shown:
        columns += [_BESIDE[name]] + (["moved / null"] if name == "moved_since_trained_null" else [])
    note = (
        "Means over cells, after the last stage. Moved since trained: JS between a task's usage of atoms then and now, "
    )
    note += (
        "all tasks but the last; routes that neither move nor learn are no merit, so learning accuracy stands first. "
    )
    note += "Untouched text: relative change of its log-likelihood since before the first stage."
    found.tables["routes"] = [make_table("routes", "Beside the scores", columns, rows, note)]


def measures_by_method(sweep: Sweep, scores: Frame, problems: list[str]) -> Frame:
    """Return what stands beside each method's scores, means over its cells: columns method, cells, and by measure.

    A mean is over the cells that have the measure; routed_home and abstained are those of the last stage, means over
    tasks. A cell that cannot be read leaves a line in ``problems``.
    """
    gates = _gates(scores)
    lines = []
    for one in sweep.cells:
        if one.matrix is None:
            continue
        values: dict[str, float | int | None] = {}
        try:
            run = load_run(sweep.directory / one.directory, ("routing", "separation", "drift", "general"))
            values = other_measures(run)
        except RunReadError as error:
            problems.append(str(error))
        own = cell_measures(sweep, one).get("learning_accuracy")
        gate = gates.get((one.method, one.order, one.seed), {})
        lines.append(
            {"method": one.method, "learning_accuracy": own} | {k: values.get(k) for k in _BESIDE if k in values} | gate
        )
    frame = pd.DataFrame(lines, columns=["method", *_BESIDE]).astype(dict.fromkeys(_BESIDE, float))
    means: Frame = frame.groupby("method", sort=False, as_index=False).mean()
    means["cells"] = means["method"].map(frame["method"].value_counts())
    return means


def _gates(scores: Frame) -> dict[tuple[str, str, int], dict[str, float]]:
    """Return the mean shares of rows that a gate sent home and to nobody, by cell."""
    if not len(scores):
        return {}
    rows = scores[scores["metric"].isin(["routed_home", "abstained"])]
    last = rows[rows["stage"] == rows.groupby(["method", "order", "seed"])["stage"].transform("max")]
    means = last.groupby(["method", "order", "seed", "metric"], as_index=False)["value"].mean()
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in means.to_dict("records"):
        found.setdefault((row["method"], row["order"], row["seed"]), {})[row["metric"]] = row["value"]
    return found


def _share(value: float) -> TableCell:
    return TableCell("–") if math.isnan(value) else TableCell(f"{value:.1%}".replace("-", "−"), value)


def _nats(value: float) -> TableCell:
    return cell(None if math.isnan(value) else value, 4)


def _ratio(value: float, null: float) -> TableCell:
    return cell(value / null if np.isfinite(value) and null > 0 else None, 2)

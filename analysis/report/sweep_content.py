"""The tables of a sweep's report, and the numbers that its page, figures and summary.json are written from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.measures.hierarchy import FEW_CELLS
from analysis.report import published, words
from analysis.report.content import ReportTable, TableCell, cell, make_table, spanned
from analysis.runs.frames import Frame
from analysis.summaries.differences import ALL, FEW, HEADLINE, paired_differences
from analysis.summaries.row_spans import row_interval
from analysis.summaries.sweeps import BOUNDS, FEW_ROWS, HEADLINE_MARGIN, MEASURES, Sweep, cell_measures, method_table

DEFINITIONS: dict[str, words.Measure] = {
    "headline_accuracy": words.Measure(
        "headline average",
        "higher",
        f"Mean final score over the tasks whose bound beats the best constant answer by {HEADLINE_MARGIN}.",
    ),
    **{key: words.MEASURES[key] for key in MEASURES[1:-1]},
    "intransigence": words.Measure(
        "intransigence", "lower", "Mean over stages k of joint training's score on task k minus the just-trained score."
    ),
}


_MAIN = ("headline_accuracy", "average_accuracy", "backward_transfer", "learning_accuracy")


@dataclass(frozen=True)
class Comparison:
    """A sweep's numbers: ``methods`` as method_table returns them, ``differences`` from the baseline, and the leader.

    ``leader`` is the method, bounds aside, with the highest ``key`` (the headline average, or the plain one where no
    task is a headline task); ``from_leader`` are the differences of the others from it.
    """

    sweep: Sweep
    methods: Frame
    differences: Frame
    key: str
    leader: str | None
    from_leader: Frame

    def row(self, method: str) -> Mapping[str, Any]:
        """Return a method's numbers."""
        return self.methods[self.methods["method"] == method].iloc[0].to_dict()

    @property
    def told(self) -> Frame:
        """The differences without those on all tasks where these are the headline tasks, and so the same numbers."""
        same = set(self.sweep.headline_names) == set(self.sweep.tasks)
        return self.differences[self.differences["tasks"] != ALL] if same else self.differences

    def difference(self, frame: Frame, method: str, measure: str = "average_accuracy") -> Mapping[str, Any] | None:
        """Return ``frame``'s row of a method, over the tasks that ``key`` is over; None where there is none."""
        tasks = HEADLINE if self.key == "headline_accuracy" else ALL
        chosen = (frame["method"] == method) & (frame["measure"] == measure) & (frame["tasks"] == tasks)
        rows = frame[chosen]
        return rows.iloc[0].to_dict() if len(rows) else None


def compare(sweep: Sweep) -> Comparison:
    """Compute a sweep's numbers."""
    methods = method_table(sweep)
    key = "headline_accuracy" if sweep.headline_names else "average_accuracy"
    rivals = methods[~methods["method"].isin(BOUNDS)] if len(methods) else methods
    rivals = rivals[rivals[key].notna()] if len(rivals) else rivals
    leader = str(rivals.loc[rivals[key].idxmax(), "method"]) if len(rivals) else None
    none = paired_differences(sweep, "")
    differences = paired_differences(sweep, sweep.baseline) if sweep.baseline else none
    from_leader = differences if leader == sweep.baseline else paired_differences(sweep, leader) if leader else none
    return Comparison(sweep, methods, differences, key, leader, from_leader)


def span_of(compared: Comparison, method: str, key: str) -> tuple[float, float] | None:
    """Return a measure's interval: over cells or, for a method of one cell, over its test rows; None for none."""
    row = compared.row(method)
    if row["cells"] == 1:
        sweep = compared.sweep
        tasks = sweep.headline_names if key == "headline_accuracy" else sweep.tasks
        return row_interval(sweep.cells_of(method)[0], tasks, key)
    span = (float(row[f"{key}_low"]), float(row[f"{key}_high"]))
    return span if math.isfinite(span[0]) and math.isfinite(span[1]) else None


def _measure(compared: Comparison, row: Mapping[str, Any], key: str) -> TableCell:
    return spanned(row[key], *(span_of(compared, row["method"], key) or (math.nan, math.nan)))


def _whole(value: float) -> TableCell:
    return cell(int(round(value)) if math.isfinite(value) else None)


def stored(num_bytes: float) -> TableCell:
    """Return a number of bytes."""
    return TableCell("0", 0.0) if num_bytes == 0 else cell(float(num_bytes))


def main_table(compared: Comparison) -> ReportTable:
    """The one table: score, difference from the baseline and transfer of every method, with their intervals."""
    sweep = compared.sweep
    rows = []
    for row in compared.methods.to_dict("records"):
        method = row["method"]
        found = compared.difference(compared.differences, method)
        apart = [cell(None), TableCell("baseline" if method == sweep.baseline else "–")]
        if found:
            apart = [spanned(found["difference"], found["low"], found["high"]), TableCell(found["verdict"])]
        scores = [_measure(compared, row, key) for key in _MAIN]
        rows.append([TableCell(named(method)), _whole(row["cells"]), scores[0], *apart, *scores[1:]])
    against = f"minus {sweep.baseline}" if sweep.baseline else "minus the baseline"
    columns = ["method", "cells", DEFINITIONS[_MAIN[0]].name, against, "verdict", "average, all tasks"]
    columns += [DEFINITIONS[key].name for key in _MAIN[2:]]
    return make_table("methods", "Scores and differences", columns, rows, _main_note(compared))


def named(method: str) -> str:
    """Return a method's name, a bound marked as one."""
    return f"{method} (bound)" if method in BOUNDS else method


def cost_table(compared: Comparison) -> ReportTable:
    """What each method costs: memory, parameters, seconds."""
    rows = []
    for row in compared.methods.to_dict("records"):
        numbers = [_whole(row[key]) for key in ("trainable_parameters", "stored_parameters", "serving_parameters")]
        kept, seconds = stored(row["stored_bytes_a_task"]), cell(float(row["seconds"]), 1)
        rows.append([TableCell(named(row["method"])), kept, *numbers, seconds])
    columns = ["method", "kept a task (bytes)", "trainable parameters", "stored parameters", "serving parameters"]
    note = "Means over cells. Kept a task: bytes that the strategy keeps on disk after the last stage, over the stages."
    return make_table("costs", "What each method costs", [*columns, "seconds a cell"], rows, note)


def _main_note(compared: Comparison) -> str:
    note = "Means over cells with 95 % intervals: orders redrawn, then seeds within them; every order counts the same. "
    note += "The difference is paired, over the cells and test rows that both methods have, on the tasks of the first "
    note += "score; it is called above or below only where its interval leaves out 0. "
    if len(compared.methods) and compared.methods["rough"].any():
        note += (
            f"With {FEW_CELLS} cells or fewer an interval is rough; with one cell it holds the test rows' share only."
        )
    return note


def measure_table(compared: Comparison) -> ReportTable:
    """Every measure of every method."""
    rows = [
        [TableCell(named(row["method"])), *(_measure(compared, row, key) for key in MEASURES)]
        for row in compared.methods.to_dict("records")
    ]
    note = " ".join(f"{DEFINITIONS[key].name.capitalize()}: {DEFINITIONS[key].definition}" for key in MEASURES)
    if not len(compared.methods) or compared.methods["intransigence"].isna().all():
        note += " Intransigence needs a method named joint in the same order and with the same seed."
    columns = ["method", *(DEFINITIONS[key].name for key in MEASURES)]
    return make_table("measures", "Every measure", columns, rows, note)


def difference_table(compared: Comparison) -> ReportTable | None:
    """The paired differences in numbers, on headline and on all tasks."""
    rows = []
    for row in compared.told.to_dict("records"):
        named = [TableCell(row["method"]), TableCell(DEFINITIONS[row["measure"]].name), TableCell(row["tasks"])]
        rows.append(
            [*named, cell(row["cells"]), spanned(row["difference"], row["low"], row["high"]), TableCell(row["verdict"])]
        )
    if not rows:
        return None
    columns = ["method", "measure", "tasks", "cells", "difference", "verdict"]
    note = "A hierarchical paired bootstrap with a fixed seed: orders, then seeds within them, then test rows within "
    note += "tasks, the same rows for both methods and in all cells. With one cell it holds the test rows' share only."
    if (compared.differences["tasks"] == FEW).any():
        note += f" Few rows: headline tasks with at most 1/{1 / FEW_ROWS:.0f} of the largest task's training rows."
    title = f"Paired differences from {compared.sweep.baseline}, in numbers"
    return make_table("differences", title, columns, rows, note)


def tuning_table(sweep: Sweep) -> ReportTable | None:
    """Every setting tried in tuning with its score, the chosen one, and whether it lies at the edge of its values."""
    rows = []
    for method, tried in sweep.tuning.items():
        cells = [one for one in tried.get("cells") or [] if isinstance(one, dict)]
        settings = [one.get("settings") or {} for one in cells]
        chosen = tried.get("chosen") or tried.get("settings") or {}
        edge = edges([*settings, chosen], chosen)
        for one, setting in zip(cells, settings, strict=True):
            score = one.get("score")
            taken = bool(chosen) and setting == chosen
            note = one.get("error") or (edge if taken else "")
            numbers = [TableCell(settings_text(setting)), cell(float(score) if score is not None else None, 3)]
            rows.append(
                [
                    TableCell(method),
                    *numbers,
                    TableCell("chosen" if taken else "–"),
                    TableCell(" ".join(str(note or "–").split())),
                ]
            )
        if chosen and chosen not in settings:
            rows.append(
                [
                    TableCell(method),
                    TableCell(settings_text(chosen)),
                    cell(None),
                    TableCell("chosen"),
                    TableCell("not among those tried"),
                ]
            )
    if not rows:
        return None
    note = (
        "At the edge: the chosen value is the smallest or the largest of those tried, so a better one may lie beyond."
    )
    return make_table("tuning", "Values tried", ["method", "settings", "score", "chosen", "note"], rows, note)


def edges(tried: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> str:
    """Return which chosen numbers are the smallest or largest of two or more tried, in words; "" for none."""
    found = []
    for key, value in chosen.items():
        values = {one[key] for one in tried if _is_number(one.get(key))}
        if _is_number(value) and len(values) > 1 and value in (min(values), max(values)):
            found.append(f"{key.rsplit('.', 1)[-1]} at its {'lower' if value == min(values) else 'upper'} edge")
    return ", ".join(found)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings in one line."""
    parts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    return ", ".join(parts) or "–"


def setting_table(sweep: Sweep) -> ReportTable:
    """What each method changes in the base configuration."""
    rows = [[TableCell(method), TableCell(settings_text(settings))] for method, settings in sweep.methods.items()]
    return make_table("settings", "What each method is", ["method", f"settings over {sweep.base or 'the base'}"], rows)


def cell_table(sweep: Sweep) -> ReportTable:
    """Every cell: its state, its score, and the line of one that has no numbers."""
    rows = []
    for one in sweep.cells:
        found = cell_measures(sweep, one)
        scores = [cell(found.get(key), 3) for key in ("headline_accuracy", "average_accuracy", "backward_transfer")]
        place = [TableCell(one.method), TableCell(one.order), TableCell(str(one.seed), one.seed), TableCell(one.status)]
        rows.append(
            [
                *place,
                *scores,
                cell(one.seconds, 1),
                TableCell(one.directory),
                TableCell(one.error or one.rows_problem or "–"),
            ]
        )
    columns = ["method", "order", "seed", "state", "headline average", "average accuracy", "backward transfer"]
    return make_table("cells", "Every cell", [*columns, "seconds", "directory", "error"], rows)


def published_table(compared: Comparison) -> ReportTable | None:
    """The published scores of these orders beside ours, or None where no order is a published one."""
    sweep, measured = compared.sweep, []
    alone = published.order_number(sweep.base) or published.order_number(sweep.name)
    for method in sweep.measured:
        scores: dict[int, list[float]] = {}
        cells = sweep.cells_of(method)
        for one in cells:
            number = published.order_number(one.order, one.stages) or (alone if len(sweep.orders) < 2 else None)
            if number is not None:
                scores.setdefault(number, []).append(one.measures()["average_accuracy"])
        if scores:
            mean = float(np.mean([np.mean(values) for values in scores.values()]))
            backbone = str((cells[0].manifest.get("model") or {}).get("backbone") or "–")
            measured.append(published.Measured(method, tuple(sorted(scores)), mean, backbone))
    return published.table(measured)

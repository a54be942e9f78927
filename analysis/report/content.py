"""The tables of a report, as plain rows that the page and the terminal text are both written from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from analysis.figures.style import number
from analysis.measures import forgetting
from analysis.report.words import BOUND_MEANINGS, MEASURES
from analysis.runs import tables
from analysis.runs.load import Run
from analysis.summaries import bounds
from analysis.summaries.changes import task_changes
from analysis.summaries.general import general_ability
from analysis.summaries.summary import KEYS, ROUTE_MEASURES, Summary, summarise, why_not_averaged
from analysis.summaries.wordings import wording_table

_FINE = (*ROUTE_MEASURES, "general_ability_change")
Array = NDArray[np.float64]
Value = str | int | float | None


@dataclass(frozen=True)
class TableCell:
    """One table cell: what is written, what it sorts by (None: by its text), and its interval, small, under it."""

    text: str
    sort: float | None = None
    beside: str = ""

    @property
    def line(self) -> str:
        """All that is written, in one line."""
        return f"{self.text} ({self.beside})" if self.beside else self.text


@dataclass(frozen=True)
class ReportTable:
    """A table: a key for its place on the page, a heading, columns, rows, and a note under it.

    ``numeric`` says which columns hold numbers, and so stand on the right.
    """

    key: str
    title: str
    columns: list[str]
    rows: list[list[TableCell]]
    note: str = ""
    numeric: list[bool] = field(default_factory=list)


def cell(value: Value, digits: int = 2) -> TableCell:
    """Return ``value`` as a cell; a missing value is a dash that sorts last."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return TableCell("–", -math.inf)
    if isinstance(value, str):
        return TableCell(value)
    if isinstance(value, int):
        return TableCell(f"{value:,}", float(value))
    if digits == 2 or abs(value) >= 100:
        return TableCell(number(value), value)
    text = f"{value:.{digits}f}"
    text = text.replace("-", "−") if float(text) else text.lstrip("-")  # nothing lost is not "−0.000"
    return TableCell(text, value)


def spanned(value: float, low: float, high: float) -> TableCell:
    """Return a number with its interval, sorted by the number."""
    number = cell(value, 3)
    if not (math.isfinite(low) and math.isfinite(high)):
        return number
    return TableCell(number.text, number.sort, f"{cell(low, 3).text} to {cell(high, 3).text}")


def make_table(key: str, title: str, columns: list[str], rows: list[list[TableCell]], note: str = "") -> ReportTable:
    """Return a table; a column that holds a number anywhere, or nothing at all, stands on the right."""
    like_number = re.compile(r"[+−]?[\d.,]+[kMG]?( %)?")
    columns_of = [[row[place] for row in rows] for place in range(len(columns))]
    numeric = [any(like_number.fullmatch(one.text) for one in own) for own in columns_of]
    empty = [bool(own) and all(one.sort == -math.inf for one in own) for own in columns_of]
    numeric = [number or none for number, none in zip(numeric, empty, strict=True)]
    return ReportTable(key, title, columns, rows, note, numeric)


def all_numbers(summary: Summary) -> ReportTable:
    """Every key of summary.json with its value, interval, direction and definition."""
    rows = []
    for key in KEYS:
        measure, value = MEASURES[key], summary.values.get(key)
        span = summary.intervals.get(key)
        between = f"{number(span[0])} to {number(span[1])}" if span else "–"
        meaning = (
            measure.definition if value is not None else f"{measure.definition} Not shown: {summary.reasons[key]}."
        )
        digits = 4 if key.endswith("_null") else 3 if key in _FINE else 2
        rows.append(
            [
                TableCell(measure.name),
                cell(value, digits),
                TableCell(between),
                TableCell(measure.better),
                TableCell(meaning),
            ]
        )
    note = "Intervals (95 %): the test rows redrawn 1,000 times, the same rows at every stage. They hold neither "
    note += "the spread "
    note += "over seeds nor that over stage orders, which one run cannot show."
    if any(low == high for low, high in summary.intervals.values()):
        note += " An interval of no width: every row that it redraws is alike. That is no proof: of n rows alike, the "
        note += "true share may still lie 3/n away (95 %; Hanley & Lippman-Hand 1983)."
    if "intervals" in summary.reasons:
        note = f"No intervals: {summary.reasons['intervals']}."
    return make_table(
        "numbers", "All numbers", ["measure", "value", "95 % interval", "better", "definition"], rows, note
    )


def matrix_table(summary: Summary) -> ReportTable:
    """R itself: a row a stage, a column a task."""
    names = ["untrained", *summary.run.learnt]
    rows = [
        [TableCell(f"{stage} {names[stage]}", stage), *(cell(float(score), 3) for score in scores)]
        for stage, scores in enumerate(summary.matrix)
    ]
    note = (
        "R[i, j]: row i after stage i (0: untrained), column j by task; headline metric of each task, higher is better."
    )
    return make_table("matrix", "The score matrix in numbers", ["after stage", *summary.run.stages], rows, note)


def bound_table(summary: Summary) -> ReportTable | None:
    """This run between its bounds; None where none was asked for."""
    run, found = summary.run, bounds.read(summary.run)
    names = list(run.manifest.get("bounds") or [])
    if not names:
        return None
    of_run = [cell(summary.values[key]) for key in ("average_accuracy", "learning_accuracy")]
    rows = [[TableCell("this run"), *of_run, TableCell("as configured")]]
    for name in names:
        values: list[Value] = [None, None]
        if name == "zero_shot" and run.learnt and not why_not_averaged(run):
            values = [float(summary.learnt_matrix[0].mean())] * 2
        elif name in found:
            other = summarise(found[name]).values
            values = [other["average_accuracy"], other["learning_accuracy"]]
        rows.append([TableCell(name.replace("_", " ")), *map(cell, values), TableCell(BOUND_MEANINGS.get(name, "–"))])
    note = "Final average: over the learnt tasks after the last stage. Learning accuracy: over each just after its own "
    note += "stage. –: not run to its end, or scores that are not averaged. The runs lie in the folder bounds."
    columns = ["bound", "final average", "learning accuracy", "what it is"]
    return make_table("bounds", "Between its bounds", columns, rows, note)


def task_table(summary: Summary) -> ReportTable:
    """Each task's way through the run: untrained, best constant answer, just trained, final, what it lost since."""
    run, matrix = summary.run, summary.matrix
    learnt = len(run.learnt)
    lost = forgetting.forgetting_by_task(summary.learnt_matrix) if learnt else np.empty(0)
    changes = {row["task"]: row for row in task_changes(summary).to_dict("records")} if len(matrix) else {}
    rows = []
    for index, task in enumerate(run.stages):
        facts, change = run.tasks.get(task) or {}, changes.get(task)
        known = len(matrix) > 0
        since, verdict = cell(None), "–"
        if change and math.isfinite(change["kept"]):
            low, high = change["kept_low"], change["kept_high"]
            since = spanned(change["kept"], low, high)
            verdict = "–" if math.isnan(low) else "lost" if high < 0 else "gained" if low > 0 else "not told apart"
        rows.append(
            [
                TableCell(str(index + 1), index + 1),
                TableCell(task),
                TableCell(str(facts.get("metric", "–"))),
                cell(float(matrix[0, index]) if known else None, 3),
                cell(maybe_float(facts.get("constant_score")), 3),
                cell(float(matrix[index + 1, index]) if index < learnt else None, 3),
                cell(float(matrix[-1, index]) if known and index < learnt else None, 3),
                since,
                TableCell(verdict),
                cell(float(lost[index]) if index < len(lost) else None, 3),
            ]
        )
    columns = ["stage", "task", "metric", "untrained", "best constant", "just trained", "final"]
    columns += ["final minus just trained", "verdict", "forgetting"]
    note = "Best constant: what always giving the one best answer earns. Verdict: lost or gained since the task's own "
    note += "stage, where the 95 % interval (the same redrawn test rows at both stages) leaves out 0. Forgetting: "
    note += "the best score after an earlier stage (untrained left out) minus the final one; negative if it improved."
    return make_table("tasks", "Task by task", columns, rows, note)


def maybe_float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def other_metrics(summary: Summary) -> ReportTable | None:
    """What stands beside the headline scores (RMSE beside R2, say), or None when nothing does."""
    run = summary.run
    scores = run.tables["scores"]
    rows = []
    for index, task in enumerate(run.stages):
        own = scores[(scores["task"] == task) & (scores["metric"] != run.metric(task))]
        for metric, values in own.groupby("metric", sort=True):
            by_stage = values.drop_duplicates("stage", keep="last").set_index("stage")["value"]
            trained = by_stage.get(index + 1) if index < len(run.learnt) else None
            final = by_stage.get(run.finished_stage) if index < len(run.learnt) else None
            shown = [cell(maybe_float(value), 3) for value in (by_stage.get(0), trained, final)]
            rows.append([TableCell(task), TableCell(str(metric)), *shown, TableCell(str(values["direction"].iloc[0]))])
    if not rows:
        return None
    columns = ["task", "metric", "untrained", "just trained", "final", "better"]
    return make_table("beside", "Beside the headline scores", columns, rows)


def information_table(summary: Summary) -> ReportTable | None:
    """Whether routing uses the input or only the task, after the last stage."""
    usage = tables.usage_array(summary.run)
    if usage is None or not summary.run.learnt:
        return None
    most = math.log(usage.shape[-1])
    lines = {
        "task_information_nats": ("I(atom; task)", "what the task alone says of the atom, over an even mix of tasks"),
        "token_information_nats": ("I(atom; token | task)", "what the input says of it once the task is known"),
        "routing_entropy_nats": ("entropy of a task's usage", f"at most ln M = {most:.2f}"),
        "token_entropy_nats": ("entropy of a token's weights", "mean over tokens and tasks"),
    }
    rows = []
    for key, (name, meaning) in lines.items():
        value = summary.values[key]
        share = None if value is None or not most else value / most
        rows.append([TableCell(name), cell(value, 3), cell(share, 3), TableCell(meaning)])
    note = "Learnt tasks after the last stage, means over blocks. Where the second is near 0, routing does not "
    note += "look at the input."
    columns = ["measure", "nats", "/ ln M", "meaning"]
    return make_table("information", "Does routing use the input, or only the task?", columns, rows, note)


def words_table(run: Run) -> ReportTable | None:
    """Scores under reworded prompts, against the trained ones."""
    places = {"gate": "gate alone", "prompt": "prompt alone", "both": "prompt and gate"}
    rows = []
    for line in wording_table(run).itertuples():
        names = [
            TableCell(str(line.words)),
            TableCell(places[str(line.where)]),
            TableCell(str(line.options)),
            cell(line.num_tasks),
        ]
        span = TableCell(f"{line.low:.3f} to {line.high:.3f}".replace("-", "−"))
        rows.append([*names, cell(line.score, 3), cell(line.trained, 3), cell(line.difference, 3), span])
    columns = ["words", "given to", "options", "tasks", "score", "trained words", "difference", "95 % interval"]
    note = "After the last stage, means over tasks; paraphrases of one file together. The interval of the difference "
    note += "redraws test rows, the same ones for both wordings."
    return make_table("reworded", "Scores under reworded prompts", columns, rows, note) if rows else None


def general_table(run: Run) -> ReportTable | None:
    """Log-likelihood of untouched text by stage."""
    rows = [
        [
            cell(int(line.stage)),
            TableCell(["untrained", *run.stages][line.stage]),
            cell(line.value, 4),
            cell(line.change, 4),
        ]
        for line in general_ability(run).itertuples()
    ]
    columns = ["stage", "after", "nats a token", "relative change"]
    note = (
        "No instruction is given. A relative change of −0.01 is a log-likelihood 1 % lower than the untrained model's."
    )
    return make_table("general", "Log-likelihood of untouched text", columns, rows, note) if rows else None


def stage_table(run: Run) -> ReportTable:
    """The stages in order, with their instruction and the time they took."""
    whole, scoring = (run.manifest.get(key) or {} for key in ("stage_seconds", "scoring_seconds"))

    steps = run.manifest.get("trained_steps") or {}

    def spent(stage: int) -> list[TableCell]:
        trained = TableCell(f"{steps[str(stage)]:,}", steps[str(stage)]) if str(stage) in steps else TableCell("–")
        return [trained] + [cell(maybe_float(seconds.get(str(stage))), 1) for seconds in (whole, scoring)]

    rows = [[TableCell("0", 0), TableCell("untrained"), TableCell("–"), *spent(0)]]
    for index, task in enumerate(run.stages, start=1):
        text = str((run.tasks.get(task) or {}).get("instruction") or "–")
        rows.append([TableCell(str(index), index), TableCell(task), TableCell(text), *spent(index)])
    total, scored = (sum(maybe_float(spent) or 0.0 for spent in seconds.values()) for seconds in (whole, scoring))
    note = f"Scoring took {100 * scored / total:.0f} % of the time." if scored and total else ""
    return make_table(
        "stages", "Stages", ["stage", "task", "instruction", "steps", "seconds", "of these scoring"], rows, note
    )


def fact_table(run: Run) -> ReportTable:
    """The model and the machine, from the manifest."""
    facts = {"run": run.name, "seed": run.manifest.get("seed"), **run.model, **(run.manifest.get("environment") or {})}
    rows = [
        [TableCell(str(key).replace("_", " ")), TableCell(_fact(value))]
        for key, value in facts.items()
        if value is not None
    ]
    return make_table("facts", "Model and machine", ["fact", "value"], rows)


def _fact(value: object) -> str:
    grouped = isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000
    return f"{value:,}" if grouped else str(value)

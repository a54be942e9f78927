"""A sweep of single runs side by side as a story: what each forgot and kept, for how many bytes, and how routes moved.

It is told of two to four methods with one cell each (one order, one seed) over the same stages; a sweep of more cells
has means and paired differences instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures import sweep_story as drawings
from analysis.figures.style import number
from analysis.report.content import ReportTable, TableCell, cell, make_table, spanned
from analysis.report.page import OPENING, Point, ReportFigure, unless
from analysis.report.sweep_content import Comparison
from analysis.runs import tables
from analysis.runs.frames import Frame
from analysis.runs.load import RunReadError, load_run
from analysis.summaries.differences import verdict as verdict_of
from analysis.summaries.row_spans import row_interval
from analysis.summaries.sweep_cells import SweepCell
from analysis.summaries.sweeps import ABOVE, BELOW, BOUNDS, EVEN

SECTION = (
    "story",
    "Run by run",
    "What each run forgot, what it keeps and how its routes moved. Each has a report of its own as well: python -m "
    "analysis.report on its directory, which 'Every cell' names.",
)
MOST_METHODS = 4
_VERDICTS = {BELOW: "lost", ABOVE: "gained", EVEN: "not told from chance"}


@dataclass(frozen=True)
class Story:
    """What is told of a few runs.

    Attributes:
        compared: The sweep's numbers.
        cells: The run of each method, in the sweep's order.
        changes: What became of each task (``task_changes``).
        drift: How far routes moved, in JS: ``tables.drift`` of each run behind a column ``method``; empty for none.
        problems: A line for each run whose routes cannot be read.
    """

    compared: Comparison
    cells: Sequence[SweepCell]
    changes: Frame
    drift: Frame
    problems: Sequence[str]

    @property
    def stages(self) -> list[str]:
        """The tasks, in the order of training."""
        return self.cells[0].stages

    def earlier(self, method: str) -> Frame:
        """Return the changes of a run's tasks but the last one."""
        return self.changes[(self.changes["method"] == method) & (self.changes["verdict"] != "")]

    def moved(self, method: str) -> Frame:
        """Return how far a run's routes moved from each task's own stage to the last: columns task, value, null."""
        if not len(self.drift):
            return pd.DataFrame(columns=["task", "value", "null"])
        now = (self.drift["reference"] == "trained") & (self.drift["stage"] == len(self.stages))
        return self.drift.loc[now & (self.drift["method"] == method), ["task", "value", "null"]].astype({"task": str})


def story_of(compared: Comparison) -> Story | None:
    """Return the story of a sweep, or None where its methods are too few or too many or have several cells."""
    sweep = compared.sweep
    runs = [sweep.cells_of(method) for method in sweep.measured if method not in BOUNDS]
    if not 2 <= len(runs) <= MOST_METHODS or any(len(own) > 1 for own in runs):
        return None
    cells = [own[0] for own in runs]
    if len({tuple(one.stages) for one in cells}) > 1 or len(cells[0].stages) < 2:
        return None
    if any(not one.rows or np.isnan(list(one.trained().values()) or [math.nan]).any() for one in cells):
        return None
    return Story(compared, cells, task_changes(cells), *_drift(compared, cells))


def task_changes(cells: Sequence[SweepCell]) -> Frame:
    """Return what became of each task in each run.

    Returns:
        Columns method, task, untrained, trained (just after its own stage), final, kept (final minus trained), low and
        high (the 95 % interval of that, test rows redrawn) and verdict ("lost", "gained" or "not told from chance").
        Of the last task nothing can have been lost: kept, low and high are NaN, and the verdict is "".
    """
    rows = []
    for one in cells:
        assert one.matrix is not None
        for index, task in enumerate(one.stages):
            scores = [float(one.matrix[stage, index]) for stage in (0, index + 1, -1)]
            span = row_interval(one, [task], "backward_transfer")
            found = [scores[2] - scores[1], *span, _VERDICTS[verdict_of(*span)]] if span else [math.nan] * 3 + [""]
            rows.append([one.method, task, *scores, *found])
    columns = ["method", "task", "untrained", "trained", "final", "kept", "low", "high", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _drift(compared: Comparison, cells: Sequence[SweepCell]) -> tuple[Frame, list[str]]:
    parts, problems = [], []
    for one in cells:
        try:
            run = load_run(compared.sweep.directory / one.directory, ("routing", "separation", "drift"))
        except RunReadError as error:
            problems.append(str(error))
            continue
        own = tables.drift(run)
        own = own[own["metric"] == "js"].copy()
        own.insert(0, "method", one.method)
        parts.append(own)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(), problems


# -- in words ---------------------------------------------------------------------------------------------------------


def verdict(story: Story) -> str:
    """Return what each run forgot, in a sentence; a loss is called one only where its interval says so."""
    parts = []
    for one in story.cells:
        own = story.earlier(one.method)
        lost, rest = own[own["verdict"] == "lost"], own[own["verdict"] != "lost"]
        told = f"forgot: {_went(lost, 'fell')}" if len(lost) else "forgot nothing that can be told from chance"
        if len(rest):
            told += f"{', while' if len(lost) else ':'} {_went(rest, 'went')}"
        parts.append(f"{one.method} {told}")
    return f"{'; '.join(parts)}."


def _went(rows: Frame, verb: str) -> str:
    """Return where each task's score went; the verb is said once."""
    verbs = [f" {verb}", *[""] * (len(rows) - 1)]
    return _listed(
        f"{row.task}{said} from {number(float(row.trained))} to {number(float(row.final))}"
        for row, said in zip(rows.itertuples(), verbs, strict=True)
    )


def _listed(parts: Any) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def gloss(story: Story) -> str:
    """Return what the verdict rests on: final scores, their difference, the bytes kept, and what is not known."""
    compared, sweep = story.compared, story.compared.sweep
    finals = _listed(f"{one.method} {cell(compared.row(one.method)[compared.key], 3).text}" for one in story.cells)
    text = f"From: the score just after the task's own stage; to: after the last stage. Mean final score: {finals}"
    for one in story.cells:
        if found := compared.difference(compared.differences, one.method):
            apart = spanned(found["difference"], found["low"], found["high"]).line
            text += f"; {one.method} minus {sweep.baseline}: {apart}, {found['verdict']}"
    kept = _listed(f"{one.method} {kept_bytes(story, one.method)}" for one in story.cells)
    counts = sorted({len(scores.rows) for one in story.cells for scores in one.rows.values()})
    many = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return (
        f"{text}. Kept on disk for later stages: {kept}. One seed, one order and {many} test rows a task: the 95 % "
        "intervals redraw test rows alone; other seeds and orders would add to them."
    )


def kept_bytes(story: Story, method: str) -> str:
    """Return how many bytes a method keeps on disk after the last stage, in words."""
    a_task = float(story.compared.row(method)["stored_bytes_a_task"])
    if math.isnan(a_task):
        return "not known"
    return f"{round(a_task * len(story.stages)):,} bytes" if a_task else "nothing"


def points(story: Story) -> list[Point]:
    """Return what each run forgot, keeps and moved, a point a method."""
    found = []
    for one in story.cells:
        told = [
            f"{row.task}: {spanned(float(row.kept), float(row.low), float(row.high)).line} since it was trained, "
            f"{row.verdict}."
            for row in story.earlier(one.method).itertuples()
        ]
        numbers = story.compared.row(one.method)["stored_parameters"]
        beside = f" beside the {round(numbers):,} numbers that answer all tasks" if math.isfinite(numbers) else ""
        told.append(f"Kept on disk for later stages: {kept_bytes(story, one.method)}{beside}.")
        found.append(Point(one.method, " ".join([*told, _moved(story.moved(one.method))]).strip()))
    return found


def _moved(rows: Frame) -> str:
    if not len(rows):
        return ""
    moves = _listed(f"{row.task} {row.value:.4f}" for row in rows.itertuples())
    null = rows["null"].max(skipna=False)
    told = "" if math.isnan(null) else f" (two halves of one task differ by {_small(null)})"
    return f"Routes moved since trained, JS in nats: {moves}{told}."


def _small(value: float) -> str:
    """Return the largest of some distances in words: with four digits, or that it is less than they can show."""
    return f"{value:.4f} at most" if value >= 5e-5 else "less than 0.0001"


# -- figures and tables -----------------------------------------------------------------------------------------------


def figures(story: Story) -> list[ReportFigure]:
    """Return the figures: the score matrices on the first screen, and the moves of routes."""
    lost, of = (story.changes["verdict"] == "lost").sum(), (story.changes["verdict"] != "").sum()
    moves = story.drift[story.drift["reference"] == "previous"] if len(story.drift) else story.drift
    why = story.problems[0] if story.problems else "no run recorded routes (their adapters do not route over atoms)"
    null = moves["null"].max() if len(moves) else math.nan
    halves = "" if math.isnan(null) else f" Two random halves of one task differ by {_small(null)}."
    return [
        ReportFigure(
            "scores_side_by_side",
            OPENING,
            "What was forgotten and what was kept",
            "The score of every task after every stage, higher is better, a panel a method. Framed: just trained. Read "
            "a column from its frame down: what it loses there, later stages took.",
            f"Heat maps of score by stage and task, one a method. {verdict(story)}",
            lambda: drawings.score_matrices(_scores(story)),
            see=f"Of {of} columns with stages below their frame, {lost} fall by more than chance.",
        ),
        ReportFigure(
            "moves_side_by_side",
            SECTION[0],
            "How routes moved",
            "How far each task's routes moved at each stage: JS against the stage before, in nats, mean over blocks, a "
            "panel a method on one scale. Framed: the task's own stage; below it, training on other tasks moved them."
            f"{halves}",
            f"Heat maps of route drift by stage and task, one a method. {_mean_moves(story)}",
            *unless("" if len(moves) else why, lambda: drawings.moves_by_method(moves)),
            see=_mean_moves(story),
        ),
    ]


def _scores(story: Story) -> Frame:
    """Return every score: columns method, stage, task, value."""
    parts = []
    for one in story.cells:
        assert one.matrix is not None
        stages, tasks = np.indices(one.matrix.shape).reshape(2, -1)
        names = tables.categories([story.stages[task] for task in tasks], story.stages)
        parts.append(pd.DataFrame({"method": one.method, "stage": stages, "task": names, "value": one.matrix.ravel()}))
    return pd.concat(parts, ignore_index=True)


def _mean_moves(story: Story) -> str:
    """Return the mean move of each run's routes since their tasks were trained, in a sentence; "" for none."""
    means = {one.method: story.moved(one.method)["value"].mean() for one in story.cells}
    told = [f"{mean:.4f} nats under {method}" for method, mean in means.items() if not math.isnan(mean)]
    return f"Since a task was trained, its routes moved by {_listed(told)}, mean over tasks." if told else ""


def table(story: Story) -> ReportTable:
    """Return the story in numbers, a row a method and task."""
    moves = {(one.method, row.task): row for one in story.cells for row in story.moved(one.method).itertuples()}
    rows = []
    for row in story.changes.to_dict("records"):
        line = [TableCell(row["method"]), TableCell(row["task"])]
        line += [cell(row[key], 3) for key in ("untrained", "trained", "final")]
        line += [spanned(row["kept"], row["low"], row["high"]), TableCell(row["verdict"] or "last task")]
        move: Any = moves.get((row["method"], row["task"]))
        if move is not None:
            null = "" if math.isnan(move.null) else f"null {move.null:.1g}"
        rows.append([*line, cell(None) if move is None else TableCell(f"{move.value:.4f}", move.value, null)])
    columns = ["method", "task", "untrained", "just trained", "final", "final minus just trained", "verdict"]
    note = (
        "Intervals (95 %) redraw the test rows, the same at both stages; lost or gained is said only where they leave "
        "out 0. An interval of no width: every row changed alike. Routes moved: JS (nats) of the task's usage of atoms "
        "after the last stage against that after its own; null: between two halves of its rows."
    )
    return make_table("story", "Task by task, in numbers", [*columns, "routes moved"], rows, note)


def to_json(story: Story) -> list[dict[str, Any]]:
    """Return the changes for summary.json: plain JSON, null for what is not defined."""
    records = story.changes.to_dict("records")
    return [{str(key): None if value != value else value for key, value in row.items()} for row in records]

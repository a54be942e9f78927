"""The routing story in words: for each task its atoms, its nearest task, and where its routes moved most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.figures.style import number
from analysis.measures import routing
from analysis.report.content import ReportTable, TableCell, cell, make_table, spanned
from analysis.report.page import Point
from analysis.runs import tables
from analysis.summaries.changes import score_lost
from analysis.summaries.summary import Summary
from continual.measures import distances


@dataclass(frozen=True)
class Chapter:
    """One task's part of the story, after the last finished stage, over blocks.

    Attributes:
        task: Its name.
        atoms: The three atoms that it uses most, with their usage.
        nearest: The task that it has most routing weight in common with, or "".
        common: That weight (1 - total variation); NaN for none.
        stage: The stage after the task's own at which its routes moved most; 0 for none.
        at: That stage's task.
        moved: How far, JS in nats.
        null: The split-half JS of the same rows at that stage; NaN where it was not recorded.
        lost: The score that the task lost at that stage; NaN where it was not scored.
        lost_span: Its 95 % interval over test rows; NaN for none.
    """

    task: str
    atoms: list[tuple[int, float]]
    nearest: str
    common: float
    stage: int
    at: str
    moved: float
    null: float
    lost: float
    lost_span: tuple[float, float]

    @property
    def beyond_chance(self) -> bool | None:
        """Whether the move is larger than its split-half null; None where there is no null."""
        return None if np.isnan(self.null) or not self.stage else bool(self.moved > self.null)


def chapters(summary: Summary) -> list[Chapter]:
    """Return the story of every task whose routes were recorded after the last stage."""
    run, usage = summary.run, tables.usage_array(summary.run)
    if usage is None:
        return []
    now, common = usage[-1].mean(axis=1), 1 - routing.pairwise(usage[-1], distances.total_variation)
    np.fill_diagonal(common, np.nan)
    frame = tables.drift(run)
    moved = tables.drift_matrix(frame, max(run.finished_stage, 0))
    null = tables.drift_matrix(frame.assign(value=frame["null"]), max(run.finished_stage, 0))
    found = []
    for index, task in enumerate(run.stages):
        if np.isnan(now[index]).any():
            continue
        atoms = [(int(atom), float(now[index, atom])) for atom in np.argsort(-now[index], kind="stable")[:3]]
        nearest = None if np.isnan(common[index]).all() else int(np.nanargmax(common[index]))
        near = ("", np.nan) if nearest is None else (run.stages[nearest], float(common[index, nearest]))
        later = moved[index + 1 :, index]
        move: tuple[Any, ...] = (0, "", np.nan, np.nan, np.nan, (np.nan, np.nan))
        if later.size and not np.isnan(later).all():
            stage = index + 2 + int(np.nanargmax(later))
            place = (float(moved[stage - 1, index]), float(null[stage - 1, index]))
            move = (stage, run.stages[stage - 1], *place, *score_lost(summary, stage, index))
        found.append(Chapter(task, [one for one in atoms if one[1] > 0], *near, *move))
    return found


def points(told: list[Chapter]) -> list[Point]:
    """Return the story in sentences, a task each."""
    return [Point(chapter.task, _sentences(chapter)) for chapter in told]


def _sentences(chapter: Chapter) -> str:
    uses = [f"{atom} ({number(share)})" for atom, share in chapter.atoms]
    text = f"Uses atom{'s' * (len(uses) > 1)} {', '.join(uses)} most."
    if chapter.nearest:
        text += f" Shares most with {chapter.nearest}: {number(chapter.common)} of its routing weight."
    if not chapter.stage:
        return text
    text += f" Its routes moved most at stage {chapter.stage}, {chapter.at}: {chapter.moved:.4f} nats"
    if chapter.beyond_chance is False:
        return f"{text}, no more than two halves of its own rows differ ({chapter.null:.4f}): not told from chance."
    if chapter.beyond_chance:
        text += f", {chapter.moved / chapter.null:.2f} times the split-half null" if chapter.null > 0 else ""
    low, high = chapter.lost_span
    if np.isnan(low):
        return f"{text}."
    if low <= 0 <= high:
        return f"{text}; no change of its score there can be told from chance."
    change, span = ("lost", (low, high)) if low > 0 else ("gained", (-high, -low))
    return (
        f"{text}; it {change} {number(abs(chapter.lost))} ({number(span[0])} to {number(span[1])}) of its score there."
    )


def story_table(told: list[Chapter], finished_stage: int) -> ReportTable | None:
    """Return the story as a table, a row a task."""
    rows = []
    for one in told:
        atoms = ", ".join(f"{atom} ({number(share)})" for atom, share in one.atoms)
        shared = [TableCell(one.nearest), cell(one.common)] if one.nearest else [TableCell("–"), cell(None)]
        null = "" if one.beyond_chance is None else f"null {one.null:.4f}"
        moved = TableCell(f"{one.moved:.4f}", one.moved, null) if one.stage else cell(None)
        beyond = {None: "–", True: "yes", False: "no"}[one.beyond_chance]
        where = TableCell(f"{one.stage} {one.at}", one.stage) if one.stage else cell(None)
        rows.append(
            [
                TableCell(one.task),
                TableCell(atoms),
                *shared,
                where,
                moved,
                TableCell(beyond),
                spanned(one.lost, *one.lost_span),
            ]
        )
    if not rows:
        return None
    columns = ["task", "uses most", "shares most with", "in common", "moved most at", "JS", "beyond null"]
    note = f"After stage {finished_stage}, over blocks. In common: 1 − total variation. Moved most at: the stage after "
    note += "the task's own with the largest JS (nats). Null: the split-half JS of the same rows; a move below it is "
    note += "not to be told from chance. Score lost: at that stage, with its 95 % interval over test rows; negative "
    note += "where the score rose."
    title = "The routing story, task by task"
    return make_table("story", title, [*columns, "score lost there"], rows, note)

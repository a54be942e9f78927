"""Before trusting a benchmark: what each task's rows can show at all (measures.md's preflight), for a run or a sweep.

Questions are never cut (a row whose question does not fit is refused before training), and training rows that share
their text, or their passage, with a test row are dropped; so both are counted as what was done, not as what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.figures.style import number
from analysis.measures.forgetting import just_trained
from analysis.report.content import ReportTable, TableCell, cell, make_table, maybe_float
from analysis.report.page import Point
from analysis.runs.tables import headline as headline_scores
from analysis.runs.tables import score_matrix
from analysis.summaries import bounds, intervals
from analysis.summaries.summary import Summary
from analysis.summaries.sweeps import HEADLINE_MARGIN, PER_TASK, Sweep

THIS_RUN = "this run"


@dataclass(frozen=True)
class Check:
    """What is known of a task before its results.

    Attributes:
        task: Its name.
        facts: What the manifest says of it.
        bound: The score that training on it alone reaches, or the nearest thing known; NaN for none.
        source: What reached the bound: a method's name, or this run.
        constant: What the best constant answer earns; NaN where the manifest does not say.
    """

    task: str
    facts: Mapping[str, Any]
    bound: float
    source: str
    constant: float

    @property
    def passes(self) -> bool | None:
        """Whether the bound beats the best constant answer by enough; None where either is not known."""
        if math.isnan(self.bound) or math.isnan(self.constant):
            return None
        return self.bound >= self.constant + HEADLINE_MARGIN - 1e-9

    @property
    def smallest_difference(self) -> float | None:
        """What two unpaired shares near one half must differ by to be told apart at 95 %; None for other scores."""
        num_rows = self.facts.get("test_rows")
        share = self.facts.get("metric") in ("accuracy", "score")
        return intervals.smallest_difference(num_rows) if num_rows and share else None


def run_checks(summary: Summary) -> list[Check]:
    """Return each task's check; the bound is the run's own per_task bound or, without one, this run just trained."""
    run = summary.run
    alone = bounds.read(run).get(PER_TASK)
    matrix, source = summary.matrix, THIS_RUN
    if alone is not None and alone.stages == run.stages and alone.finished_stage > 0:
        matrix, source = score_matrix(headline_scores(alone), alone.finished_stage), PER_TASK
    num = max(len(matrix) - 1, 0)
    reached = np.full(len(run.stages), np.nan)
    if num:
        reached[:num] = just_trained(matrix[:, :num])
    found = []
    for task, score in zip(run.stages, reached, strict=True):
        facts = run.tasks.get(task) or {}
        constant = maybe_float(facts.get("constant_score"))
        found.append(Check(task, facts, float(score), source, math.nan if constant is None else constant))
    return found


def sweep_checks(sweep: Sweep) -> list[Check]:
    """Return each task's check; facts are those of the first cell that has the task."""
    found = []
    for row in sweep.headline.to_dict("records"):
        task = str(row["task"])
        facts = next(
            (known[task] for one in sweep.cells if task in (known := one.manifest.get("tasks") or {})),
            {},
        )
        found.append(Check(task, facts, row["bound"], row["bound_from"], row["constant"]))
    return found


def points(checks: Sequence[Check], over: str) -> list[Point]:
    """Return in words which tasks can show something; ``over`` says what the tasks that pass make."""
    failed = [check.task for check in checks if check.passes is False]
    unknown = [check.task for check in checks if check.passes is None]
    num = len(checks) - len(failed) - len(unknown)
    text = f"{num} of {len(checks)} tasks have a bound that beats the best constant answer by {HEADLINE_MARGIN}. "
    if failed:
        text += f"Not so: {', '.join(failed)}, on which no forgetting can show. {over} "
    if unknown:
        text += f"Not known yet: {', '.join(unknown)}."
    found = [Point("What can be learnt", text.strip())]
    smallest = [check.smallest_difference for check in checks if check.smallest_difference is not None]
    if smallest:
        span = number(min(smallest))
        span += f" to {number(max(smallest))}" if number(max(smallest)) != span else ""
        text = f"With these test rows, two unpaired scores of one task must differ by {span} to be told apart at 95 %; "
        found.append(Point("What can be told apart", text + "paired over the same rows, or over tasks, by less."))
    cut = [check.task for check in checks if any(_cut(check.facts, split) for split in ("train", "test"))]
    known = [check for check in checks if _cut(check.facts, "test") is not None]
    if known:
        text = f"Contexts were shortened on {', '.join(cut)}. " if cut else "No context was shortened. "
        found.append(Point("What was cut", text + "No question ever is: a row whose question does not fit is refused."))
    return found


def table(checks: Sequence[Check], headline: Sequence[str] | None = None) -> ReportTable:
    """Return the preflight, a row a task; ``headline`` names the tasks that make a sweep's headline mean."""
    rows = []
    for check in checks:
        facts, passes = check.facts, check.passes
        if headline is not None:
            passes = check.task in headline  # one whose constant answer is not known counts there
        rows.append(
            [
                TableCell(check.task),
                TableCell(str(facts.get("kind", "–"))),
                TableCell(cell(check.bound, 3).text, cell(check.bound, 3).sort, check.source),
                cell(check.constant, 3),
                cell(check.bound - check.constant, 3),
                TableCell("not known" if passes is None else "yes" if passes else "no"),
                _rows(facts, "train", facts.get("trained_rows", facts.get("train_rows"))),
                _rows(facts, "test", facts.get("test_rows")),
                cell(facts.get("dropped_shared_rows")),
                cell(check.smallest_difference, 3),
            ]
        )
    asked = f"beats it by {HEADLINE_MARGIN}" if headline is None else "in the headline mean"
    columns = ["task", "kind", "bound", "best constant", "bound over constant", asked, "training rows", "test rows"]
    columns += ["shared rows dropped", "smallest difference"]
    told = [place for place in range(len(columns)) if any(row[place].text != "–" for row in rows)]
    shown = [[row[place] for place in told] for row in rows]
    return make_table("preflight", "Each task before its results", [columns[place] for place in told], shown, _NOTE)


_NOTE = (
    "Bound: what training on the task reaches, and who reached it: per_task (an adapter a task) where there is one, "
    "else the best just-trained score known, in which the methods reported on had a part. Best constant: what always "
    f"giving the one best answer earns. A task whose bound does not beat it by {HEADLINE_MARGIN} can show no "
    "forgetting. Cut: rows whose context was shortened. Shared rows dropped: training rows with the text or the "
    "passage of a test row, taken out before training; tasks that are generated have none. Smallest difference: "
    "1.96 √(0.5 / test rows), for shares only."
)


def _cut(facts: Mapping[str, Any], split: str) -> int | None:
    """Return how many rows of a split were cut, where the manifest says so for each split."""
    cut = facts.get("cut_rows")
    return cut.get(split) if isinstance(cut, Mapping) else None


def _rows(facts: Mapping[str, Any], split: str, num: int | None) -> TableCell:
    """Return a number of rows and, under it, the share of its split's rows whose context was cut."""
    cut, of = _cut(facts, split), facts.get(f"{split}_rows")
    share = "" if cut is None or not of else f"{100 * cut / of:.1f} % cut" if cut else "none cut"
    return TableCell(cell(num).text, cell(num).sort, share)

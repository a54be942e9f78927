"""One run's report: what its page shows, section by section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from analysis.figures.style import number
from analysis.report import content, preflight, published, story, words
from analysis.report.content import ReportTable
from analysis.report.figures import report_figures
from analysis.report.page import KeyNumber, Page
from analysis.runs.load import Run
from analysis.summaries.summary import Summary, summarise, why_not_averaged

_SECTIONS = (
    ("preflight", "Preflight", "What the rows of each task can show at all, before any result is trusted."),
    ("scores", "Scores", "What each stage taught, and what it cost the tasks before it."),
    ("story", "The routing story", "Each task's atoms, whom it shares them with, what moved, and what that cost."),
    ("use", "What routing uses", "The atoms of the shared bank in detail: usage, its change, entropy, specialists."),
    ("distance", "How tasks stand apart", "Distances between tasks' routes, stage by stage, and their drift."),
    ("training", "Training", "The loss, and where in the network the adapter's gradient lies."),
    ("words", "Reworded prompts", "The finished model under instructions and lists that it was not trained on."),
    ("general", "General ability", "What stages cost the model on English that no stage trains on."),
    ("details", "Details", "Every number with its definition, and what the run was."),
)


def run_page(run: Run) -> Page:
    """Return the page of a run, finished or not."""
    summary = summarise(run)
    checks, told = preflight.run_checks(summary), story.chapters(summary)
    return Page(
        kind="Continual-learning run",
        title=run.name,
        verdict=words.verdict(summary),
        gloss=words.gloss(summary),
        sections=_SECTIONS,
        report_figures=report_figures(summary),
        tables=_tables(summary, checks, told),
        facts=_facts(run),
        key_numbers=_key_numbers(summary),
        notices=_notices(run),
        points={"preflight": preflight.points(checks, _over_passing(summary, checks)), "story": story.points(told)},
        summary=summary.to_json(),
    )


def _key_numbers(summary: Summary) -> list[KeyNumber]:
    found: list[KeyNumber] = []
    metrics = {summary.run.metric(task) for task in summary.run.learnt}
    unit = "R²" if metrics == {"r2"} else "accuracy"
    for key in words.KEY_NUMBERS:
        reason = summary.reasons.get(key)
        span = summary.intervals.get(key)
        found.append(
            KeyNumber(
                replace(words.MEASURES[key], name=words.MEASURES[key].name.replace("accuracy", unit)),
                content.cell(summary.values[key]).text,
                (number(span[0]), number(span[1])) if span else None,
                "not averaged" if reason and why_not_averaged(summary.run) else reason,
            )
        )
    return found


def _over_passing(summary: Summary, checks: Sequence[preflight.Check]) -> str:
    """Return the average over the tasks that pass, in a sentence, where an average is over others too."""
    if summary.values["average_accuracy"] is None:
        return ""
    final = dict(zip(summary.run.learnt, summary.matrix[-1], strict=False))
    passing = [final[check.task] for check in checks if check.passes and check.task in final]
    if not passing:
        return ""
    return f"Over the others alone the average final score is {number(sum(passing) / len(passing))}."


def _tables(
    summary: Summary, checks: Sequence[preflight.Check], told: list[story.Chapter]
) -> dict[str, list[ReportTable]]:
    """Return the report's tables by the name of the figure that they follow, or of their section."""
    run = summary.run
    found: dict[str, list[ReportTable | None]] = {
        "preflight": [preflight.table(checks)],
        "scores": [content.task_table(summary), content.other_metrics(summary)],
        "routing_entropy": [content.information_table(summary)],
        "story": [story.story_table(told, run.finished_stage)],
        "words": [content.words_table(run)],
        "general_ability": [content.general_table(run)],
        "details": [
            content.all_numbers(summary),
            content.matrix_table(summary),
            content.bound_table(summary),
            content.stage_table(run),
            published.published_table(summary),
            content.fact_table(run),
        ],
    }
    return {place: [table for table in tables if table is not None] for place, tables in found.items()}


def _facts(run: Run) -> list[str]:
    """Return the few facts under the title."""
    model, found = run.model, []
    if model.get("backbone"):
        found.append(str(model["backbone"]))
    if model.get("adapter"):
        found.append(str(model["adapter"]).rsplit(".", 1)[-1])
    if model.get("trainable_parameters") is not None:
        found.append(f"{model['trainable_parameters']:,} trainable parameters")
    if model.get("num_atoms"):
        found.append(f"{model['num_atoms']} atoms, top {model.get('top_k')}, {model.get('num_blocks')} blocks")
    return [*found, f"{len(run.stages)} stage{'s' * (len(run.stages) != 1)}", f"seed {run.manifest.get('seed', '–')}"]


def _notices(run: Run) -> list[str]:
    """Return what a reader must know before the numbers."""
    why = why_not_averaged(run)
    found = [f"No averages: {why}."] if why else []
    found += [f"{problem}. What needs it is left out." for problem in run.problems.values()]
    accepted = run.manifest.get("accepted_data") or []
    found += [f"{line} Scores before and after are not of the same rows." for line in accepted]
    if not run.complete:
        done = max(run.finished_stage, 0)
        found.insert(
            0,
            f"This run is not finished: {done} of {len(run.stages)} stages are, and the numbers are over those alone.",
        )
    return found

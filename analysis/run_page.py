"""One run's report: what its page shows, section by section."""

from __future__ import annotations

from analysis import content, published, words
from analysis.content import Table
from analysis.figures import plates
from analysis.load import Run
from analysis.page import KeyNumber, Page
from analysis.plots.style import number
from analysis.summary import Summary, summarise, why_not_averaged

_SECTIONS = (
    ("scores", "Scores", "What each stage taught, and what it cost the tasks before it."),
    ("use", "What routing uses", "Which atoms of the shared bank each task draws on, and how that changes."),
    ("distance", "How tasks stand apart", "Distances between tasks' routes, their drift, and what drift goes with."),
    ("training", "Training", "The loss, and where in the network the adapter's gradient lies."),
    ("words", "Other words", "The finished model under instructions and lists that it was not trained on."),
    ("general", "General ability", "What stages cost the model on English that no stage trains on."),
    ("details", "Details", "Every number with its definition, and what the run was."),
)


def run_page(run: Run) -> Page:
    """Return the page of a run, finished or not."""
    summary = summarise(run)
    return Page(
        kind="Continual-learning run",
        title=run.name,
        verdict=words.verdict(summary),
        sections=_SECTIONS,
        plates=plates(summary),
        tables=_tables(summary),
        facts=_facts(run),
        key_numbers=_key_numbers(summary),
        notices=_notices(run),
        summary=summary.to_json(),
    )


def _key_numbers(summary: Summary) -> list[KeyNumber]:
    found = []
    for key in words.key_numbers(summary):
        reason = summary.reasons.get(key)
        span = summary.intervals.get(key)
        found.append(
            KeyNumber(
                words.MEASURES[key],
                content.cell(summary.values[key], 3 if key == "route_drift" else 2).text,
                (number(span[0]), number(span[1])) if span else None,
                "not averaged" if reason and why_not_averaged(summary.run) else reason,
            )
        )
    return found


def _tables(summary: Summary) -> dict[str, list[Table]]:
    """Return the report's tables by the name of the figure that they follow, or of their section."""
    run = summary.run
    found: dict[str, list[Table | None]] = {
        "score_matrix": [content.task_table(summary), content.other_metrics(summary)],
        "routing_entropy": [content.information_table(summary)],
        "sharing": [content.routing_story(summary)],
        "words": [content.words_table(run)],
        "general_ability": [content.general_table(run)],
        "details": [
            content.all_numbers(summary),
            content.matrix_table(summary),
            content.bound_table(summary),
            content.stage_table(run),
            published.beside_run(summary),
            content.trust_table(run),
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
    if not run.complete:
        done = max(run.finished_stage, 0)
        found.insert(
            0,
            f"This run is not finished: {done} of {len(run.stages)} stages are, and the numbers are over those alone.",
        )
    return found

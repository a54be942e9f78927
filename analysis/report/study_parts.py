"""What a study adds to the page of a sweep: sections that stand where their data are."""

from __future__ import annotations

from dataclasses import dataclass, field

from analysis.report.content import ReportTable
from analysis.report.page import ReportFigure

SECTIONS = {
    "words": ("Reworded prompts", "What each method keeps where a task is put in words that it was not trained on."),
    "routes": ("Routes and untouched text", "What stands beside the scores: where rows go, and what moves."),
    "ablations": ("What each part earns", "The whole adapter against itself with one part taken away or changed."),
    "reuse": ("Few rows", "What a task reaches by how many rows it is trained on."),
    "stability": ("Stability", "How much scores depend on the seed, and how much the loss still moves at the end."),
    "gradients": ("Gradients by method", "Where in the network each method's gradient lies."),
    "pareto": ("Size and speed", "Rank, atoms and top-k against score, latency and parameters."),
    "bounds": ("The theory's bounds", "How near the bounds come to being reached along the runs."),
}


@dataclass
class Studies:
    """What is added to a sweep's page: figures, and tables by the figure or section that they stand under.

    ``problems`` are lines on what could not be read for them.
    """

    problems: list[str] = field(default_factory=list)
    report_figures: list[ReportFigure] = field(default_factory=list)
    tables: dict[str, list[ReportTable]] = field(default_factory=dict)

    @property
    def sections(self) -> list[tuple[str, str, str]]:
        """Key, title and lead of the sections that hold anything."""
        held = {content.section for content in self.report_figures} | set(self.tables)
        return [(key, *SECTIONS[key]) for key in SECTIONS if key in held]

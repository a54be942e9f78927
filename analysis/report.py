"""python -m analysis.report DIR: write the report of a run's directory into DIR/report.

It leaves report.html (one file that asks no network for anything), report.md, summary.json and figures/*.png and *.svg.
The last line on standard output is the path of report.html; ``--format text`` prints report.md instead. An unfinished
run is reported over its finished stages; what a run cannot show is named, with the reason. Exit status: 0, or 2 when
DIR holds no run.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib as mpl
from markupsafe import Markup

from analysis import content, words
from analysis.content import Table
from analysis.figures import Plate, plates
from analysis.load import Run, RunError, load_run
from analysis.plots import style
from analysis.plots.style import number
from analysis.summary import Summary, summarise, why_not_averaged

_TEMPLATES = Path(__file__).parent
_DOTS_PER_INCH = 160
_SECTIONS = (
    ("scores", "Scores", "What each stage taught, and what it cost the tasks before it."),
    ("use", "What routing uses", "Which atoms of the shared bank each task draws on, and how that changes."),
    ("distance", "How tasks stand apart", "Distances between tasks' routes, their drift, and what drift goes with."),
    ("training", "Training", "The loss, and where in the network the adapter's gradient lies."),
    ("words", "Other words", "The finished model under instructions and lists that it was not trained on."),
    ("general", "General ability", "What stages cost the model on English that no stage trains on."),
    ("details", "Details", "Every number with its definition, and what the run was."),
)


@dataclass(frozen=True)
class Figure:
    """A drawn figure: its plate, and its SVG ready to stand inside a page (empty where it cannot be drawn)."""

    plate: Plate
    svg: Markup = Markup("")
    width_pixels: int = 0


@dataclass(frozen=True)
class Section:
    """A part of the report: its figures, each followed by its tables, and the tables of no figure.

    ``missing`` holds, by the reason, the titles of the figures that cannot be shown.
    """

    key: str
    title: str
    lead: str
    figures: list[tuple[Figure, list[Table]]]
    missing: dict[str, list[str]]
    tables: list[Table]


def write_report(run_dir: str | Path) -> Path:
    """Write the report of the run in ``run_dir`` and return the path of report.html.

    Raises:
        RunError: The directory holds no run.
    """
    return _write(load_run(run_dir))


def _write(run: Run) -> Path:
    directory = run.directory / "report"
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    summary = summarise(run)
    text = json.dumps(summary.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    (directory / "summary.json").write_text(text + "\n", encoding="utf-8")
    figures = [_draw(plate, directory / "figures") for plate in plates(summary)]
    context = _context(summary, figures)
    for name in ("report.md", "report.html"):
        (directory / name).write_text(_environment().get_template(f"{name}.j2").render(context), encoding="utf-8")
    return directory / "report.html"


def _draw(plate: Plate, directory: Path) -> Figure:
    """Save a figure as PNG and SVG, or take away what an earlier report left under its name."""
    image, vector = directory / f"{plate.name}.png", directory / f"{plate.name}.svg"
    if plate.draw is None:
        image.unlink(missing_ok=True)
        vector.unlink(missing_ok=True)
        return Figure(plate)
    with style.look(), mpl.rc_context({"svg.hashsalt": plate.name}):
        figure = plate.draw()
        figure.savefig(image, dpi=_DOTS_PER_INCH, metadata={"Software": None})
        figure.set_layout_engine("none")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    vector.write_text(buffer.getvalue(), encoding="utf-8")
    return Figure(plate, _inline(buffer.getvalue(), plate), round(figure.get_figwidth() * 96))


def _inline(svg: str, plate: Plate) -> Markup:
    """Make an SVG file into an element of a page: no prolog, names of its own, and its alternative text."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{plate.name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{plate.name}-", body)
    box = re.search(r'viewBox="[^"]*"', body)
    start = f'<svg role="img" aria-label="{Markup.escape(plate.alt)}" {box.group() if box else ""} '
    start += 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return Markup(start + body[body.index(">") + 1 :])


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=_plain, rows=_text_table)
    return environment


def _context(summary: Summary, figures: Sequence[Figure]) -> dict[str, object]:
    run = summary.run
    beside = _tables(summary)
    sections = [_section(*section, figures, beside) for section in _SECTIONS]
    sections = [part for part in sections if part.figures or part.missing or part.tables]
    key_numbers = [
        {
            "measure": words.MEASURES[key],
            "value": content.cell(summary.values[key], 3 if key == "route_drift" else 2).text,
            "interval": tuple(map(number, summary.intervals[key])) if key in summary.intervals else None,
            "reason": summary.reasons.get(key),
        }
        for key in words.key_numbers(summary)
    ]
    if why_not_averaged(run):
        key_numbers = [item | {"reason": item["reason"] and "not averaged"} for item in key_numbers]
    return {
        "run": run,
        "facts": _facts(run),
        "verdict": words.verdict(summary),
        "key_numbers": key_numbers,
        "sections": sections,
        "notices": _notices(run),
    }


def _section(key: str, title: str, lead: str, figures: Sequence[Figure], beside: Mapping[str, list[Table]]) -> Section:
    own = [figure for figure in figures if figure.plate.section == key]
    drawn = [(figure, beside.get(figure.plate.name, [])) for figure in own if figure.svg]
    missing: dict[str, list[str]] = {}
    for figure in own:
        if not figure.svg:
            missing.setdefault(figure.plate.missing, []).append(figure.plate.title)
    left = [table for figure in own if not figure.svg for table in beside.get(figure.plate.name, [])]
    return Section(key, title, lead, drawn, missing, [*left, *beside.get(key, [])])


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


def _plain(text: object) -> str:
    """Return text for markdown: one line, with what would be read as markup made harmless."""
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*|])", r"\\\1", line).replace("](", r"]\(")
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _text_table(table: Table) -> str:
    """Return a table as markdown whose columns also line up in a terminal."""
    lines = [[_plain(name) for name in table.columns], *([_plain(cell.text) for cell in row] for row in table.rows)]
    widths = [max(3, *(len(line[place]) for line in lines)) for place in range(len(table.columns))]
    rule = [
        ("-" * (width - 1) + ":") if right else "-" * width for width, right in zip(widths, table.numeric, strict=True)
    ]

    def row(cells: Sequence[str]) -> str:
        both = zip(cells, widths, table.numeric, strict=True)
        return (
            "| " + " | ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in both) + " |"
        )

    return "\n".join([row(lines[0]), row(rule), *map(row, lines[1:])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report", description="Write the report of a run.", allow_abbrev=False
    )
    parser.add_argument("directory", type=Path, help="the run's directory")
    parser.add_argument("--format", choices=("html", "text"), default="html", help="text: print the report as markdown")
    given = parser.parse_args(arguments)
    try:
        run = load_run(given.directory)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in run.problems.values():
        print(f"warning: {run.directory / problem}", file=sys.stderr)
    page = _write(run)
    print(page.with_name("report.md").read_text(encoding="utf-8") if given.format == "text" else page)
    return 0


if __name__ == "__main__":
    sys.exit(main())

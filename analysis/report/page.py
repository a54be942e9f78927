"""The page that every report is written into: figures with their tables in sections, as HTML, markdown and JSON."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing

from analysis.figures import style
from analysis.report.content import ReportTable
from analysis.report.words import Measure

_TEMPLATES = Path(__file__).parent
_DOTS_PER_INCH = 160
Draw = Callable[[], Drawing]
OPENING = "opening"
"""The section of the figure on the first screen."""


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the report; ``draw`` is None where the run cannot show it, and ``missing`` then says why.

    ``caption`` says how to read it, ``see`` what there is to see in it, in a sentence that its numbers allow; the
    figure of the section ``OPENING`` stands on the first screen.
    """

    name: str
    section: str
    title: str
    caption: str
    alt: str
    draw: Draw | None
    missing: str = ""
    see: str = ""


def unless(why: str, draw: Draw) -> tuple[Draw | None, str]:
    """Return a figure's last two fields: what draws it, or nothing and ``why`` where there is a reason."""
    return (None, why) if why else (draw, "")


@dataclass(frozen=True)
class RenderedFigure:
    """A drawn figure: its content, and its SVG ready to stand inside a page (empty where it cannot be drawn)."""

    content: ReportFigure
    svg: Markup = Markup("")
    width_pixels: int = 0


@dataclass(frozen=True)
class Point:
    """A thing that a section says in words before its figures: what it is about, and a few sentences."""

    term: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the report: its points, its figures, each followed by its tables, and the tables of no figure.

    ``missing`` holds, by the reason, the titles of the figures that cannot be shown.
    """

    key: str
    title: str
    lead: str
    points: list[Point]
    figures: list[tuple[RenderedFigure, list[ReportTable]]]
    missing: dict[str, list[str]]
    tables: list[ReportTable]


@dataclass(frozen=True)
class KeyNumber:
    """A number of the first screen: its measure, the value as written, and what stands under it."""

    measure: Measure
    value: str
    interval: tuple[str, str] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Page:
    """A report's content.

    Attributes:
        kind: What is reported on, as the line over the title.
        title: The title.
        verdict: What is shown, in a sentence.
        gloss: What the verdict rests on: the sizes, with their intervals, and what they do not hold.
        sections: Key, title and lead of each section, in order.
        report_figures: The figures; each names its section.
        tables: Tables by the name of the figure that they follow, or by their section's key.
        facts: The few facts under the title.
        key_numbers: The numbers of the first screen.
        notices: What a reader must know before the numbers.
        points: What a section says in words, by its key.
        summary: summary.json's content.
    """

    kind: str
    title: str
    verdict: str
    gloss: str
    sections: Sequence[tuple[str, str, str]]
    report_figures: Sequence[ReportFigure]
    tables: Mapping[str, list[ReportTable]]
    facts: Sequence[str]
    key_numbers: Sequence[KeyNumber]
    notices: Sequence[str]
    points: Mapping[str, list[Point]] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


def write_page(page: Page, directory: Path) -> Path:
    """Write report.html, report.md, summary.json and figures/ into ``directory``; return the path of report.html."""
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    text = json.dumps(page.summary, indent=2, ensure_ascii=False, allow_nan=False)
    (directory / "summary.json").write_text(text + "\n", encoding="utf-8")
    figures = [_draw(content, directory / "figures") for content in page.report_figures]
    told = ("kind", "title", "facts", "verdict", "gloss", "key_numbers", "notices")
    context: dict[str, Any] = {name: getattr(page, name) for name in told}
    context["opening"] = [figure for figure in figures if figure.content.section == OPENING and figure.svg]
    context["unopened"] = [figure.content for figure in figures if figure.content.section == OPENING and not figure.svg]
    sections = [_section(page, *section, figures) for section in page.sections]
    context["sections"] = [part for part in sections if part.points or part.figures or part.missing or part.tables]
    for name in ("report.md", "report.html"):
        (directory / name).write_text(_environment().get_template(f"{name}.j2").render(context), encoding="utf-8")
    return directory / "report.html"


def _draw(content: ReportFigure, directory: Path) -> RenderedFigure:
    """Save a figure as PNG and SVG, or take away what an earlier report left under its name."""
    image, vector = directory / f"{content.name}.png", directory / f"{content.name}.svg"
    if content.draw is None:
        image.unlink(missing_ok=True)
        vector.unlink(missing_ok=True)
        return RenderedFigure(content)
    with style.look(), mpl.rc_context({"svg.hashsalt": content.name}):
        figure = content.draw()
        figure.savefig(image, dpi=_DOTS_PER_INCH, metadata={"Software": None})
        figure.set_layout_engine("none")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    vector.write_text(buffer.getvalue(), encoding="utf-8")
    return RenderedFigure(content, _inline(buffer.getvalue(), content), round(figure.get_figwidth() * 96))


def _inline(svg: str, content: ReportFigure) -> Markup:
    """Make an SVG file into an element of a page: no prolog, names of its own, and its alternative text."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="image[^"]*"', "", body)  # like pictures (two colour bars, say) are given like ids
    body = re.sub(r'\bid="', f'id="{content.name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{content.name}-", body)
    box = re.search(r'viewBox="[^"]*"', body)
    start = f'<svg role="img" aria-label="{Markup.escape(content.alt)}" {box.group() if box else ""} '
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


def _section(page: Page, key: str, title: str, lead: str, figures: Sequence[RenderedFigure]) -> Section:
    beside = page.tables
    own = [figure for figure in figures if figure.content.section == key]
    drawn = [(figure, beside.get(figure.content.name, [])) for figure in own if figure.svg]
    missing: dict[str, list[str]] = {}
    for figure in own:
        if not figure.svg:
            missing.setdefault(figure.content.missing, []).append(figure.content.title)
    left = [table for figure in own if not figure.svg for table in beside.get(figure.content.name, [])]
    return Section(key, title, lead, page.points.get(key, []), drawn, missing, [*left, *beside.get(key, [])])


def _plain(text: object) -> str:
    """Return text for markdown: one line, with what would be read as markup made harmless, and nothing else changed.

    A "<" opens a tag, and an "&" names a character, by what follows alone (CommonMark 0.31, 2.5 and 6.6); a terminal
    shows "x < 1" as it is.
    """
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*|])", r"\\\1", line).replace("](", r"]\(")
    line = re.sub(r"&(?=#|\w+;)", "&amp;", line)
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"^>", "&gt;", line))


def _text_table(table: ReportTable) -> str:
    """Return a table as markdown whose columns also line up in a terminal."""
    lines = [[_plain(name) for name in table.columns], *([_plain(cell.line) for cell in row] for row in table.rows)]
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

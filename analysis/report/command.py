"""python -m analysis.report DIR: write the report of a run's or a sweep's directory into DIR/report.

It leaves report.html (one file that asks no network for anything), report.md, summary.json and figures/*.png and *.svg.
The last line on standard output is the path of report.html; ``--format text`` prints report.md instead. An unfinished
run is reported over its finished stages, a sweep over its finished cells; what cannot be shown is named, with the
reason. A directory with a sweep.json is a sweep. Exit status: 0, or 2 when DIR holds neither or cannot be written to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.report.page import Page, write_page
from analysis.report.run_page import run_page
from analysis.report.sweep_page import sweep_page
from analysis.runs.load import RunReadError, load_run
from analysis.summaries.sweeps import is_sweep, load_sweep


def write(directory: str | Path) -> Path:
    """Write the report of the run or sweep in ``directory`` and return the path of report.html.

    Raises:
        RunReadError: The directory holds neither.
    """
    return write_page(_read(Path(directory))[0], Path(directory) / "report")


def _read(directory: Path) -> tuple[Page, list[str]]:
    """Return a directory's page, and a line for each thing in it that could not be read."""
    if is_sweep(directory):
        sweep = load_sweep(directory)
        return sweep_page(sweep), [f"{directory}: {problem}" for problem in sweep.problems]
    if directory.is_dir() and not (directory / "manifest.json").exists():
        raise RunReadError(f"{directory}: neither a run nor a sweep ({_what_it_lacks(directory)})")
    run = load_run(directory)
    return run_page(run), [str(directory / problem) for problem in run.problems.values()]


def _what_it_lacks(directory: Path) -> str:
    """Return why a directory cannot be reported on, with a few of the runs and sweeps that lie in it."""
    inside = {path.parent.name for name in ("manifest.json", "sweep.json") for path in directory.glob(f"*/{name}")}
    named = ", ".join(sorted(inside)[:3]) + (", …" if len(inside) > 3 else "")
    return "it has no manifest.json and no sweep.json" + (f"; name one of those in it: {named}" if inside else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report", description="Write the report of a run or a sweep.", allow_abbrev=False
    )
    parser.add_argument("directory", type=Path, help="the run's or the sweep's directory")
    parser.add_argument("--format", choices=("html", "text"), default="html", help="text: print the report as markdown")
    given = parser.parse_args(arguments)
    try:
        content, problems = _read(given.directory)
    except RunReadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    try:
        page = write_page(content, given.directory / "report")
    except OSError as error:
        print(f"error: {given.directory / 'report'}: the report cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(page.with_name("report.md").read_text(encoding="utf-8") if given.format == "text" else page)
    return 0

"""What follows the last stage of a run: its bounds, and its report."""

from __future__ import annotations

import sys
from pathlib import Path

from continual.errors import one_line


def finish(run_dir: Path, report: bool = True, accept_data: bool = False) -> Path:
    """Run the bounds that the configuration asks for, then write the report where one is wanted.

    Raises:
        RunError: A bound failed; the run is finished, and so is its report.
    """
    from continual.engine.bounds import run_bounds
    from continual.runtime import distributed

    try:
        run_bounds(run_dir, accept_data)
    finally:
        if report and distributed.is_first():
            write_report(run_dir)
    return run_dir


def write_report(directory: Path) -> None:
    """Write the report of a run or a sweep; a report that fails does not undo what it would have told of."""
    from analysis import report

    try:
        print(f"Report: {report.write_report(directory)}")
    except Exception as error:  # the runs are done and on disk; say so, and let the report be drawn again
        print(f"the report failed: {one_line(error)}; try python -m analysis.report {directory}", file=sys.stderr)

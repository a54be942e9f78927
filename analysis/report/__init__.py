"""The report of a run or a sweep: pages, tables, captions and templates; ``python -m analysis.report DIR``."""

from __future__ import annotations

from pathlib import Path


def write_report(directory: str | Path) -> Path:
    """Write the report of the run or sweep in ``directory`` and return the path of report.html.

    Raises:
        RunReadError: The directory holds neither.
    """
    from analysis.report.command import write  # here: a figure's helpers need not wait for all pages

    return write(directory)

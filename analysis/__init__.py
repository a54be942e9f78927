"""Read a run's records, measure them and draw its report; of the framework it needs the records' schemas alone."""

from analysis.runs.load import Frames, Run, RunReadError, load, load_run
from analysis.summaries.differences import paired_differences
from analysis.summaries.summary import Summary, summarise
from analysis.summaries.sweeps import Sweep, load_sweep, method_table

__all__ = [
    "Frames",
    "Run",
    "RunReadError",
    "Summary",
    "Sweep",
    "load",
    "load_run",
    "load_sweep",
    "method_table",
    "paired_differences",
    "summarise",
]

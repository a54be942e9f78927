"""Read a run's records, measure them and draw its report; needs nothing of the framework but ``continual.records``."""

from analysis.differences import paired_differences
from analysis.load import Frames, Run, RunError, load, load_run
from analysis.summary import Summary, summarise
from analysis.sweeps import Sweep, load_sweep, method_table

__all__ = [
    "Frames",
    "Run",
    "RunError",
    "Summary",
    "Sweep",
    "load",
    "load_run",
    "load_sweep",
    "method_table",
    "paired_differences",
    "summarise",
]

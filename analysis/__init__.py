"""Read a run's records, measure them and draw its report; needs nothing of the framework but ``continual.records``."""

from analysis.load import Frames, Run, RunError, load, load_run
from analysis.summary import Summary, summarise

__all__ = ["Frames", "Run", "RunError", "Summary", "load", "load_run", "summarise"]

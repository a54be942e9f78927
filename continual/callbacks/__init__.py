"""Recorders, one a file: what is written down while a stage trains and while its tasks are scored; and what is shown.

A recorder is an ``interfaces.Recorder``. To ship another one, write its file and add it to ``shipped_recorders``;
one of a user's own is named by its class path under ``recorders`` in the configuration.
"""

from continual.callbacks.best_training import BestTraining
from continual.callbacks.general import GeneralRecorder
from continual.callbacks.gradients import GradientRecorder
from continual.callbacks.progress import StageProgress
from continual.callbacks.rewording import RewordingRecorder
from continual.callbacks.routing import RouteRecorder
from continual.callbacks.scores import ScoreRecorder
from continual.callbacks.theory import TheoryRecorder
from continual.callbacks.tokens import TokenRecorder
from continual.interfaces import Recorder, StageContext

__all__ = [
    "BestTraining",
    "GeneralRecorder",
    "GradientRecorder",
    "Recorder",
    "RewordingRecorder",
    "RouteRecorder",
    "ScoreRecorder",
    "StageContext",
    "StageProgress",
    "TheoryRecorder",
    "TokenRecorder",
]

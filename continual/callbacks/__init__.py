"""Callbacks: what is recorded while a stage trains and while its tasks are scored, and what is shown."""

from continual.callbacks.best_training import BestTraining
from continual.callbacks.gradients import GradientRecorder
from continual.callbacks.progress import StageProgress
from continual.callbacks.routing import RouteRecorder
from continual.callbacks.scores import ScoreRecorder
from continual.callbacks.theory import TheoryRecorder
from continual.callbacks.tokens import TokenRecorder

__all__ = [
    "BestTraining",
    "GradientRecorder",
    "RouteRecorder",
    "ScoreRecorder",
    "StageProgress",
    "TheoryRecorder",
    "TokenRecorder",
]

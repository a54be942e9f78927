"""Tasks to learn one after another: text tables, procedural reasoning and regression, each with its own metric."""

from tasks.base import Task, TaskError
from tasks.choices import Choices
from tasks.judges import ExactMatch, FinalAnswer, Judge, PassesTests, TokenOverlap
from tasks.reasoning import ReasoningTask
from tasks.regression import RegressionTask
from tasks.text import TextTask

__all__ = [
    "Choices",
    "ExactMatch",
    "FinalAnswer",
    "Judge",
    "PassesTests",
    "ReasoningTask",
    "RegressionTask",
    "Task",
    "TaskError",
    "TextTask",
    "TokenOverlap",
]

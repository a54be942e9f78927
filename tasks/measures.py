"""Measures that a task reports beside its headline, computed from all of its answers at once.

A headline is a mean over rows, so that two methods can be compared row by row; these are not, and benchmarks ask for
them: SuperGLUE (Wang et al. 2019, 1905.00537) scores CommitmentBank by accuracy and macro F1, MultiRC by the F1 of its
true answers (F1a) and the share of questions answered right throughout, ReCoRD by F1 and exact match.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.judges import plain_words

Rows = Sequence[Mapping[str, Any]]


def macro_f1(rows: Rows, answers: Sequence[str], labels: Sequence[str]) -> float:
    """Return the unweighted mean of the F1 of every label that stands among the rows' or the given answers."""
    right = [row["answer"] for row in rows]
    present = [label for label in labels if label in right or label in answers]
    return sum(_label_f1(right, answers, label) for label in present) / len(present)


def last_label_f1(rows: Rows, answers: Sequence[str], labels: Sequence[str]) -> float:
    """Return the F1 of the last label, the positive one in [False, True]; 0 where it is neither right nor given."""
    return _label_f1([row["answer"] for row in rows], answers, labels[-1])


def whole_question_accuracy(rows: Rows, answers: Sequence[str], labels: Sequence[str]) -> float:
    """Return the share of questions (the rows' ``unit``) all rows of which are answered right."""
    right: dict[str, bool] = {}
    for row, answer in zip(rows, answers, strict=True):
        right[row["unit"]] = right.get(row["unit"], True) and answer == row["answer"]
    return sum(right.values()) / len(right)


def exact_match(rows: Rows, answers: Sequence[str], labels: Sequence[str]) -> float:
    """Return the share of free answers that are one of the row's references, normalised as for F1."""
    found = [
        plain_words(answer) in [plain_words(reference) for reference in row.get("references") or [row["answer"]]]
        for row, answer in zip(rows, answers, strict=True)
    ]
    return sum(found) / len(found)


MEASURES: dict[str, Callable[[Rows, Sequence[str], Sequence[str]], float]] = {
    one.__name__: one for one in (macro_f1, last_label_f1, whole_question_accuracy, exact_match)
}
"""Every measure by its name; each takes the rows, the answer given to each, and the task's labels."""

FOR_LABELS = ("macro_f1", "last_label_f1", "whole_question_accuracy")
"""The measures of tasks with labels; the others are for free answers."""


def _label_f1(right: Sequence[str], given: Sequence[str], label: str) -> float:
    both = sum(r == g == label for r, g in zip(right, given, strict=True))
    either = sum(r == label for r in right) + sum(g == label for g in given)
    return 2 * both / either if either else 0.0

"""What every task offers: checked train and test rows, an instruction, a metric with its direction, and a scorer.

Vocabulary
    split   "train" or "test"; no row, and no group of rows, stands in both
    kind    "labels" (one of a list), "free" (any text, judged by the task's own scorer) or "regression" (a number)
"""

from __future__ import annotations

import abc
import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["labels", "free", "regression"]
Split = Literal["train", "test"]

METRICS: dict[Kind, str] = {"labels": "accuracy", "free": "score", "regression": "r2"}

# How many of the commonest training answers a constant guesser may try; more changes no headline, only the time.
NUM_CONSTANTS = 20


class TaskError(ValueError):
    """Data or arguments that no task can be made of; the message is one line naming what and where."""


def near_names(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'a' or 'b'?" for the names in ``known`` that are close to ``name``, or ""."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(repr(one) for one in close)}?" if close else ""


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """Return the message of ``error`` on one line of at most ``limit`` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_counts(seed: int, **num_rows: int | None) -> None:
    """Raise TaskError unless ``seed`` is at least 0 and every row count is None or at least 1."""
    if seed < 0:
        raise TaskError(f"seed must be at least 0, got {seed}")
    for name, value in num_rows.items():
        if value is not None and value < 1:
            raise TaskError(f"{name} must be at least 1, got {value}")


def text_rows(
    rows: Sequence[tuple[str, str, str, int]],
    references: Sequence[list[str]] | None = None,
    units: Sequence[str] | None = None,
    num_choices: Sequence[int] | None = None,
    groups: Sequence[str] | None = None,
) -> Dataset:
    """Make the rows of a text task, in memory.

    Args:
        rows: (context, question, answer, row) each.
        references: What each row's answers are judged against, where that is not its one answer.
        units: The question that each row is a part of, where several rows make one.
        num_choices: How many of the task's labels each row may choose from, where not all.
        groups: The group of each row, of which none stands on both sides of a split; "" for none.

    Returns:
        A table with the columns context, question, answer (strings), row (int64) and, where given, references (lists
        of strings), unit (string), num_choices (int64) and group (string).
    """
    from datasets import Dataset, Features, Value

    names = ("context", "question", "answer")
    features: dict[str, Any] = {**{name: Value("string") for name in names}, "row": Value("int64")}
    columns: dict[str, list[Any]] = dict(
        zip([*names, "row"], map(list, zip(*rows, strict=True) if rows else [()] * 4), strict=True)
    )
    for name, values, feature in (
        ("references", references, [Value("string")]),
        ("unit", units, Value("string")),
        ("num_choices", num_choices, Value("int64")),
        ("group", groups, Value("string")),
    ):
        if values is not None:
            columns[name], features[name] = list(values), feature
    return Dataset.from_dict(columns, features=Features(features))


class Task(abc.ABC):
    """One task of a sequence.

    A constructor keeps its arguments and rejects contradictions; ``prepare`` does the reading or generating. Both
    raise TaskError. The same arguments give the same rows in every process.

    Attributes:
        kind: "labels", "free" or "regression".
        metric: The headline metric's name: "accuracy", "score" or "r2".
        higher_is_better: The metric's direction.
        instruction: What to do, said once for all rows; may be "". ``prepare`` may fill it in.
        labels: The allowed answers of a "labels" task in a fixed order, None otherwise.
    """

    kind: Kind
    higher_is_better: ClassVar[bool] = True
    instruction: str
    labels: list[str] | None = None
    _splits: dict[Split, Dataset] | None = None
    _constant_score: float | None = None

    @property
    def metric(self) -> str:
        """The headline metric's name."""
        return METRICS[self.kind]

    def prepare(self) -> None:
        """Read or generate, check and split the rows, once.

        Raises:
            TaskError: If the data cannot be had or do not fit the task; one line.
        """
        if self._splits is None:
            self._splits = self._build()

    def rows(self, split: Split) -> Dataset:
        """Return the rows of ``split``, prepared when needed.

        Args:
            split: "train" or "test".

        Returns:
            Kinds "labels" and "free": columns context (str, may be cut when too long), question (str, never cut),
            answer (str) and row (int, the row's index within its source); where a task has them, also references
            (list of str: what answers are judged against), unit (str: rows of one are one question), group (str: rows
            of one never stand on both sides of a split; "" for none) and num_choices (int: the row chooses among so
            many of the first labels). Kind "regression": columns x (list of float32),
            y (float32) and row.
        """
        self.prepare()
        assert self._splits is not None
        if split not in self._splits:
            raise TaskError(f"no split {split!r}; there are 'train' and 'test'")
        return self._splits[split]

    def score_answer(self, row: Mapping[str, Any], text: str) -> float:
        """Judge an answer.

        Args:
            row: A row as ``rows`` gives it.
            text: What was answered; whitespace around it does not count.

        Returns:
            The score in [0, 1]; here 1.0 for the row's own answer and 0.0 for any other.
        """
        return float(text.strip() == row["answer"])

    def further_scores(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, float]:
        """Return what is reported beside the headline, by its name; higher is better.

        Args:
            rows: All rows that were scored.
            answers: The answer to each.
        """
        return {}

    def constant_score(self) -> float:
        """Return what the best constant answer earns on the test rows, in the headline metric.

        Labels: the share of the commonest test label. Free: the best mean score among the 20 commonest training
        answers and the empty-handed "?", so that a scorer's partial credit counts here too. Regression: R2 of 0.
        """
        if self._constant_score is None:
            self._constant_score = self._best_constant()
        return self._constant_score

    def description(self) -> dict[str, Any]:
        """Return the task's facts as plain JSON values, preparing it when needed."""
        return {
            "kind": self.kind,
            "train_rows": len(self.rows("train")),
            "test_rows": len(self.rows("test")),
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "instruction": self.instruction,
            "labels": self.labels,
            "constant_score": self.constant_score(),
            **self._facts(),
        }

    def mean_score(self, text: str) -> float:
        """Return what ``text`` earns when it is given for every test row."""
        test = self.rows("test").to_list()
        return sum(self.score_answer(row, text) for row in test) / len(test)

    @abc.abstractmethod
    def _build(self) -> dict[Split, Dataset]:
        """Read or generate the rows of both splits."""

    def _facts(self) -> dict[str, Any]:
        """Return what ``description`` adds for this kind of task."""
        return {}

    def _best_constant(self) -> float:
        if self.kind == "regression":
            return 0.0
        if self.kind == "labels":
            answers = self.rows("test")["answer"][:]
            return Counter(answers).most_common(1)[0][1] / len(answers)
        commonest = Counter(self.rows("train")["answer"][:]).most_common(NUM_CONSTANTS)
        return max(self.mean_score(text) for text in [*(answer for answer, _ in commonest), "?"])

"""Procedural reasoning tasks from the reasoning-gym library: seeded, without a download, judged by its own scorers.

Source: Stojanovski et al., "Reasoning Gym: Reasoning Environments for RL with Verifiable Rewards", 2025,
https://github.com/open-thought/reasoning-gym.

Rows come from ONE dataset and are split by index. In that library, row i of seed s is row i-1 of seed s+1 for nearly
every dataset, so a train and a test set made from neighbouring seeds share almost all their rows.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tasks.base import Split, Task, TaskError, check_counts, near_names, one_line, text_rows

if TYPE_CHECKING:
    from datasets import Dataset

_HASH_SEED = "its rows change with PYTHONHASHSEED, so no two runs have the same"
_PROCESS = "its rows change from one process to the next, whatever the seed"

# Found by generating every dataset of version 0.1.25 in several processes and comparing the rows.
UNUSABLE: dict[str, str] = {
    "codeio": _PROCESS,
    "intermediate_integration": _PROCESS,
    "isomorphic_strings": _HASH_SEED,
    "knight_swap": _HASH_SEED,
    "polynomial_multiplication": _HASH_SEED,
    "ransom_note": _HASH_SEED,
    "word_ladder": _HASH_SEED,
    "list_functions": "its rows change each time they are read (it draws from Python's global generator)",
    "composite": "it mixes other datasets; give each of them a stage of its own",
}

# Rows on offer. A fixed floor, because a few datasets (acre) lay out their rows by the size asked for: with it, the
# test rows stay the same whatever the number of training rows.
_MIN_SIZE = 5000


class ReasoningTask(Task):
    """A dataset of reasoning-gym as a task with free answers.

    The question is the library's own prompt, whole (it may say how to answer, such as "Answer Yes or No"), and is
    never cut; the context is empty. The answer is the library's reference answer: a word or a number for
    family_relationships, aiw, syllogism and letter_counting.

    The score is the mean of the library's own scorer, in [0, 1], whitespace around the answer removed. It is not an
    exact-match rate: the default scorer also gives len(answer) / len(text) to a text that merely contains the answer
    ("6." earns 0.5 where "6" is right), a few give 0.01 to 0.05 to any non-empty text, and letter case counts in
    most. ``description()["wrong_answer_score"]`` says what a meaningless answer earns, and ``constant_score`` what
    the best constant one does. A text on which the scorer itself fails earns 0.

    Args:
        dataset: The dataset's name in reasoning-gym, such as "syllogism".
        instruction: What to do, said once for all rows; may be "".
        train_rows: Number of training rows. Changing it leaves the test rows as they are.
        test_rows: Number of test rows.
        seed: Seed of the generated rows, at least 0.
        params: Further parameters of the dataset's config class, such as ``{max_words: 10}``.
        answer_map: What to answer in the place of each of the library's answers, such as ``{"Yes": "No", "No":
            "Yes"}``: the same questions, another meaning. It has to name them all; a text that is none of its answers
            then earns 0.

    Raises:
        TaskError: For a dataset whose rows cannot be reproduced, a count below 1, "seed"/"size" among ``params``, or
            one answer for two in ``answer_map``.
    """

    kind = "free"

    def __init__(
        self,
        dataset: str,
        instruction: str = "",
        train_rows: int = 512,
        test_rows: int = 200,
        seed: int = 0,
        params: dict[str, Any] | None = None,
        answer_map: dict[str, str] | None = None,
    ) -> None:
        check_counts(seed, train_rows=train_rows, test_rows=test_rows)
        if dataset in UNUSABLE:
            raise TaskError(f"reasoning-gym dataset {dataset!r} cannot be used: {UNUSABLE[dataset]}")
        taken = sorted({"seed", "size"} & set(params or {}))
        if taken:
            raise TaskError(f"params of dataset {dataset!r} may not hold {taken[0]!r}: the task's own arguments set it")
        self.dataset = dataset
        self.instruction = instruction
        self.train_rows = train_rows
        self.test_rows = test_rows
        self.seed = seed
        self.params = dict(params or {})
        self.answer_map = answer_map
        self._mapped_back = {new: old for old, new in (answer_map or {}).items()}
        if len(self._mapped_back) < len(answer_map or {}):
            raise TaskError(f"answer_map of dataset {dataset!r} gives one answer in the place of two")
        self._source: Any = None
        self._entries: list[dict[str, Any]] = []

    def score_answer(self, row: Mapping[str, Any], text: str) -> float:
        """Judge an answer with the library's scorer for this dataset.

        Args:
            row: A row as ``rows`` gives it, or any mapping with its ``row`` index.
            text: What was answered; whitespace around it does not count.

        Returns:
            The scorer's own value in [0, 1]; partial credit included.
        """
        self.prepare()
        entry, text = self._entries[row["row"]], text.strip()
        if self.answer_map is not None:
            if text not in self._mapped_back:
                return 0.0
            text = self._mapped_back[text]
        try:
            score = float(self._source.score_answer(text, entry))
        except Exception:  # some of the library's scorers raise on text that they cannot parse (prime_factorization)
            return 0.0
        return min(max(score, 0.0), 1.0)

    def _build(self) -> dict[Split, Dataset]:
        self._source = self._create(max(_MIN_SIZE, 4 * (self.train_rows + self.test_rows)))
        # The test rows come first, so that their number alone decides which they are.
        self._entries = self._unique_entries(self.test_rows + self.train_rows)
        rows = [("", e["question"].strip(), self._answer(e["answer"]), i) for i, e in enumerate(self._entries)]
        return {"train": text_rows(rows[self.test_rows :]), "test": text_rows(rows[: self.test_rows])}

    def _answer(self, answer: str) -> str:
        """Return what to answer in the place of the library's ``answer``."""
        if self.answer_map is None:
            return answer
        if answer not in self.answer_map:
            raise TaskError(f"answer_map of dataset {self.dataset!r} says nothing of the answer {answer!r}")
        return self.answer_map[answer]

    def _create(self, size: int) -> Any:
        """Make the library's dataset object with ``size`` rows on offer."""
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise TaskError(
                f"dataset {self.dataset!r} needs the package reasoning-gym, which cannot be imported "
                f"({one_line(error)}): pip install reasoning-gym (it builds pycosat, so a C compiler such as gcc must "
                "be installed)"
            ) from None
        if self.dataset not in DATASETS:
            near = near_names(self.dataset, DATASETS)
            raise TaskError(f"reasoning-gym has no dataset {self.dataset!r}{near} ({len(DATASETS)} are known)")
        known = [field.name for field in dataclasses.fields(DATASETS[self.dataset][1])]
        for name in self.params:
            if name not in known:
                near = near_names(name, known)
                raise TaskError(f"reasoning-gym dataset {self.dataset!r} has no parameter {name!r}{near}")
        try:
            return reasoning_gym.create_dataset(self.dataset, size=size, seed=self.seed, **self.params)
        except Exception as error:  # the library checks its configs by assert, and by whatever its generators raise
            raise TaskError(f"reasoning-gym dataset {self.dataset!r} refuses its params: {one_line(error)}") from None

    def _unique_entries(self, num_wanted: int) -> list[dict[str, Any]]:
        """Return the first ``num_wanted`` entries that ask different questions.

        Raises:
            TaskError: If the dataset runs out of questions, fails, or gives no reference answer to train on.
        """
        found: dict[str, dict[str, Any]] = {}
        for index in range(len(self._source)):
            try:
                entry = self._source[index]
            except Exception as error:
                what = one_line(error) or type(error).__name__
                raise TaskError(f"reasoning-gym dataset {self.dataset!r} fails at row {index}: {what}") from None
            if not isinstance(entry["answer"], str) or not entry["answer"].strip():
                raise TaskError(f"reasoning-gym dataset {self.dataset!r} gives no answer to train on (row {index})")
            found.setdefault(" ".join(entry["question"].split()), entry)
            if len(found) == num_wanted:
                return list(found.values())
        raise TaskError(
            f"reasoning-gym dataset {self.dataset!r} has too few different questions: {num_wanted} wanted "
            f"(train_rows {self.train_rows} + test_rows {self.test_rows}), {len(found)} found among "
            f"{len(self._source)} rows"
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "params": self.params,
            "answer_map": self.answer_map,
            "seed": self.seed,
            "library": f"reasoning-gym {importlib.metadata.version('reasoning-gym')}",
            "wrong_answer_score": self.mean_score("?"),
        }

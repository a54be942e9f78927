"""Text tasks from tables: a label or a free answer for a context and a question, from files or the Hub."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.base import NUM_CONSTANTS, Split, Task, TaskError, check_counts, near_names
from tasks.choices import Choices
from tasks.judges import ExactMatch, Judge
from tasks.measures import FOR_LABELS, MEASURES
from tasks.readings import Reading, checked_labels, names_by_value, only_value, parse_columns, read
from tasks.tables import SUFFIXES, Field, Table, chunks, read_file, read_folder, read_hub

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK_ROWS = 1000
# Each draw has a stream of its own, so that asking for more of one thing leaves the others as they are.
_SPLIT_STREAM, _TEST_STREAM, _TRAIN_STREAM = 0, 1, 2


class TextTask(Task):
    """A table of texts as a task, with labels or free answers.

    The rows come from ``path`` (a Hub id, a local file, or a local folder of split files), or from ``train_file`` and
    ``test_file``. One table alone (no ``test_file``, a ``path`` that is a file, or an empty ``test_split``) is split by
    the task itself, by group where there is one. Training rows that share their context and question (whitespace
    aside), or their group, with any row of the test table are dropped and counted (``dropped_shared_rows``, among the
    rows looked at until ``train_rows`` are found); the test table stays whole.

    With ``labels`` or ``label_names`` every answer must be among the labels and the metric is accuracy. Without, the
    answers are free and ``judge`` scores them, by default 1 for the same text, letter case and surrounding whitespace
    aside, else 0.

    Args:
        path: Hub id such as "fancyzhx/ag_news", or local file or folder.
        name: The Hub data set's configuration, such as "sst2"; for a local folder its sub-folder or file prefix.
        train_split: The split of ``path`` to train on.
        test_split: The split of ``path`` to test on; "" splits ``train_split`` instead.
        test_name: The configuration that ``test_split`` is taken from, where it is another than ``name``.
        train_file: Local parquet, json, jsonl, csv or tsv file to train on, in place of ``path``.
        test_file: Local file to test on; null splits ``train_file``.
        folder: Folder that a relative ``path``, ``train_file`` and ``test_file`` start from; "" for the working
            directory. With a folder, ``path`` is local.
        columns: What each role is taken from: answer, context and question (one of the two at least), group (rows of
            one group, such as a passage, never stand on both sides), instruction, references (what free answers are
            judged against, in place of the answer: a list of accepted answers, or tests), unit (rows of one unit are
            one question, for ``measures``). Each is a column's name or a template, as in "Premise: {premise}"; in
            one, "{tests:;}" writes a list with ; between its items. A long input is cut in its context, never in its
            question. Null takes tables of the form input, target and, if there, instruction.
        instruction: What to do, said once for all rows. "" takes the instruction column, which must then hold one
            value only, or stays empty without such a column.
        labels: The allowed answers, in a fixed order; null for free answers.
        label_names: The label of each raw value, such as {0: "World", 1: "Sports"}, or a list for 0, 1, ...; without
            ``labels``, its texts are the labels.
        choices: Where the table holds each row's choices; they are listed under its question, named by ``labels``.
        judge: What scores free answers; null for the exact match.
        measures: What is reported beside the headline, by names of ``tasks.measures``.
        longest_answer: Longest answer to train on, in characters; rows with a longer one are left out of training.
        train_rows: At most so many training rows, drawn by ``seed``; null takes all. Changing it leaves the test rows.
        test_rows: At most so many test rows, drawn by ``seed``; null takes all.
        test_fraction: Share of the rows that the task's own split keeps for testing, in (0, 1).
        seed: Seed of the split and the draws, at least 0.

    Raises:
        TaskError: For arguments that contradict each other.
    """

    def __init__(
        self,
        path: str = "",
        name: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
        test_name: str | None = None,
        train_file: str | None = None,
        test_file: str | None = None,
        folder: str = "",
        columns: dict[str, str] | None = None,
        instruction: str = "",
        labels: list[str] | None = None,
        label_names: dict[str | int | bool, str] | list[str] | None = None,
        choices: Choices | None = None,
        judge: Judge | None = None,
        measures: list[str] | None = None,
        longest_answer: int | None = None,
        train_rows: int | None = None,
        test_rows: int | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        check_counts(seed, train_rows=train_rows, test_rows=test_rows, longest_answer=longest_answer)
        if bool(path) == bool(train_file):
            raise TaskError("a text task takes its rows from path or from train_file: give one of the two")
        if test_file and not train_file:
            raise TaskError(f"test_file {test_file!r} goes with a train_file; with path, name the test_split")
        if train_file and (name or test_name):
            raise TaskError(f"name {name or test_name!r} goes with path, not with train_file {train_file!r}")
        same_table = test_split == train_split and test_name in (None, name)
        if same_table or (train_file and test_file == train_file):
            raise TaskError(
                'the test rows would be the training rows; to split them, leave out test_file or give test_split ""'
            )
        if not 0 < test_fraction < 1:
            raise TaskError(f"test_fraction must lie between 0 and 1, both excluded, got {test_fraction}")
        self.path = path
        self.name = name
        self.train_split = train_split
        self.test_split = test_split
        self.test_name = name if test_name is None else test_name
        self.train_file = train_file
        self.test_file = test_file
        self.folder = folder
        self.instruction = instruction
        self.train_rows = train_rows
        self.test_rows = test_rows
        self.test_fraction = test_fraction
        self.seed = seed
        self.choices = choices
        self.measures = list(measures or [])
        self.longest_answer = longest_answer
        self._fields = parse_columns(columns, choices is not None)
        self._own_columns = columns is not None
        self._label_names = names_by_value(label_names)
        self.labels = checked_labels(labels, self._label_names)
        self.kind = "free" if self.labels is None else "labels"
        self.judge = judge or ExactMatch()
        self._check_scoring(judge)
        self._sources: dict[str, str] = {}
        self._num_dropped = 0
        self._num_left_out: Counter[str] = Counter()

    def score_answer(self, row: Mapping[str, Any], text: str) -> float:
        """Judge an answer: a label by exact match with the row's own, whitespace aside, a free one by ``judge``.

        Args:
            row: A row as ``rows`` gives it.
            text: What was answered; letter case counts with labels.

        Returns:
            The score in [0, 1]; 1.0 or 0.0 for a label.
        """
        if self.kind == "labels":
            return super().score_answer(row, text)
        return self.judge.score(text, row.get("references") or [row["answer"]])

    def further_scores(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, float]:
        """Return the ``measures`` asked for."""
        return {name: MEASURES[name](rows, answers, self.labels or []) for name in self.measures}

    def _check_scoring(self, judge: Judge | None) -> None:
        """Raise TaskError for a judge, measures or choices that do not go with the kind of answers."""
        if self.labels is not None and judge is not None:
            raise TaskError(f"judge {type(judge).__name__} is for free answers, and the task has labels")
        if self.choices is not None and (self.labels is None or self._label_names):
            raise TaskError("choices need labels to name them, such as labels: [A, B, C, D], and no label_names")
        if self.choices is not None:
            self.choices.check()
        for name in self.measures:
            if name not in MEASURES:
                raise TaskError(f"no measure {name!r}{near_names(name, MEASURES)}; there are {', '.join(MEASURES)}")
            if (name in FOR_LABELS) != (self.labels is not None):
                raise TaskError(f"measure {name} is for {'labels' if name in FOR_LABELS else 'free answers'}")
            if name == "whole_question_accuracy" and "unit" not in self._fields:
                raise TaskError(f"measure {name} needs columns.unit, which says what rows are one question")

    def _build(self) -> dict[Split, Dataset]:
        if self.kind == "free":
            self.judge.check()
        tables = [table for table in self._tables() if table is not None]
        fields = self._checked_fields(tables)
        if not self.instruction and "instruction" in fields:
            self.instruction = only_value(tables, fields["instruction"])
        readings = [read(one, fields, self.labels, self._label_names, self.choices, self.seed) for one in tables]
        train, test = readings[0], readings[-1]
        if train is test:
            train_pool, test_pool = self._own_split(train.table, fields.get("group"))
        else:
            train_pool, test_pool = range(len(train)), range(len(test))
        seen_keys, seen_groups = test.identities(test_pool)
        test_chosen = self._test_rows(test, test_pool)
        train_chosen = self._unshared(train, train_pool, set(seen_keys), set(seen_groups) - {""})
        self._sources = {"train_source": train.table.source, "test_source": test.table.source}
        return {"train": train.dataset(sorted(train_chosen)), "test": test.dataset(sorted(test_chosen))}

    def _tables(self) -> tuple[Table, Table | None]:
        """Read the training table and, where there is one, the test table."""
        base = Path(self.folder).expanduser()
        if self.train_file:
            test = read_file(base / Path(self.test_file).expanduser()) if self.test_file else None
            return read_file(base / Path(self.train_file).expanduser()), test
        local = base / Path(self.path).expanduser()
        if local.is_dir():
            test = read_folder(local, self.test_name, self.test_split) if self.test_split else None
            return read_folder(local, self.name, self.train_split), test
        if local.exists() or self.folder or local.suffix in SUFFIXES or not re.fullmatch(_HUB_ID, self.path):
            return read_file(local), None
        test = read_hub(self.path, self.test_name, self.test_split) if self.test_split else None
        return read_hub(self.path, self.name, self.train_split), test

    def _checked_fields(self, tables: Sequence[Table]) -> dict[str, Field]:
        """Return the fields by role, every column of theirs being in every table."""
        fields = dict(self._fields)
        if not self._own_columns and any("instruction" not in table.names for table in tables):
            del fields["instruction"]  # the only column of the default form that a table may lack
        for table in tables:
            for field in [*fields.values(), *(self.choices.fields if self.choices else [])]:
                table.check(field)
        return fields

    def _own_split(self, table: Table, group: Field | None) -> tuple[list[int], list[int]]:
        """Split one table into training and test rows, whole groups at a time."""
        num_rows = len(table.data)
        # A row without a group is a group of its own; the tag keeps its number apart from a group of that name.
        units: dict[Any, list[int]] = {}
        for row, name in enumerate(table.texts(group, range(num_rows))):
            units.setdefault(("group", name) if name else ("row", row), []).append(row)
        if len(units) < 2:
            what = f"one {group.spec!r} only" if group else "one row only"
            raise TaskError(f"{table.source} holds {what}: it cannot be split into training and test rows")
        members = list(units.values())
        order = np.random.default_rng([self.seed, _SPLIT_STREAM]).permutation(len(members))
        test: list[int] = []
        for unit in order[:-1]:  # the last one trains, whatever the fraction
            if len(test) >= max(1, round(self.test_fraction * num_rows)):
                break
            test += members[unit]
        return sorted(set(range(num_rows)) - set(test)), sorted(test)

    def _drawn(self, pool: Sequence[int], limit: int | None, stream: int) -> list[int]:
        """Return ``pool`` in the order of its seeded draw; as it stands when all of it is wanted."""
        if limit is None:
            return list(pool)
        return np.random.default_rng([self.seed, stream]).permutation(np.asarray(pool)).tolist()

    def _usable(self, reading: Reading, rows: Sequence[int], longest_answer: int | None = None) -> Iterator[bool]:
        """Say of each of ``rows`` whether its answers can be judged, and its own is short enough to train on."""
        for row, references in zip(rows, reading.references(rows), strict=True):
            fits = longest_answer is None or len(reading.answers[row]) <= longest_answer
            judged = self.kind == "labels" or any(self.judge.can_judge(reference) for reference in references)
            yield fits and judged

    def _test_rows(self, test: Reading, pool: Sequence[int]) -> list[int]:
        """Draw the test rows from ``pool``, passing over and counting those that cannot be judged."""
        chosen: list[int] = []
        for chunk in chunks(self._drawn(pool, self.test_rows, _TEST_STREAM), _CHUNK_ROWS):
            for row, usable in zip(chunk, self._usable(test, chunk), strict=True):
                if len(chosen) == self.test_rows:
                    return chosen
                if usable:
                    chosen.append(row)
                else:
                    self._num_left_out["test"] += 1
        if not chosen:
            raise TaskError(f"{test.table.source}: the judge {type(self.judge).__name__} cannot judge any row's answer")
        return chosen

    def _unshared(self, train: Reading, pool: Sequence[int], keys: set[bytes], groups: set[str]) -> list[int]:
        """Draw the training rows from ``pool``, passing over and counting those shared with the test table or unfit."""
        chosen: list[int] = []
        for chunk in chunks(self._drawn(pool, self.train_rows, _TRAIN_STREAM), _CHUNK_ROWS):
            usable = self._usable(train, chunk, self.longest_answer)
            for row, key, group, fit in zip(chunk, *train.identities(chunk), usable, strict=True):
                if len(chosen) == self.train_rows:
                    return chosen
                if key in keys or group in groups:
                    self._num_dropped += 1
                elif not fit:
                    self._num_left_out["train"] += 1
                else:
                    chosen.append(row)
        if not chosen:
            why = "has an answer that is too long or cannot be judged, or " if self._num_left_out["train"] else ""
            raise TaskError(
                f"{train.table.source}: every training row {why}shares its text or its group with a test row"
            )
        return chosen

    def _best_constant(self) -> float:
        if self.kind == "labels":
            return super()._best_constant()
        constants = Counter(self.judge.constant(answer) for answer in self.rows("train")["answer"][:])
        if None in constants:
            return 0.0
        return max(self.mean_score(text) for text in [*(text for text, _ in constants.most_common(NUM_CONSTANTS)), "?"])

    def _facts(self) -> dict[str, Any]:
        facts = {**self._sources, "dropped_shared_rows": self._num_dropped, "seed": self.seed}
        if self.kind == "free":
            left_out = {split: self._num_left_out[split] for split in ("train", "test")}
            facts |= {"left_out_rows": left_out, **self.judge.facts()}
        return facts


_HUB_ID = r"[\w.-]+(/[\w.-]+)?"

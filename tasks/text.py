"""Text tasks from tables: a label or a free answer for a context and a question, from files or the Hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.base import Split, Task, TaskError, check_counts, near_names, text_rows
from tasks.tables import SUFFIXES, Field, Table, chunks, read_file, read_folder, read_hub

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = ("context", "question", "answer", "group", "instruction")
DEFAULT_COLUMNS = {"context": "input", "answer": "target", "instruction": "instruction"}

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
    answers are free and the score is 1 for the same text, letter case and surrounding whitespace aside, else 0.

    Args:
        path: Hub id such as "fancyzhx/ag_news", or local file or folder.
        name: The Hub data set's configuration, such as "sst2"; for a local folder its sub-folder or file prefix.
        train_split: The split of ``path`` to train on.
        test_split: The split of ``path`` to test on; "" splits ``train_split`` instead.
        train_file: Local parquet, json, jsonl, csv or tsv file to train on, in place of ``path``.
        test_file: Local file to test on; null splits ``train_file``.
        folder: Folder that a relative ``path``, ``train_file`` and ``test_file`` start from; "" for the working
            directory. With a folder, ``path`` is local.
        columns: What each role is taken from: answer, context and question (one of the two at least), group (rows of
            one group, such as a passage, never stand on both sides), instruction. Each is a column's name or a
            template, as in "Premise: {premise}". A long input is cut in its context, never in its question. Null
            takes tables of the form input, target and, if there, instruction.
        instruction: What to do, said once for all rows. "" takes the instruction column, which must then hold one
            value only, or stays empty without such a column.
        labels: The allowed answers, in a fixed order; null for free answers.
        label_names: The label of each raw value, such as {0: "World", 1: "Sports"}, or a list for 0, 1, ...; without
            ``labels``, its texts are the labels.
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
        train_file: str | None = None,
        test_file: str | None = None,
        folder: str = "",
        columns: dict[str, str] | None = None,
        instruction: str = "",
        labels: list[str] | None = None,
        label_names: dict[str | int | bool, str] | list[str] | None = None,
        train_rows: int | None = None,
        test_rows: int | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        check_counts(seed, train_rows=train_rows, test_rows=test_rows)
        if bool(path) == bool(train_file):
            raise TaskError("a text task takes its rows from path or from train_file: give one of the two")
        if test_file and not train_file:
            raise TaskError(f"test_file {test_file!r} goes with a train_file; with path, name the test_split")
        if train_file and name:
            raise TaskError(f"name {name!r} goes with path, not with train_file {train_file!r}")
        if test_split == train_split or (train_file and test_file == train_file):
            raise TaskError(
                'the test rows would be the training rows; to split them, leave out test_file or give test_split ""'
            )
        if not 0 < test_fraction < 1:
            raise TaskError(f"test_fraction must lie between 0 and 1, both excluded, got {test_fraction}")
        self.path = path
        self.name = name
        self.train_split = train_split
        self.test_split = test_split
        self.train_file = train_file
        self.test_file = test_file
        self.folder = folder
        self.instruction = instruction
        self.train_rows = train_rows
        self.test_rows = test_rows
        self.test_fraction = test_fraction
        self.seed = seed
        self._fields = _parse_columns(columns)
        self._own_columns = columns is not None
        self._label_names = _names_by_value(label_names)
        self.labels = _checked_labels(labels, self._label_names)
        self.kind = "free" if self.labels is None else "labels"
        self._sources: dict[str, str] = {}
        self._num_dropped = 0

    def score_answer(self, row: Mapping[str, Any], text: str) -> float:
        """Judge an answer by exact match with the row's own, whitespace around it aside.

        Args:
            row: A row as ``rows`` gives it.
            text: What was answered; letter case counts with labels and does not with free answers.

        Returns:
            1.0 or 0.0.
        """
        given, right = text.strip(), row["answer"]
        return float(given.casefold() == right.casefold() if self.kind == "free" else given == right)

    def _build(self) -> dict[Split, Dataset]:
        train, test = self._tables()
        tables = [train] if test is None else [train, test]
        fields = self._checked_fields(tables)
        if not self.instruction and "instruction" in fields:
            self.instruction = _only_value(tables, fields["instruction"])
        answers = [self._answers(table, fields["answer"]) for table in tables]
        if test is None:
            test, (train_pool, test_pool) = train, self._own_split(train, fields.get("group"))
        else:
            train_pool, test_pool = range(len(train.data)), range(len(test.data))
        seen_keys, seen_groups = _identities(test, fields, test_pool)
        test_chosen = self._drawn(test_pool, self.test_rows, _TEST_STREAM)[: self.test_rows]
        train_chosen = self._unshared(train, fields, train_pool, set(seen_keys), set(seen_groups) - {""})
        self._sources = {"train_source": train.source, "test_source": test.source}
        return {
            "train": _text_table(train, fields, answers[0], sorted(train_chosen)),
            "test": _text_table(test, fields, answers[-1], sorted(test_chosen)),
        }

    def _tables(self) -> tuple[Table, Table | None]:
        """Read the training table and, where there is one, the test table."""
        base = Path(self.folder).expanduser()
        if self.train_file:
            test = read_file(base / Path(self.test_file).expanduser()) if self.test_file else None
            return read_file(base / Path(self.train_file).expanduser()), test
        local = base / Path(self.path).expanduser()
        if local.is_dir():
            test = read_folder(local, self.name, self.test_split) if self.test_split else None
            return read_folder(local, self.name, self.train_split), test
        if local.exists() or self.folder or local.suffix in SUFFIXES or not re.fullmatch(_HUB_ID, self.path):
            return read_file(local), None
        test = read_hub(self.path, self.name, self.test_split) if self.test_split else None
        return read_hub(self.path, self.name, self.train_split), test

    def _checked_fields(self, tables: Sequence[Table]) -> dict[str, Field]:
        """Return the fields by role, every column of theirs being in every table."""
        fields = dict(self._fields)
        if not self._own_columns and any("instruction" not in table.names for table in tables):
            del fields["instruction"]  # the only column of the default form that a table may lack
        for table in tables:
            for field in fields.values():
                table.check(field)
        return fields

    def _answers(self, table: Table, field: Field) -> list[str]:
        """Return the answer of every row, as a label where the task has labels."""
        raw = table.texts(field, range(len(table.data)))
        for row, value in enumerate(raw):
            if not value:
                raise TaskError(f"{table.source} row {row} has no answer (column {field.spec!r} is empty)")
        if self.labels is None:
            return raw
        known = self._label_names or {label: label for label in self.labels}
        for row, value in enumerate(raw):
            if value not in known:
                hint = "label_names has no such value" if self._label_names else f"labels: {', '.join(self.labels)}"
                raise TaskError(f"{table.source} row {row}: label {value!r} is outside the list ({hint})")
        return [known[value] for value in raw]

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

    def _unshared(
        self, table: Table, fields: dict[str, Field], pool: Sequence[int], keys: set[bytes], groups: set[str]
    ) -> list[int]:
        """Draw the training rows from ``pool``, passing over and counting those that the test table shares."""
        chosen: list[int] = []
        self._num_dropped = 0
        for chunk in chunks(self._drawn(pool, self.train_rows, _TRAIN_STREAM), _CHUNK_ROWS):
            for row, key, group in zip(chunk, *_identities(table, fields, chunk), strict=True):
                if len(chosen) == self.train_rows:
                    return chosen
                if key in keys or group in groups:
                    self._num_dropped += 1
                else:
                    chosen.append(row)
        if not chosen:
            raise TaskError(f"{table.source}: every training row shares its text or its group with a test row")
        return chosen

    def _facts(self) -> dict[str, Any]:
        return {**self._sources, "dropped_shared_rows": self._num_dropped, "seed": self.seed}


_HUB_ID = r"[\w.-]+(/[\w.-]+)?"


def _parse_columns(columns: Mapping[str, str] | None) -> dict[str, Field]:
    given = DEFAULT_COLUMNS if columns is None else columns
    for role in given:
        if role not in ROLES:
            raise TaskError(f"columns has no role {role!r}{near_names(role, ROLES)}; there are {', '.join(ROLES)}")
    if "answer" not in given or not {"context", "question"} & set(given):
        raise TaskError("columns must name the answer and a context or a question")
    return {role: Field.parse(role, spec) for role, spec in given.items()}


def _names_by_value(label_names: Mapping[Any, str] | Sequence[str] | None) -> dict[str, str]:
    """Return the label of each raw value, the value as text: 0 and "0" are one, and so are true and "True"."""
    pairs = label_names.items() if isinstance(label_names, Mapping) else enumerate(label_names or [])
    return {str(value): label for value, label in pairs}


def _checked_labels(labels: Sequence[str] | None, names: Mapping[str, str]) -> list[str] | None:
    if labels is None and not names:
        return None
    checked = list(dict.fromkeys(names.values())) if labels is None else list(labels)
    for label in checked:
        if not isinstance(label, str) or not label or label != label.strip():
            raise TaskError(f"labels must be texts without whitespace around them, got {label!r}")
    if len(set(checked)) < len(checked) or len(checked) < 2:
        raise TaskError(f"labels must be two or more different texts, got {checked}")
    for value, label in names.items():
        if label not in checked:
            raise TaskError(f"label_names gives {label!r} for {value!r}, which is not among labels{checked}")
    return checked


def _only_value(tables: Sequence[Table], field: Field) -> str:
    """Return the one instruction of all rows of ``tables``."""
    first = tables[0].texts(field, [0])[0]
    for table in tables:
        for row, text in enumerate(table.texts(field, range(len(table.data)))):
            if text != first:
                raise TaskError(
                    f"{table.source} row {row}: column {field.spec!r} holds a second instruction, {text[:60]!r} beside "
                    f"{first[:60]!r}; a task has one"
                )
    return first


def _identities(table: Table, fields: dict[str, Field], rows: Sequence[int]) -> tuple[list[bytes], list[str]]:
    """Return what must not stand on both sides: a digest of each row's context and question, and its group."""
    contexts, questions = (table.texts(fields.get(role), rows) for role in ("context", "question"))
    texts = (f"{' '.join(c.split())}\n{' '.join(q.split())}" for c, q in zip(contexts, questions, strict=True))
    keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    return keys, table.texts(fields.get("group"), rows)


def _text_table(table: Table, fields: dict[str, Field], answers: Sequence[str], rows: Sequence[int]) -> Dataset:
    contexts, questions = (table.texts(fields.get(role), rows) for role in ("context", "question"))
    return text_rows([(c, q, answers[row], row) for c, q, row in zip(contexts, questions, rows, strict=True)])

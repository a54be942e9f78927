"""A table read as a task's rows: what each column means, checked, and the rows as context, question and answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.base import TaskError, near_names, text_rows
from tasks.choices import Choices, listed
from tasks.tables import Field, Table

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = ("context", "question", "answer", "group", "instruction", "references", "unit")
DEFAULT_COLUMNS = {"context": "input", "answer": "target", "instruction": "instruction"}


@dataclass
class Reading:
    """A table as a task reads it.

    Attributes:
        table: The table.
        fields: What each role is taken from.
        answers: The answer of every row, as a label where the task has labels.
        choices: The choices of every row in the order that a prompt lists them; None without choices.
        names: The labels that name the choices.
    """

    table: Table
    fields: dict[str, Field]
    answers: list[str]
    choices: list[list[str]] | None
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.answers)

    def texts(self, role: str, rows: Sequence[int]) -> list[str]:
        """Return the texts of a role, the question with its choices listed; empty ones where there is no such role."""
        found = self.table.texts(self.fields.get(role), rows)
        if role != "question" or self.choices is None:
            return found
        return [listed(text, self.choices[row], self.names) for text, row in zip(found, rows, strict=True)]

    def references(self, rows: Sequence[int]) -> list[list[str]]:
        """Return what answers to ``rows`` are judged against: the role's texts, or each row's own answer."""
        field = self.fields.get("references")
        return self.table.items(field, rows) if field else [[self.answers[row]] for row in rows]

    def identities(self, rows: Sequence[int]) -> tuple[list[bytes], list[str]]:
        """Return what must not stand on both sides: a digest of each row's context and question, and its group."""
        contexts, questions = (self.texts(role, rows) for role in ("context", "question"))
        texts = (f"{' '.join(c.split())}\n{' '.join(q.split())}" for c, q in zip(contexts, questions, strict=True))
        keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
        return keys, self.texts("group", rows)

    def dataset(self, rows: Sequence[int]) -> Dataset:
        """Return ``rows`` as ``Task.rows`` gives them."""
        contexts, questions = (self.texts(role, rows) for role in ("context", "question"))
        return text_rows(
            [(c, q, self.answers[row], row) for c, q, row in zip(contexts, questions, rows, strict=True)],
            references=self.references(rows) if "references" in self.fields else None,
            units=self.texts("unit", rows) if "unit" in self.fields else None,
            groups=self.texts("group", rows) if "group" in self.fields else None,
            num_choices=None if self.choices is None else [len(self.choices[row]) for row in rows],
        )


def read(
    table: Table,
    fields: dict[str, Field],
    labels: Sequence[str] | None,
    label_names: Mapping[str, str],
    choices: Choices | None,
    seed: int,
) -> Reading:
    """Read the answers of a table, and its choices where it has them.

    Raises:
        TaskError: A row has no answer, or one that is not among the labels or its choices.
    """
    rows = range(len(table.data))
    raw = table.texts(fields["answer"], rows)
    for row, value in enumerate(raw):
        if not value:
            raise TaskError(f"{table.source} row {row} has no answer (column {fields['answer'].spec!r} is empty)")
    if labels is None:
        return Reading(table, fields, raw, None, ())
    if choices is None:
        return Reading(table, fields, _as_labels(table, raw, labels, label_names), None, labels)
    stems = zip(*(table.texts(fields.get(role), rows) for role in ("context", "question")), strict=True)
    laid = [
        choices.laid_out("\n".join(stem), own, right, seed)
        for stem, (own, right) in zip(stems, choices.right(table, rows, raw, labels), strict=True)
    ]
    return Reading(table, fields, [labels[right] for _, right in laid], [own for own, _ in laid], labels)


def _as_labels(table: Table, raw: Sequence[str], labels: Sequence[str], names: Mapping[str, str]) -> list[str]:
    known = names or {label: label for label in labels}
    for row, value in enumerate(raw):
        if value not in known:
            hint = "label_names has no such value" if names else f"labels: {', '.join(labels)}"
            raise TaskError(f"{table.source} row {row}: label {value!r} is outside the list ({hint})")
    return [known[value] for value in raw]


def parse_columns(columns: Mapping[str, str] | None, choices: bool = False) -> dict[str, Field]:
    """Return the field of every role; ``choices`` stand in a question of their own."""
    given = DEFAULT_COLUMNS if columns is None else columns
    for role in given:
        if role not in ROLES:
            raise TaskError(f"columns has no role {role!r}{near_names(role, ROLES)}; there are {', '.join(ROLES)}")
    if "answer" not in given or not (choices or {"context", "question"} & set(given)):
        raise TaskError("columns must name the answer and a context or a question")
    return {role: Field.parse(f"columns.{role}", spec) for role, spec in given.items()}


def names_by_value(label_names: Mapping[Any, str] | Sequence[str] | None) -> dict[str, str]:
    """Return the label of each raw value, the value as text: 0 and "0" are one, and so are true and "True"."""
    pairs = label_names.items() if isinstance(label_names, Mapping) else enumerate(label_names or [])
    return {str(value): label for value, label in pairs}


def checked_labels(labels: Sequence[str] | None, names: Mapping[str, str]) -> list[str] | None:
    """Return the labels of a task, None for free answers."""
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


def only_value(tables: Sequence[Table], field: Field) -> str:
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

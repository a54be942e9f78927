"""Multiple choice: a row's choices written under its question as lettered lines, and the letter that is right."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.base import TaskError
from tasks.tables import Field, Table


@dataclass(frozen=True)
class Choices:
    """Where a table holds the choices of its rows, and how it says which one is right.

    The task's labels name the choices, first to last; a row with fewer choices than labels is ranked among its own.

    Args:
        columns: One column or template that holds a list, such as "{choices[text]}", or one of each choice.
        answer: What the answer column holds: the right choice's "text", its "label" ("B"), its "index" from 0, or its
            "key" in ``key_column``.
        key_column: Column or template of the list of what the table itself calls the choices, which may differ from
            row to row.
        shuffle: Put the choices into an order drawn from the task's seed and the row's own text, so that a table that
            always gives the right one first does not give it away. A question has the same order in every table.
    """

    columns: list[str]
    answer: Literal["text", "label", "index", "key"] = "text"
    key_column: str | None = None
    shuffle: bool = False

    def check(self) -> None:
        """Raise TaskError for arguments that contradict each other."""
        if not self.columns:
            raise TaskError("choices.columns names no column")
        if (self.answer == "key") != (self.key_column is not None):
            raise TaskError("choices.answer 'key' goes with choices.key_column, and no other answer does")

    @property
    def fields(self) -> list[Field]:
        """The fields that the choices are taken from, the keys' among them."""
        keys = [Field.parse("choices.key_column", self.key_column)] if self.key_column else []
        return [*(Field.parse("choices.columns", spec) for spec in self.columns), *keys]

    def of(self, table: Table, rows: Sequence[int]) -> list[list[str]]:
        """Return the choices of ``rows``, in the table's order."""
        fields = self.fields[: len(self.columns)]
        found = [table.items(field, rows) for field in fields]
        return [[choice for items in columns for choice in items] for columns in zip(*found, strict=True)]

    def right(
        self, table: Table, rows: Sequence[int], answers: Sequence[str], names: Sequence[str]
    ) -> list[tuple[list[str], int]]:
        """Return of each of ``rows`` its choices and the place of the right one.

        Args:
            table: The table.
            rows: The rows.
            answers: What the answer column holds for each.
            names: The task's labels.

        Raises:
            TaskError: A row has fewer than two choices, more than there are names, or no right one among them.
        """
        choices = self.of(table, rows)
        known = table.items(self.fields[-1], rows) if self.key_column else choices
        found: list[tuple[list[str], int]] = []
        for row, own, keys, answer in zip(rows, choices, known, answers, strict=True):
            if not 2 <= len(own) <= len(names):
                raise TaskError(f"{table.source} row {row}: {len(own)} choices, and the task has {len(names)} labels")
            options = {"label": list(names), "index": [str(place) for place in range(len(own))]}.get(self.answer, keys)
            if answer not in options[: len(own)]:
                what = f"no {self.answer} of its {len(own)} choices"
                raise TaskError(f"{table.source} row {row}: the answer {answer[:60]!r} is {what}")
            found.append((own, options.index(answer)))
        return found

    def laid_out(self, question: str, choices: Sequence[str], right: int, seed: int) -> tuple[list[str], int]:
        """Return the choices in the order that a prompt lists them, and the place of the right one there."""
        order = list(range(len(choices)))
        if self.shuffle:
            # From the text, not the row: the same question in another table must not be listed in another order. And
            # from the choices sorted, so that the order drawn does not lean on where the table puts the right one.
            text = "\n".join([question, *sorted(choices)])
            order = sorted(order, key=lambda place: choices[place])
            random.Random(f"{seed}/{hashlib.sha256(text.encode()).hexdigest()}").shuffle(order)
        return [choices[place] for place in order], order.index(right)


def listed(question: str, choices: Sequence[str], names: Sequence[str]) -> str:
    """Return a question with its choices under it, a line each: "A: ..."."""
    lines = [f"{name}: {choice}" for name, choice in zip(names, choices, strict=False)]
    return "\n".join([question, *lines] if question else lines)

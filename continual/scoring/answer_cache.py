"""Answers that are known: what test rows came to under parts of the model that have not changed since.

A growing bank's slice is frozen once its stage is over. A row that is sent where it was sent before gets the answer,
and takes the routes, that it did then, up to rounding: it is not computed again. A label that was seen since may be
likelier than that answer: no label is likelier than it begins, which is noted of all labels of the run, and a row is
computed again where that leaves it open.

Rows are known from stage to stage and, by a file beside the tables, from a run that was killed to its resumption.

Shapes: N blocks, M atoms of the bank, A of these that a row went to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from continual.callbacks.routing import RouteRecorder, RouteSums
from continual.callbacks.scores import ScoreRecorder
from continual.errors import RunError, one_line
from continual.runtime import distributed
from continual.scoring.outcome import Outcome

if TYPE_CHECKING:
    from continual.data.batch import Row
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule

_TEXTS, _NUMBERS = pa.list_(pa.string()), pa.list_(pa.float64())
_SCHEMA = pa.schema(
    [("task", pa.string()), ("row", pa.int64()), ("parts", _TEXTS), ("value", pa.float64())]
    + [("prediction", pa.string()), ("seen_value", pa.float64()), ("generated_value", pa.float64())]
    + [("rivals", _TEXTS), ("atoms", pa.list_(pa.int32())), ("weights", _NUMBERS), ("entropy", _NUMBERS)]
    + [("tokens", pa.float64())]
)


@dataclass
class KnownRow:
    """What a row came to.

    Attributes:
        parts: What answered it.
        value, prediction, seen_value, generated_value, rivals: See ``Outcome``.
        atoms: The atoms that it went to, (A,).
        weights: Their weights summed over the prompt's tokens, block after block, (N x A,).
        entropy: Of its tokens' routes in each block, summed, (N,), in nats.
        tokens: Of its prompt.
    """

    parts: tuple[str, ...]
    value: float
    prediction: str
    seen_value: float | None
    generated_value: float | None
    rivals: tuple[str, ...]
    atoms: np.ndarray
    weights: np.ndarray
    entropy: np.ndarray
    tokens: float


@dataclass
class Known:
    """What need not be computed, as the recorders take it.

    Attributes:
        answers: Task -> what its rows came to, and the rows.
        routes: Task -> sums of their routes; None where nothing that is computed will be known later.
    """

    answers: dict[str, tuple[Outcome, list[dict[str, Any]]]]
    routes: dict[str, RouteSums] | None

    @property
    def rows(self) -> dict[str, set[int]]:
        """Task -> the rows, by their index."""
        return {name: set(outcome.rows) for name, (outcome, _) in self.answers.items()}


class KnownAnswers:
    """What the rows of a run's tasks came to, each as it was last computed."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, KnownRow]] = {}

    def of(self, module: AdaptedModule, tasks: Iterable[StageData], needed: Callable[[StageData], set[int]]) -> Known:
        """Return what is known of ``tasks``; all processes have to call it.

        A row for each process stays to be computed, so that none finds nothing to do.

        Args:
            module: Its strategy says where rows are sent.
            tasks: Those that are to be scored.
            needed: Says which rows of a task are to be computed in any case, by their index.
        """
        if (parts := module.strategy.answered_by(module)) is None:
            return Known({}, None)
        answers: dict[str, tuple[Outcome, list[dict[str, Any]]]] = {}
        routes: dict[str, RouteSums] = {}
        for data in tasks:
            before = self._rows.get(data.name, {})
            asked = before.keys() - needed(data)
            rows = [row for row in data.scored_rows if row.source["row"] in asked]
            # The first process's word for all: on a tie theirs may differ.
            sent = distributed.gathered(module.strategy.sent_to(module, rows))[0]
            answered = [(row, before[row.source["row"]], stage) for row, stage in zip(rows, sent, strict=True)]
            seen = set(data.seen_labels)
            holds = [each for each in answered if each[1].parts == parts[each[2]] and not seen & {*each[1].rivals}]
            if kept := holds[: len(data.scored_rows) - distributed.num_processes()]:
                answers[data.name], routes[data.name] = _together(kept)
        return Known(answers, routes)

    def learn(self, module: AdaptedModule, scores: ScoreRecorder, routes: RouteRecorder) -> None:
        """Take up what was just computed, out of the recorders."""
        parts = module.strategy.answered_by(module) or {}
        for task, sums in routes.computed.items():
            outcomes = {tuple(outcome.rows): outcome for outcome in scores.computed[task]}
            for batch in sums:  # the same batches, in another order
                rows = _rows_of(outcomes[tuple(batch.rows)], parts, batch)
                self._rows.setdefault(task, {}).update(rows)
        scores.computed, routes.computed = {}, {}

    # -- on disk ------------------------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        """Write all of it, where there is any."""
        if not self._rows:
            return
        table = [
            {"task": task, "row": row} | vars(known) for task, rows in self._rows.items() for row, known in rows.items()
        ]
        pq.write_table(pa.Table.from_pylist(table, schema=_SCHEMA), path, compression="zstd")

    def read(self, path: Path) -> None:
        """Take up what ``write`` wrote, if it wrote anything.

        Raises:
            RunError: The file is damaged.
        """
        self._rows = {}
        if not path.exists():
            return
        try:
            table = pq.read_table(path, schema=_SCHEMA).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"cannot read the known answers {path}: {one_line(error)}") from error
        for row in table:
            task, index = row.pop("task"), row.pop("row")
            row |= {name: tuple(row[name]) for name in ("parts", "rivals")}
            row |= {name: np.array(row[name]) for name in ("atoms", "weights", "entropy")}
            self._rows.setdefault(task, {})[index] = KnownRow(**row)


def _rows_of(outcome: Outcome, parts: dict[str, tuple[str, ...]], sums: RouteSums) -> dict[int, KnownRow]:
    """Return what each row of a batch came to."""
    assert outcome.stages is not None
    rows = {}
    weights_NBM, entropy_NB, tokens_B = sums.weights_NBM.numpy(), sums.entropy_NB.numpy(), sums.tokens_B.tolist()
    used_BM = np.any(weights_NBM, axis=0)
    for place, row in enumerate(outcome.rows):
        atoms = np.flatnonzero(used_BM[place])
        rows[row] = KnownRow(
            parts=parts[outcome.stages[place]],
            value=outcome.values[place],
            prediction=outcome.predictions[place],
            seen_value=_at(outcome.seen_values, place),
            generated_value=_at(outcome.generated_values, place),
            rivals=outcome.rivals[place] if outcome.rivals else (),
            atoms=atoms,
            weights=weights_NBM[:, place, atoms].flatten(),
            entropy=entropy_NB[:, place].copy(),
            tokens=tokens_B[place],
        )
    return rows


def _at(values: list[float] | None, place: int) -> float | None:
    return None if values is None else values[place]


def _together(
    kept: Sequence[tuple[Row, KnownRow, str]],
) -> tuple[tuple[Outcome, list[dict[str, Any]]], RouteSums]:
    """Return rows, with what they came to and the stage that each is sent to, as one batch."""
    rows, known, stages = zip(*kept, strict=True)
    indices = [row.source["row"] for row in rows]
    num_blocks, num_atoms = len(known[0].entropy), 1 + max(int(own.atoms.max()) for own in known)
    weights = torch.zeros(num_blocks, len(known), num_atoms, dtype=torch.float64)
    for place, own in enumerate(known):
        weights[:, place, torch.from_numpy(own.atoms)] = torch.from_numpy(own.weights).view(num_blocks, -1)
    entropy = torch.from_numpy(np.stack([own.entropy for own in known], axis=1))
    sums = RouteSums(indices, weights, entropy, torch.tensor([own.tokens for own in known], dtype=torch.float64))
    outcome = Outcome(
        rows=indices,
        values=[own.value for own in known],
        predictions=[own.prediction for own in known],
        targets=[row.source.get("y", row.source.get("answer")) for row in rows],
        seen_values=[own.value if own.seen_value is None else own.seen_value for own in known],
        generated_values=None if known[0].generated_value is None else [own.generated_value for own in known],
        stages=list(stages),
    )
    return (outcome, [row.source for row in rows]), sums

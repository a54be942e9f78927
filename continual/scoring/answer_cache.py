"""Cached answers: what test rows came to under parts of the model that have not changed since.

A growing bank's slice is frozen once its stage is over. A row that is sent where it was sent before gets the answer,
and takes the routes, that it did then, up to rounding: it is not computed again. A label that was seen since may be
likelier than that answer: no label is likelier than it begins, which is scored of all labels of the run, and a row is
computed again where that leaves it open.

The cache is a recorder, the first of the list. It leaves cached rows out of the test loaders, and gives their outcomes
to the other recorders as batches of their own, behind those that were computed. Rows are cached from stage to stage
and, by a file beside the tables, from a run that was killed to its resumption.

Shapes: N blocks, M atoms of the bank, A of these that a row went to.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from continual.data.label_tree import LabelTree
from continual.errors import RunError, one_line
from continual.interfaces import Recorder, StageContext
from continual.runtime import distributed
from continual.scoring.outcome import Outcome, RouteSums

if TYPE_CHECKING:
    from continual.data.batch import Row

_ROUNDING = 0.1
"""Nats, and more than that, by which a label's score differs from batch to batch (bfloat16)."""

_TEXTS, _NUMBERS = pa.list_(pa.string()), pa.list_(pa.float64())
_SCHEMA = pa.schema(
    [("task", pa.string()), ("row", pa.int64()), ("parts", _TEXTS), ("value", pa.float64())]
    + [("prediction", pa.string()), ("seen_value", pa.float64()), ("generated_value", pa.float64())]
    + [("rivals", _TEXTS), ("atoms", pa.list_(pa.int32())), ("weights", _NUMBERS), ("entropy", _NUMBERS)]
    + [("tokens", pa.float64())]
)


@dataclass
class CachedRow:
    """What a row came to.

    Attributes:
        parts: What answered it.
        value, prediction, seen_value, generated_value: See ``Outcome``.
        rivals: Labels of stages to come that might be likelier than its answer among all.
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


Batch = tuple[Outcome, list[dict[str, Any]]]
"""An outcome and its rows as they were read."""


class AnswerCache(Recorder):
    """What the rows of a run's tasks came to, each as it was last computed.

    For a strategy whose ``answering_parts`` says which parts answer a row and never change again.
    """

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, CachedRow]] = {}

    # -- one stage ----------------------------------------------------------------------------------------------------

    def begin(self, context: StageContext) -> None:
        """Begin a stage: labels to come are scored by how they begin."""
        self._context = context
        self._computed: dict[str, list[tuple[Outcome, RouteSums, list[tuple[str, ...]]]]] = {}
        self._cached: dict[str, Batch] = {}
        later = [label for data in context.stages[context.stage :] for label in data.task.labels or []]
        for data in context.stages:
            data.label_tree = functools.partial(_tree, later=later if data.score_seen_labels else [])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the cached rows out of the test loaders; all processes find the same."""
        if stage != "test":
            return
        self._cached = self._lookup()
        skip = {name: set(outcome.rows) for name, (outcome, _) in self._cached.items()}
        trainer.datamodule.skip = skip  # type: ignore[attr-defined]
        if count := sum(map(len, skip.values())):
            total = sum(len(data.scored_rows) for data in self._context.scored)
            print(f"  {count:,} of {total:,} test rows are answered as before", flush=True)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what a batch came to."""
        outcome: Outcome = outputs
        if (sums := outcome.route_sums) is not None:
            found = (outcome.without_tensors(), sums, _rivals(outcome, batch.get("label_tree")))
            self._computed.setdefault(self._context.scored[dataloader_idx].name, []).append(found)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the cached outcomes to the other recorders, as the last batches of their tasks; take up the new ones."""
        others = [recorder for recorder in self._context.recorders if recorder is not self]
        if distributed.is_first():
            for index, data in enumerate(self._context.scored):
                if data.name in self._cached:
                    outcome, rows = self._cached[data.name]
                    for recorder in others:
                        recorder.on_test_batch_end(trainer, pl_module, outcome, {"rows": rows}, -1, index)  # type: ignore[arg-type]
        parts = self._context.module.strategy.answering_parts(self._context.module)
        for computed in distributed.of_batches(self._computed, self._context.module):
            for task, batches in computed.items():
                for batch in batches:
                    self._rows.setdefault(task, {}).update(_rows_of(*batch, parts))
        self._computed, self._cached = {}, {}

    def _lookup(self) -> dict[str, Batch]:
        """Return the outcomes that still hold, by task; a row for each process stays to be computed."""
        module = self._context.module
        parts = module.strategy.answering_parts(module)
        found: dict[str, Batch] = {}
        for data in self._context.scored:
            before = self._rows.get(data.name, {})
            needed = set[int]().union(*(recorder.needed_rows(data) for recorder in self._context.recorders))
            rows = [row for row in data.scored_rows if row.source["row"] in before.keys() - needed]
            # The first process's word for all: on a tie theirs may differ.
            sent = distributed.gathered(module.strategy.answering_stages(module, rows))[0]
            answered = [(row, before[row.source["row"]], stage) for row, stage in zip(rows, sent, strict=True)]
            seen = set(data.seen_labels)
            holds = [each for each in answered if each[1].parts == parts[each[2]] and not seen & {*each[1].rivals}]
            if kept := holds[: len(data.scored_rows) - distributed.num_processes()]:
                found[data.name] = _as_batch(kept)
        return found

    # -- on disk ------------------------------------------------------------------------------------------------------

    def save(self, run_dir: Path) -> Sequence[Path]:
        """Write all of it, where there is any and a stage follows."""
        if not self._rows or self._context.is_last:
            return ()
        table = [
            {"task": task, "row": row} | vars(cached)
            for task, rows in self._rows.items()
            for row, cached in rows.items()
        ]
        path = _path(run_dir, self._context.stage)
        pq.write_table(pa.Table.from_pylist(table, schema=_SCHEMA), path, compression="zstd")
        return [path]

    def restore(self, run_dir: Path, stage: int) -> None:
        """Take up what ``save`` wrote, if it wrote anything.

        Raises:
            RunError: The file is damaged.
        """
        self._rows = {}
        if not (path := _path(run_dir, stage)).exists():
            return
        try:
            table = pq.read_table(path, schema=_SCHEMA, partitioning=None).to_pylist()  # type: ignore[arg-type]
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"cannot read the cached answers {path}: {one_line(error)}") from error
        for row in table:
            task, index = row.pop("task"), row.pop("row")
            row |= {name: tuple(row[name]) for name in ("parts", "rivals")}
            row |= {name: np.array(row[name]) for name in ("atoms", "weights", "entropy")}
            self._rows.setdefault(task, {})[index] = CachedRow(**row)

    def discard(self, run_dir: Path, stage: int) -> None:
        """Remove the file of a stage."""
        _path(run_dir, stage).unlink(missing_ok=True)


def _path(run_dir: Path, stage: int) -> Path:
    return run_dir / f"known-answers-{stage:02d}.parquet"


def _tree(backbone: Any, own: Sequence[str], others: Sequence[str], later: Sequence[str]) -> LabelTree:
    """Return the tree of labels with how those of stages to come begin."""
    return LabelTree.of(backbone, own, others).with_beginnings(backbone, later)


def _rivals(outcome: Outcome, tree: LabelTree | None) -> list[tuple[str, ...]]:
    """Return, for each row, the labels of stages to come that might be likelier than its answer among all."""
    if outcome.label_scores is None or tree is None:
        return [()] * len(outcome.rows)
    scores, most = outcome.label_scores.split([len(tree.names), len(tree.further)], dim=1)
    might_win = (most > scores.amax(dim=1, keepdim=True) - _ROUNDING).tolist()
    return [tuple(itertools.compress(tree.further, own)) for own in might_win]


def _rows_of(
    outcome: Outcome, sums: RouteSums, rivals: list[tuple[str, ...]], parts: dict[str, tuple[str, ...]]
) -> dict[int, CachedRow]:
    """Return what each row of a batch came to."""
    assert outcome.stages is not None
    rows = {}
    weights_NBM, entropy_NB, tokens_B = sums.weights_NBM.numpy(), sums.entropy_NB.numpy(), sums.tokens_B.tolist()
    used_BM = np.any(weights_NBM, axis=0)
    for place, row in enumerate(outcome.rows):
        atoms = np.flatnonzero(used_BM[place])
        rows[row] = CachedRow(
            parts=parts[outcome.stages[place]],
            value=outcome.values[place],
            prediction=outcome.predictions[place],
            seen_value=_at(outcome.seen_values, place),
            generated_value=_at(outcome.generated_values, place),
            rivals=rivals[place],
            atoms=atoms,
            weights=weights_NBM[:, place, atoms].flatten(),
            entropy=entropy_NB[:, place].copy(),
            tokens=tokens_B[place],
        )
    return rows


def _at(values: list[float] | None, place: int) -> float | None:
    return None if values is None else values[place]


def _as_batch(kept: Sequence[tuple[Row, CachedRow, str]]) -> Batch:
    """Return rows, with what they came to and the stage that each is sent to, as one batch."""
    rows, cached, stages = zip(*kept, strict=True)
    indices = [row.source["row"] for row in rows]
    num_blocks, num_atoms = len(cached[0].entropy), 1 + max(int(own.atoms.max()) for own in cached)
    weights = torch.zeros(num_blocks, len(cached), num_atoms, dtype=torch.float64)
    for place, own in enumerate(cached):
        weights[:, place, torch.from_numpy(own.atoms)] = torch.from_numpy(own.weights).view(num_blocks, -1)
    entropy = torch.from_numpy(np.stack([own.entropy for own in cached], axis=1))
    tokens = torch.tensor([own.tokens for own in cached], dtype=torch.float64)
    outcome = Outcome(
        rows=indices,
        values=[own.value for own in cached],
        predictions=[own.prediction for own in cached],
        targets=[row.source.get("y", row.source.get("answer")) for row in rows],
        seen_values=[own.value if own.seen_value is None else own.seen_value for own in cached],
        generated_values=None if cached[0].generated_value is None else [own.generated_value for own in cached],
        stages=list(stages),
        _sums=RouteSums(indices, weights, entropy, tokens),
    )
    return outcome, [row.source for row in rows]

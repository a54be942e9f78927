"""Rows on disk: the column schemas of a run's parquet tables, and how rows are appended, cut back and read.

Every table is tidy: one measured value a row, with the run, the seed, the stage it was measured after and the task it
belongs to. Summaries are never stored; ``analysis`` computes them from these rows. This module imports no torch, so
that a report can be drawn on a machine without it.

Conventions
    stage      0 = before any training, 1..T = after that stage
    block, atom, step, epoch, row   -1 = "over all of them" (the mean over blocks, say)
    atom       index in the bank; of a growing bank 0 = no slice in use, then each slice's atoms, in the slices' order
    direction  "higher" or "lower" is better, "none" for a measure that is neither
    count      rows (scores), tokens (routing, general) or parameters (gradients) that the value was computed from
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_KEYS = [("run", pa.string()), ("seed", pa.int64()), ("stage", pa.int64()), ("task", pa.string())]
_VALUE = [
    ("metric", pa.string()),
    ("direction", pa.string()),
    ("value", pa.float64()),
    ("count", pa.int64()),
]

_WORDING = [("wording", pa.string()), ("where", pa.string()), ("options", pa.string())]

SCHEMAS: dict[str, pa.Schema] = {
    # One value a metric, task and stage: the score matrix R[stage, task] and what stands beside it.
    "scores": pa.schema([*_KEYS, *_VALUE]),
    # One row a test row: what was answered, and what that answer earned (regression: the squared error).
    "answers": pa.schema([*_KEYS, ("row", pa.int64()), ("value", pa.float64()), ("prediction", pa.string())]),
    # metric "usage" (block >= 0, atom >= 0); "usage_entropy_nats", "token_entropy_nats" (atom = -1; block -1 = mean).
    "routing": pa.schema([*_KEYS, ("block", pa.int64()), ("atom", pa.int64()), *_VALUE]),
    # Usage of each half of a task's rows, beside which every distance between usages is read; NaN of a half of no row.
    "usage_halves": pa.schema(
        [*_KEYS, ("half", pa.int64()), ("block", pa.int64()), ("atom", pa.int64())]
        + [("value", pa.float64()), ("count", pa.int64())]
    ),
    # A few of the test rows' tokens and where they went: one row an atom that gets weight, in a block. ``place`` counts
    # the prompt's tokens, ``before`` is the text of those just before it: routing is causal, no later token is seen.
    "tokens": pa.schema(
        [*_KEYS, ("row", pa.int64()), ("place", pa.int64()), ("token", pa.string()), ("before", pa.string())]
        + [("block", pa.int64()), ("atom", pa.int64()), ("value", pa.float64())]
    ),
    # A finished run scored with one atom taken out of all blocks; atom -1: none is. Row -1: the score; else what the
    # row's answer earned, under the metric "answer" (regression: the squared error); "changed": the share of answers
    # that are others than with all atoms.
    "ablation": pa.schema([*_KEYS, ("atom", pa.int64()), ("row", pa.int64()), *_VALUE]),
    # Written by earlier versions; ``analysis`` derives both from usages.
    # metrics "js", "kl" of task against other; where other == task: "js_split_half", "kl_split_half", the null.
    "separation": pa.schema([*_KEYS, ("other", pa.string()), ("block", pa.int64()), *_VALUE]),
    # metrics "js", "kl", "tv" against the stage before (reference "previous") or the task's own (reference "trained").
    "drift": pa.schema(
        [*_KEYS, ("reference", pa.string()), ("reference_stage", pa.int64()), ("block", pa.int64()), *_VALUE]
    ),
    # Scores of the finished model under reworded prompts; where "prompt", "gate" or "both" got them, options "kept" ...
    "wordings": pa.schema([*_KEYS, *_WORDING, *_VALUE]),
    # What the answer to each test row earned under reworded prompts.
    "wording_answers": pa.schema([*_KEYS, *_WORDING, ("row", pa.int64()), ("value", pa.float64())]),
    # metric "log_likelihood_nats": the mean a token of untouched text, task "general" (count = tokens).
    "general": pa.schema([*_KEYS, *_VALUE]),
    # metrics "weights", "operator", "update", "summary": the largest observed / bound over a batch (callbacks.theory).
    "theory": pa.schema([*_KEYS, ("step", pa.int64()), ("epoch", pa.int64()), ("block", pa.int64()), *_VALUE]),
    # metrics "grad_norm" (layer = module name, or "bank"), "grad_concentration" and "train_loss" (layer = "").
    "gradients": pa.schema([*_KEYS, ("step", pa.int64()), ("epoch", pa.int64()), ("layer", pa.string()), *_VALUE]),
}


class RecordError(ValueError):
    """A table that cannot be read or a row that does not fit its schema; the message names the file."""


def path_of(run_dir: str | Path, table: str) -> Path:
    """Return where a table of the run in ``run_dir`` lies: one of ``SCHEMAS``, or one that a recorder has brought."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", table):
        raise RecordError(f"{table!r} is no name for a table: take small letters, digits and underscores")
    return Path(run_dir) / f"{table}.parquet"


def tables_of(run_dir: str | Path) -> list[str]:
    """Return the tables at hand in a run's directory that are none of ``SCHEMAS``, by name."""
    names = {path.stem for path in Path(run_dir).glob("*.parquet")}
    return sorted(name for name in names - set(SCHEMAS) if re.fullmatch(r"[a-z][a-z0-9_]*", name))


def written(run_dir: str | Path) -> list[str]:
    """Return every table of which a run's directory has a file, those of ``SCHEMAS`` first."""
    return [table for table in [*SCHEMAS, *tables_of(run_dir)] if path_of(run_dir, table).is_file()]


def append(
    run_dir: str | Path, table: str, rows: Iterable[Mapping[str, Any]], schema: pa.Schema | None = None
) -> pa.Table:
    """Append ``rows`` to a table, atomically: a reader or a crash sees the old file or the new one; return them.

    Args:
        run_dir: The run's directory.
        table: A key of ``SCHEMAS``, or the name of another table.
        rows: Mappings with exactly the schema's columns.
        schema: Columns of a table that is not in ``SCHEMAS``; by default those of the file at hand, or of ``rows``.

    Raises:
        RecordError: A row has other columns than the schema, or the file at hand cannot be read.
    """
    path, rows = path_of(run_dir, table), list(rows)
    schema = SCHEMAS.get(table) or schema or (_schema_of(path) if path.exists() else _inferred(path, rows))
    new = _table(path, schema, rows)
    _replace(path, pa.concat_tables([_read(path, schema), new]) if path.exists() else new)
    return new


def rewrite(run_dir: str | Path, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put ``rows`` in the place of the whole table, atomically."""
    path = path_of(run_dir, table)
    _replace(path, _table(path, SCHEMAS[table], rows))


def replace(run_dir: str | Path, table: str, rows: Iterable[Mapping[str, Any]], same: Sequence[str]) -> None:
    """Append ``rows`` as ``append`` does, in the place of rows that equal one of them in the columns ``same``."""
    path, schema = path_of(run_dir, table), SCHEMAS[table]
    new = _table(path, schema, rows)
    if path.exists():
        old = _read(path, schema)
        gone = set(_columns(new, same))
        kept = old.filter(pa.array([key not in gone for key in _columns(old, same)], pa.bool_()))
        new = pa.concat_tables([kept, new])
    _replace(path, new)


def truncate(run_dir: str | Path, last_stage: int) -> None:
    """Drop, from every table, the rows of stages after ``last_stage``: what an interrupted stage left behind."""
    for table in written(run_dir):
        kept = read_arrow(run_dir, table).filter(pc.field("stage") <= last_stage)
        _replace(path_of(run_dir, table), kept)


def read_arrow(run_dir: str | Path, table: str) -> pa.Table:
    """Read a table that is there; raises RecordError as ``read`` does."""
    return _read(path_of(run_dir, table), SCHEMAS.get(table))


def read(run_dir: str | Path, table: str) -> pd.DataFrame:
    """Read a table as a frame with the schema's columns; a table never written is an empty frame.

    Raises:
        RecordError: The file is cut short, is no parquet or has other columns; the message names it.
    """
    path, schema = path_of(run_dir, table), SCHEMAS.get(table)
    if path.exists():
        return _read(path, schema).to_pandas()
    if schema is None:
        raise _unknown(table)
    return schema.empty_table().to_pandas()


def _columns(table: pa.Table, names: Sequence[str]) -> list[tuple[Any, ...]]:
    return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))


def _unknown(table: str) -> RecordError:
    return RecordError(f"no table named {table!r}; there are {', '.join(SCHEMAS)}")


def _schema_of(path: Path) -> pa.Schema:
    return _read(path, None).schema


def _inferred(path: Path, rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """Return the columns of a table by its first rows: those of every table, then their own."""
    if not rows:
        raise _unknown(path.stem)
    keys = pa.schema(_KEYS)
    own = [name for name in rows[0] if name not in keys.names]
    rest = pa.Table.from_pylist([{name: row.get(name) for name in own} for row in rows]).schema
    if missing := [name for name in keys.names if name not in rows[0]]:
        raise RecordError(f"{path.name}: a row lacks {', '.join(missing)}")
    return pa.schema([*keys, *rest])


def _table(path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    rows = list(rows)
    for row in rows:
        if set(row) != set(schema.names):
            odd = sorted(set(row) ^ set(schema.names))
            raise RecordError(f"{path.name}: a row's columns differ from the schema in {', '.join(odd)}")
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def _read(path: Path, schema: pa.Schema | None) -> pa.Table:
    try:
        # Not partitioned: a folder named seed=1 is no column.
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)  # type: ignore[arg-type]
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
    if schema is not None and not table.schema.equals(
        schema
    ):  # reading by the schema would fill a column that is not there with nothing
        odd = sorted({str(column) for column in table.schema} ^ {str(column) for column in schema})
        raise RecordError(f"{path}: the file's columns differ from the schema in {', '.join(odd) or 'their order'}")
    return table


def _replace(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    os.replace(temporary, path)

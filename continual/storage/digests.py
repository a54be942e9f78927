"""What a run left on disk is what it wrote: digests in the manifest, compared before anything is read or cut back.

A table has a digest for the rows of each stage, since a run that was interrupted may have added rows of one more; any
other file has its size and its SHA-256. This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from continual.errors import RunError
from continual.storage import records
from continual.storage.manifest import FORMAT, Manifest


def of_rows(table: pa.Table) -> str:
    """Return the SHA-256 of a table's content; it does not depend on how the table lies in memory or in a file."""
    found = hashlib.sha256()
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        found.update(f"{name} {column.type} {len(column)}".encode())
        found.update(pc.is_null(column).to_numpy(zero_copy_only=False).tobytes())  # type: ignore[attr-defined]
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            found.update(pc.fill_null(column, 0).to_numpy(zero_copy_only=False).tobytes())
        elif pa.types.is_string(column.type):
            texts = [text.encode() for text in pc.fill_null(column, "").to_pylist()]
            found.update(json.dumps([len(text) for text in texts]).encode())
            found.update(b"".join(texts))
        else:
            found.update(json.dumps(column.to_pylist(), default=str).encode())
    return found.hexdigest()


def of_stages(rows: pa.Table) -> dict[str, str]:
    """Return the digest of a table's rows of each stage."""
    stages = sorted(pc.unique(rows.column("stage")).to_pylist())  # type: ignore[attr-defined]
    return {str(stage): of_rows(rows.filter(pc.field("stage") == stage)) for stage in stages}


def of_file(path: Path) -> list[int | str]:
    """Return a file's size in bytes and its SHA-256."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def note(run_dir: Path, state: Manifest, stage: int, written: Mapping[str, pa.Table], files: Iterable[Path]) -> None:
    """Put into a manifest, not committed yet, the digests of what was written after a stage.

    A run of an older version, without any so far, gets those of all that its tables hold.

    Args:
        run_dir: The run's directory.
        state: The manifest.
        stage: The stage.
        written: The rows that were added to each table.
        files: What resuming after the stage reads beside the tables: files, and folders with all that is in them.
    """
    known = state.tables if state.format >= FORMAT else {}
    state.format, state.tables = FORMAT, known or _digests(run_dir, records.written(run_dir))
    for table, rows in written.items():
        found = of_stages(rows)
        if state.tables.get(table, {}).keys() & found.keys():  # more rows of a stage that has some
            found = of_stages(records.read_arrow(run_dir, table))
        state.tables[table] = {**state.tables.get(table, {}), **found}
    found_files = [path for each in files for path in (sorted(each.rglob("*")) if each.is_dir() else [each])]
    state.files = {str(path.relative_to(run_dir)): of_file(path) for path in found_files if path.is_file()}


def note_tables(run_dir: Path, state: Manifest, tables: Iterable[str]) -> None:
    """Commit the digests of whole tables, which a command on a finished run has written."""
    if state.format < FORMAT:
        return
    state.tables |= _digests(run_dir, tables)
    state.commit(run_dir)


def check(run_dir: Path, state: Manifest) -> None:
    """Compare what is on disk with the manifest; a run of format 1 has no digests, and there is nothing to compare.

    Raises:
        RunError: A file is missing, or is not what the run wrote.
    """
    if state.format < FORMAT:
        return
    for table, expected in state.tables.items():
        path = records.path_of(run_dir, table)
        if not path.is_file():
            raise RunError(f"{path} is missing: it held rows of stage {_listed(expected)}")
        try:
            found = of_stages(records.read_arrow(run_dir, table))
        except records.RecordError as error:
            raise RunError(str(error)) from error
        for stage, digest in expected.items():
            if found.get(stage) != digest:
                raise RunError(f"{path} is not what the run wrote: its rows of stage {stage} differ")
    for table in (table for table in records.written(run_dir) if table not in state.tables):
        stages = set(records.read_arrow(run_dir, table).column("stage").to_pylist())
        if early := [str(stage) for stage in stages if stage <= state.finished_stage]:
            path = records.path_of(run_dir, table)
            raise RunError(f"{path} is not what the run wrote: it has rows of stage {_listed(early)}")
    for name, (size, digest) in state.files.items():
        path = run_dir / name
        if not path.is_file():
            raise RunError(f"{path} is missing: it was written after stage {state.finished_stage}")
        if path.stat().st_size != size or of_file(path) != [size, digest]:
            raise RunError(f"{path} is not what the run wrote after stage {state.finished_stage}")


def _digests(run_dir: Path, tables: Iterable[str]) -> dict[str, dict[str, str]]:
    return {table: of_stages(records.read_arrow(run_dir, table)) for table in tables}


def _listed(stages: Iterable[str]) -> str:
    return ", ".join(sorted(stages, key=int))

"""Open a run's directory, or many by a glob, as tidy frames; works on a run still going and on one cut short."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.runs import distances
from analysis.runs.frames import Frame
from continual.storage import records

_DERIVED = ("separation", "drift")

NO_SLICE = "no slice"
"""The name of what a growing bank's rows give to none of its atoms."""


_ONCE = {"scores": ["stage", "task", "metric"], "answers": ["stage", "task", "row"]}
"""Columns that no two rows of a table share."""


class RunReadError(ValueError):
    """A directory that holds no readable run; the message is one line that names it."""


@dataclass(frozen=True)
class Run:
    """One run: its manifest, its tables cut to the finished stages, and what could not be read.

    The frames have the columns of ``records.SCHEMAS``; ``task`` (and ``other``) are ordered categories in the order
    of training, so that every figure and table drawn from them keeps that order. Where there are atoms there is one
    column more, ``name``: the atom's number or, of a growing bank, its slice and its number there, as an ordered
    category; missing where ``atom`` is -1.
    """

    directory: Path
    manifest: Mapping[str, Any]
    tables: Mapping[str, Frame]
    problems: Mapping[str, str] = field(default_factory=dict)
    """Table name to one line saying why it cannot be read; such a table is an empty frame."""

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.manifest.get("run", self.directory.name))

    @property
    def stages(self) -> list[str]:
        """The stages' names, which are their tasks' names, in the order of training."""
        return [str(stage) for stage in self.manifest["stages"]]

    @property
    def finished_stage(self) -> int:
        """The last finished stage: -1 nothing is scored, 0 only the untrained scores are."""
        return int(self.manifest["finished_stage"])

    @property
    def complete(self) -> bool:
        """Whether every stage is finished."""
        return self.finished_stage >= len(self.stages)

    @property
    def learnt(self) -> list[str]:
        """The tasks whose stage is finished."""
        return self.stages[: max(self.finished_stage, 0)]

    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]:
        """Each task's description, from the manifest."""
        return self.manifest.get("tasks") or {}

    @property
    def model(self) -> Mapping[str, Any]:
        """The model's facts, from the manifest."""
        return self.manifest.get("model") or {}

    def metric(self, task: str) -> str | None:
        """Return the headline metric of ``task``, or None when the manifest does not say."""
        return (self.tasks.get(task) or {}).get("metric")


@dataclass(frozen=True)
class Frames:
    """Many runs' tables, each one frame; the columns ``run`` and ``seed`` say whose a row is."""

    scores: Frame
    answers: Frame
    routing: Frame
    separation: Frame
    drift: Frame
    tokens: Frame
    ablation: Frame
    gradients: Frame
    wordings: Frame
    wording_answers: Frame
    general: Frame
    theory: Frame
    usage_halves: Frame
    runs: tuple[Run, ...]
    own: Mapping[str, Frame] = field(default_factory=dict)
    """Tables that recorders of the user's own have written, by name."""

    def __getitem__(self, table: str) -> Frame:
        """Return a table by its name, whoever wrote it."""
        return self.own[table] if table in self.own else getattr(self, table)


def load_run(directory: str | Path, only: Collection[str] | None = None) -> Run:
    """Read one run's directory.

    Rows of a stage that is not finished are left out. A table that cannot be read becomes an empty frame and an entry
    in ``problems``.

    Args:
        directory: The run's directory.
        only: The tables to read; the others are not in ``tables``. All by default, those of recorders of the user's own
            among them.

    Raises:
        RunReadError: The directory holds no run, or its manifest cannot be read.
    """
    directory = Path(directory)
    manifest = _manifest(directory)
    tables: dict[str, Frame] = {}
    problems: dict[str, str] = {}
    for name in (*records.SCHEMAS, *records.tables_of(directory)) if only is None else only:
        try:
            table = _read(directory, name, manifest["stages"])
        except records.RecordError as error:
            problems[name] = str(error).replace(f"{directory}{os.sep}", "")
            table = records.SCHEMAS[name].empty_table().to_pandas() if name in records.SCHEMAS else pd.DataFrame()
            table = table if "stage" in table else table.assign(stage=[])
        table = _ordered(table[table["stage"] <= manifest["finished_stage"]], manifest["stages"])
        tables[name] = _named(table, directory, manifest) if "atom" in table else table
    return Run(directory, manifest, tables, problems)


def _read(directory: Path, name: str, stages: list[str]) -> Frame:
    """Read a table; distances between usages are derived from those, but for stages of which a file has them.

    Earlier versions wrote the distances down: a run that they began has the file, and no halves of those stages.
    """
    written = records.read(directory, name)
    if name in _ONCE and (twice := written.duplicated(_ONCE[name])).any():
        row = written[twice].iloc[0]
        raise records.RecordError(
            f"{records.path_of(directory, name)}: {twice.sum()} rows are there twice, the first of "
            f"stage {row['stage']}, task {row['task']}: two processes wrote this run at once"
        )
    halves = records.path_of(directory, "usage_halves")
    if name not in _DERIVED or (records.path_of(directory, name).exists() and not halves.exists()):
        return written
    routing = records.read(directory, "routing")
    derived = (
        distances.drift(routing, stages)
        if name == "drift"
        else distances.separation(routing, records.read(directory, "usage_halves"))
    )
    new = derived[~derived["stage"].isin(written["stage"])]
    return pd.concat([written, new], ignore_index=True) if len(written) else new


def load(where: str | Path) -> Frames:
    """Read the run in a directory, or every run that a glob pattern names, as tidy frames.

    Args:
        where: A run's directory, or a pattern such as ``runs/*``; what it matches beside runs is passed over.

    Raises:
        RunReadError: ``where`` names no run.
    """
    if Path(where).is_dir():
        runs = [load_run(where)]
    else:
        found = sorted(path for path in glob.glob(str(where)) if (Path(path) / "manifest.json").is_file())
        runs = [load_run(path) for path in found]
    if not runs:
        raise RunReadError(f"{where}: names no run directory (one with a manifest.json)")
    names = dict.fromkeys(name for run in runs for name in run.tables)
    joined = {name: _concat([run.tables[name] for run in runs if name in run.tables]) for name in names}
    own = {name: joined.pop(name) for name in names if name not in records.SCHEMAS}
    return Frames(**joined, runs=tuple(runs), own=own)


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    if not directory.is_dir():
        raise RunReadError(f"{directory}: {'not a directory' if directory.exists() else 'no such directory'}")
    if not path.is_file():
        raise RunReadError(f"{directory}: no run directory (it has no manifest.json)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunReadError(f"{path}: not a readable manifest ({error})") from error
    if not isinstance(manifest, dict):
        raise RunReadError(f"{path}: not a run's manifest (a JSON object is expected)")
    lacking = [key for key in ("stages", "finished_stage") if key not in manifest]
    if lacking:
        raise RunReadError(f"{path}: not a run's manifest (it lacks {', '.join(lacking)})")
    if wrong := _wrong(manifest):
        raise RunReadError(f"{path}: not a run's manifest ({wrong})")
    return manifest


def _wrong(manifest: Mapping[str, Any]) -> str:
    """Return what in a manifest is not as a run writes it, "" where nothing is: what is read of it relies on that."""
    stages, finished = manifest["stages"], manifest["finished_stage"]
    if not isinstance(stages, list) or not all(isinstance(stage, str) for stage in stages):
        return "stages is a list of names"
    if len(set(stages)) < len(stages):
        return "a stage is named twice"
    if not isinstance(finished, int) or isinstance(finished, bool) or not -1 <= finished <= len(stages):
        return f"finished_stage is a number from -1 to {len(stages)}, the number of stages, not {finished!r}"
    for key in ("tasks", "model", "environment", "stage_seconds", "scoring_seconds"):
        if not isinstance(manifest.get(key) or {}, Mapping):
            return f"{key} is an object"
    odd = [name for name, facts in (manifest.get("tasks") or {}).items() if not isinstance(facts, Mapping)]
    return f"tasks.{odd[0]} is an object" if odd else ""


def _ordered(table: Frame, stages: list[str]) -> Frame:
    """Turn the task columns into categories in the order of training; a task of no stage comes last."""
    table = table.copy()
    for column in {"task", "other"} & set(table.columns):
        beside = sorted(set(table[column].dropna().unique()) - set(stages))
        table[column] = pd.Categorical(table[column], categories=[*stages, *beside], ordered=True)
    return table.reset_index(drop=True)


def _named(table: Frame, directory: Path, manifest: Mapping[str, Any]) -> Frame:
    """Name each row's atom."""
    num_atoms = int(table["atom"].max()) + 1 if len(table) else 0
    names = _slice_names(directory, manifest, num_atoms) or [str(atom) for atom in range(num_atoms)]
    table["name"] = pd.Categorical.from_codes(table["atom"].to_numpy(), categories=names, ordered=True)
    return table


def _slice_names(directory: Path, manifest: Mapping[str, Any], num_atoms: int) -> list[str]:
    """Return the names of a growing bank's atoms, slice after slice; none where there is no such bank."""
    path = directory / "adapters" / f"stage-{manifest['finished_stage']:02d}" / "bank.json"
    size = (manifest.get("model") or {}).get("num_atoms")
    try:
        slices = json.loads(path.read_text(encoding="utf-8"))["slices"]
    except (OSError, ValueError, KeyError):
        return []
    names = [NO_SLICE, *(f"{name}:{atom}" for name in slices for atom in range(int(size or 0)))]
    return names if len(names) >= num_atoms else []  # tables and folder of different moments of a run still going


def _concat(frames: list[Frame]) -> Frame:
    """Concatenate; the order of tasks survives only where all runs share it."""
    return pd.concat(frames, ignore_index=True)

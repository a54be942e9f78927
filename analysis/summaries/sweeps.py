"""Open a sweep's directory and compare its methods: means with intervals, and which tasks can tell them apart.

A sweep's directory holds sweep.json (methods, orders, cells), perhaps tuning.json, and an ordinary run directory for
each cell. Cells that failed, wait or cannot be read are named; the rest is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.measures import hierarchy
from analysis.runs.frames import Frame
from analysis.runs.load import RunReadError
from analysis.summaries.sweep_cells import SweepCell, read_cell

Array = NDArray[np.float64]

PER_TASK, JOINT = "per_task", "joint"
BOUNDS = ("zero_shot", PER_TASK, JOINT)
"""Methods that bound the others and do not compete with them."""
HEADLINE_MARGIN = 0.05
"""By how much a task's bound must beat the best constant answer for the task to count in the headline mean."""
FEW_ROWS = 1 / 8
"""At most this share of the largest task's training rows makes a task one of few rows, where earlier stages help."""
MEASURES = (
    "headline_accuracy",
    "average_accuracy",
    "micro_average_accuracy",
    "backward_transfer",
    "forgetting",
    "learning_accuracy",
    "average_incremental_accuracy",
    "forward_transfer",
    "intransigence",
)
ABOVE, BELOW, EVEN = "above", "below", "not told apart"


@dataclass(frozen=True)
class Sweep:
    """A sweep: its cells, and what could not be read.

    Attributes:
        directory: Where it lies.
        name: Its name.
        base: The configuration that its cells start from.
        baseline: The method that the others are paired with, or None.
        methods: Each method's settings by dotted key, in order.
        orders: Each order's stages.
        cells: Its cells, in order; those without numbers have a line in ``error``.
        tuning: What tuning.json says of each method: its cells, and the settings chosen.
        problems: A line for each thing that could not be read.
    """

    directory: Path
    name: str
    base: str
    baseline: str | None
    methods: Mapping[str, Mapping[str, Any]]
    orders: Mapping[str, list[str]]
    cells: list[SweepCell]
    tuning: Mapping[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def cells_of(self, method: str) -> list[SweepCell]:
        """Return a method's cells that have numbers."""
        return [cell for cell in self.cells if cell.method == method and cell.matrix is not None]

    def twin(self, cell: SweepCell, method: str) -> SweepCell | None:
        """Return ``method``'s cell of the same order and seed, if it has numbers."""
        place = (cell.order, cell.seed)
        return next((other for other in self.cells_of(method) if (other.order, other.seed) == place), None)

    @cached_property
    def measured(self) -> list[str]:
        """The methods with at least one cell that has numbers."""
        return [method for method in self.methods if self.cells_of(method)]

    @cached_property
    def tasks(self) -> list[str]:
        """Every task, as first met over the cells."""
        return list(dict.fromkeys(task for cell in self.cells for task in cell.stages))

    @cached_property
    def headline(self) -> Frame:
        """The table of ``headline_tasks``."""
        return headline_tasks(self)

    @property
    def headline_names(self) -> list[str]:
        """The tasks that make the headline mean."""
        return [str(task) for task in self.headline.loc[self.headline["headline"], "task"]]

    @property
    def few_row_names(self) -> list[str]:
        """The headline tasks with at most ``FEW_ROWS`` of the training rows of the task that has the most."""
        rows: dict[str, int] = {}
        for one in self.cells:
            for task, facts in (one.manifest.get("tasks") or {}).items():
                rows.setdefault(task, int(facts.get("trained_rows") or facts.get("train_rows") or 0))
        most = max(rows.values(), default=0)
        return [task for task in self.headline_names if 0 < rows.get(task, 0) <= FEW_ROWS * most]


def is_sweep(directory: str | Path) -> bool:
    """Return whether ``directory`` is a sweep's."""
    return (Path(directory) / "sweep.json").is_file()


def load_sweep(directory: str | Path) -> Sweep:
    """Read a sweep's directory, finished or not.

    Raises:
        RunReadError: sweep.json is missing or cannot be read; anything else that is wrong is named in the sweep.
    """
    directory = Path(directory)
    path = directory / "sweep.json"
    facts = _json(path)
    methods, entries = facts.get("methods"), facts.get("cells")
    if not isinstance(methods, dict) or not isinstance(entries, list):
        raise RunReadError(f"{path}: not a sweep's (it has no methods or no cells)")
    problems: list[str] = []
    cells: list[SweepCell] = []
    for number, entry in enumerate(entries):
        try:
            cells.append(read_cell(directory, entry if isinstance(entry, dict) else {}))
        except RunReadError as error:
            problems.append(f"sweep.json, cell {number}: {error}")
    problems += _by_reason({cell.directory: cell.error for cell in cells if cell.status == "unreadable"})
    problems += _by_reason({cell.directory: cell.rows_problem for cell in cells if cell.rows_problem})
    tuning = _tuning(directory, problems)
    methods = {method: settings or {} for method, settings in methods.items()}
    methods |= {cell.method: {} for cell in cells if cell.method not in methods}
    baseline = facts.get("baseline")
    if baseline is not None and baseline not in methods:
        problems.append(f"sweep.json: the baseline {baseline!r} is none of its methods")
        baseline = None
    names = str(facts.get("name") or directory.name), str(facts.get("base") or "")
    return Sweep(directory, *names, baseline, methods, facts.get("orders") or {}, cells, tuning, problems)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunReadError(f"{path.parent}: no sweep's directory (it has no {path.name})") from None
    except (OSError, ValueError) as error:
        raise RunReadError(f"{path}: not readable ({error})") from error
    if not isinstance(content, dict):
        raise RunReadError(f"{path}: a JSON object is expected")
    return content


def _by_reason(reasons: Mapping[str, str | None]) -> list[str]:
    """Return a line for each reason, naming the cells that share it."""
    places: dict[str | None, list[str]] = {}
    for place, reason in reasons.items():
        places.setdefault(reason, []).append(place)
    return [f"{', '.join(named)}: {reason}" for reason, named in places.items()]


def _tuning(directory: Path, problems: list[str]) -> dict[str, Any]:
    path = directory / "tuning.json"
    if not path.exists():
        return {}
    try:
        found = _json(path)
    except RunReadError as error:
        problems.append(str(error).replace(f"{directory}/", ""))
        return {}
    found = found.get("methods", found)
    if not isinstance(found, dict):
        problems.append("tuning.json: its methods are not readable")
        return {}
    odd = [method for method, tried in found.items() if not isinstance(tried, dict)]
    problems += [f"tuning.json: what it says of {method} is not readable" for method in odd]
    return {method: tried for method, tried in found.items() if method not in odd}


def headline_tasks(sweep: Sweep) -> Frame:
    """Return which tasks make the headline mean: those whose bound beats the best constant answer by 0.05.

    The bound is the just-trained score of the method named per_task or, failing that, the best one over methods, each a
    mean over cells. A task whose constant answer is not known counts.

    Returns:
        Columns task, bound, bound_from (a method), constant, headline.
    """
    rows = []
    for task in sweep.tasks:
        scores = {
            method: _mean_of(task, [cell.trained() for cell in sweep.cells_of(method)]) for method in sweep.measured
        }
        scores = {method: score for method, score in scores.items() if not np.isnan(score)}
        source = PER_TASK if PER_TASK in scores else max(scores, key=lambda method: scores[method], default="")
        bound = scores.get(source, float("nan"))
        constants = [cell.constant(task) for cell in sweep.cells if task in cell.stages]
        constant = float(np.mean(constants)) if constants else float("nan")
        shown = not bound < constant + HEADLINE_MARGIN - 1e-9  # an unknown constant shuts nothing out
        rows.append({"task": task, "bound": bound, "bound_from": source, "constant": constant, "headline": shown})
    return pd.DataFrame(rows, columns=["task", "bound", "bound_from", "constant", "headline"])


def _mean_of(task: str, scores: Sequence[Mapping[str, float]]) -> float:
    known = [score[task] for score in scores if task in score]
    return float(np.mean(known)) if known else float("nan")


def cell_measures(sweep: Sweep, cell: SweepCell) -> dict[str, float]:
    """Return a cell's measures, by the keys of ``MEASURES``; one that is not defined for it is missing.

    ``headline_accuracy`` is the mean final score over the headline tasks. ``intransigence`` is the mean over stages k
    of a*_k - R[k, k], with a*_k from the method named joint, in the same order and with the same seed.
    """
    found, final = cell.measures(), cell.final()
    headline = [final[task] for task in sweep.headline_names if task in final]
    if headline:
        found["headline_accuracy"] = float(np.mean(headline))
    joint = sweep.twin(cell, JOINT)
    if joint is not None and cell.method not in BOUNDS and joint.stages == cell.stages and cell.trained():
        reference, own = joint.trained(), cell.trained()
        found["intransigence"] = float(np.mean([reference[task] - own[task] for task in cell.stages]))
    return {key: value for key, value in found.items() if not np.isnan(value)}


def method_table(sweep: Sweep) -> Frame:
    """Return a row a method: the mean of each measure over its cells, its interval, and what the method costs.

    Intervals redraw orders, then seeds within them; with one cell there is none, with five or fewer it is rough.

    Returns:
        Columns method, cells, rough; for each key of ``MEASURES`` the key, key_low and key_high; then
        trainable_parameters, stored_bytes_a_task, stored_parameters, serving_parameters and seconds, means over cells.
    """
    rows = []
    for method in sweep.measured:
        cells = sweep.cells_of(method)
        row: dict[str, Any] = {"method": method, "cells": len(cells), "rough": len(cells) <= hierarchy.FEW_CELLS}
        measured = [cell_measures(sweep, cell) for cell in cells]
        for key in MEASURES:
            having = [cell for cell, values in zip(cells, measured, strict=True) if key in values]
            values = np.array([values[key] for values in measured if key in values])
            row |= _mean_and_interval(key, values, [cell.order for cell in having])
        rows.append(row | _costs(cells))
    return pd.DataFrame(rows)


def _mean_and_interval(key: str, values: Array, orders: list[str]) -> dict[str, float]:
    """Return a measure's mean over cells and its interval, NaN where there is none."""
    names = (key, f"{key}_low", f"{key}_high")
    if not len(values):
        return dict.fromkeys(names, float("nan"))
    span = (float("nan"), float("nan"))
    if len(values) > 1:
        span = hierarchy.interval(hierarchy.cell_weights(orders, np.random.default_rng(0)) @ values)
    return dict(zip(names, (float(hierarchy.mean_weights(orders) @ values), *span), strict=True))


def _costs(cells: Sequence[SweepCell]) -> dict[str, float]:
    """Return what a method costs, as means over its cells; NaN for what no manifest says."""
    sizes = [_last(cell.manifest.get("stored_bytes")) for cell in cells]
    a_task = [None if size is None else size / len(cell.stages) for size, cell in zip(sizes, cells, strict=True)]
    found = {
        "trainable_parameters": _mean(
            [(cell.manifest.get("model") or {}).get("trainable_parameters") for cell in cells]
        )
    }
    for name in ("stored_parameters", "serving_parameters"):
        places = [cell.manifest.get(name, (cell.manifest.get("model") or {}).get(name)) for cell in cells]
        found[name] = _mean([_last(value) for value in places])
    return found | {"stored_bytes_a_task": _mean(a_task), "seconds": _mean([cell.seconds for cell in cells])}


def _last(value: Any) -> float | None:
    """Return a number as it is, or the last stage's of numbers by stage."""
    if isinstance(value, Mapping):
        value = value[max(value, key=int)] if value else None
    return float(value) if isinstance(value, int | float) else None


def _mean(values: Sequence[Any]) -> float:
    known = [float(value) for value in values if isinstance(value, int | float)]
    return float(np.mean(known)) if known else float("nan")

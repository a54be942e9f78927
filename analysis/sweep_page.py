"""A sweep's report: what its page shows, and the verdict that its intervals allow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from analysis import sweep_content
from analysis.content import Table, cell
from analysis.hierarchy import FEW_CELLS
from analysis.page import KeyNumber, Page
from analysis.study_content import study_parts
from analysis.study_parts import Studies
from analysis.sweep_content import DEFINITIONS, Comparison, compare
from analysis.sweep_figures import sweep_plates, why_no_differences
from analysis.sweeps import ABOVE, BELOW, BOUNDS, EVEN, MEASURES, Sweep
from analysis.words import Measure

_SECTIONS = (
    ("methods", "Methods side by side", "What each method reaches, how sure that is, and what it costs."),
    ("differences", "Paired differences", "Each method against the baseline, over the same cells and test rows."),
    ("tasks", "Task by task", "Where the scores come from, and which tasks can tell methods apart."),
    ("stages", "Stage by stage", "How the mean score holds as tasks are added."),
    ("tuning", "Tuning", "What was tried for each method on rows held out of training, and what was chosen."),
    ("details", "Details", "Every measure, every cell, and what each method is."),
)


def sweep_page(sweep: Sweep) -> Page:
    """Return the page of a sweep, finished or not."""
    compared, parts = compare(sweep), study_parts(sweep)
    tables = _tables(compared)
    for place, more in parts.tables.items():
        tables[place] = [*tables.get(place, []), *more]
    return Page(
        kind="Sweep",
        title=sweep.name,
        verdict=verdict(compared),
        sections=_sections(sweep, parts),
        plates=[*sweep_plates(compared), *parts.plates],
        tables=tables,
        facts=_facts(sweep),
        key_numbers=_key_numbers(compared),
        notices=[*_notices(compared), *parts.problems],
        summary=to_json(compared),
    )


def _sections(sweep: Sweep, parts: Studies) -> list[tuple[str, str, str]]:
    """Return the page's sections: the studies' stand before what was tuned and the details."""
    before = [section for section in _SECTIONS if section[0] not in ("tuning", "details")]
    after = [section for section in _SECTIONS if section[0] == "details" or (section[0] == "tuning" and sweep.tuning)]
    return [*before, *parts.sections, *after]


def _tables(compared: Comparison) -> dict[str, list[Table]]:
    sweep = compared.sweep
    found: dict[str, list[Table | None]] = {
        "methods": [sweep_content.main_table(compared), sweep_content.published_table(compared)],
        "paired_differences": [sweep_content.difference_table(compared)],
        "scores_by_task": [sweep_content.headline_table(sweep)],
        "tuning": [sweep_content.tuning_table(sweep)],
        "details": [
            sweep_content.measure_table(compared),
            sweep_content.cell_table(sweep),
            sweep_content.setting_table(sweep),
        ],
    }
    return {place: [table for table in tables if table is not None] for place, tables in found.items()}


def verdict(compared: Comparison) -> str:
    """Return what the sweep shows, in a few sentences; no difference is called that its interval does not."""
    sweep, leader = compared.sweep, compared.leader
    if leader is None:
        return "No cell is finished yet, so no method can be judged."
    row, key = compared.row(leader), compared.key
    num, of = len(sweep.headline_names) or len(sweep.tasks), "headline tasks" if sweep.headline_names else "tasks"
    rivals = [method for method in sweep.measured if method not in BOUNDS]
    reach = f"{sweep_content.spanned(row[key], row[f'{key}_low'], row[f'{key}_high']).text} on {num} {of}"
    if len(rivals) == 1:
        alone = "it is the sweep's one method" if len(sweep.methods) == 1 else "no other method has a finished cell"
        return f"{leader} reaches a mean final score of {reach}; {alone}."
    first = f"{leader} has the highest mean final score of {len(rivals)} methods, {reach}."
    return " ".join(
        part for part in (first, _beside_leader(compared, rivals), _against_baseline(compared, rivals)) if part
    )


def _beside_leader(compared: Comparison, rivals: list[str]) -> str:
    """Return which methods the leader is told apart from."""
    leader, groups = compared.leader, _groups(compared, compared.from_leader, rivals)
    others = groups[EVEN] + groups[ABOVE]
    if leader == compared.sweep.baseline or not (others or groups[BELOW]):
        return ""
    if not others:
        return (
            "Every other method lies below it with its whole interval."
            if len(groups[BELOW]) > 1
            else f"{groups[BELOW][0]} is below it."
        )
    return f"Not told apart from it: {_listed(others)}."


def _against_baseline(compared: Comparison, rivals: list[str]) -> str:
    """Return how the methods stand to the baseline."""
    sweep, groups = compared.sweep, _groups(compared, compared.differences, rivals)
    if not any(groups.values()):
        return ""
    parts = []
    for word, names in groups.items():
        if names and word == EVEN:
            parts.append(f"{_listed(names)} {'is' if len(names) == 1 else 'are'} not told apart from it")
        elif names:
            parts.append(f"{word} it: {_listed([_with_difference(compared, name) for name in names])}")
    return f"Against {sweep.baseline}, the baseline: {'; '.join(parts)}."


def _groups(compared: Comparison, frame: Any, rivals: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {ABOVE: [], BELOW: [], EVEN: []}
    for method in rivals:
        if found := compared.difference(frame, method):
            groups[found["verdict"]].append(method)
    return groups


def _with_difference(compared: Comparison, method: str) -> str:
    found = compared.difference(compared.differences, method)
    assert found is not None
    return f"{method} by {cell(abs(found['difference']), 3).text}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _key_numbers(compared: Comparison) -> list[KeyNumber]:
    """Return the six numbers of the first screen."""
    sweep, leader = compared.sweep, compared.leader
    done = sum(one.matrix is not None for one in sweep.cells)
    counts = [
        KeyNumber(
            Measure("finished cells", "–", "Cells whose run is finished and readable."), f"{done} of {len(sweep.cells)}"
        ),
        KeyNumber(
            Measure("headline tasks", "–", "Tasks that make the headline mean."),
            f"{len(sweep.headline_names)} of {len(sweep.tasks)}",
        ),
    ]
    if leader is None:
        return counts
    row, key = compared.row(leader), compared.key
    found = compared.difference(compared.differences, leader)
    why = "it is the baseline" if leader == sweep.baseline else why_no_differences(sweep)
    pair = "from the baseline" if leader == sweep.baseline else f"{leader} minus {sweep.baseline or 'the baseline'}"
    measure = Measure(f"paired difference, {pair}", "higher", "Mean final score minus the baseline's, paired.")
    paired = KeyNumber(measure, "–", None, why)
    if found:
        paired = KeyNumber(measure, cell(found["difference"], 3).text, _span(found["low"], found["high"]))
    kept = Measure(
        f"bytes kept a task, {leader}", "lower", "Bytes that the strategy keeps after the last stage, over stages."
    )
    return [
        _number(row, key, leader),
        paired,
        _number(row, "backward_transfer", leader),
        KeyNumber(kept, sweep_content.stored(row["stored_bytes_a_task"]).text),
        *counts,
    ]


def _number(row: Mapping[str, Any], key: str, method: str) -> KeyNumber:
    defined = DEFINITIONS[key]
    measure = Measure(f"{defined.name}, {method}", defined.better, defined.definition)
    span = _span(row[f"{key}_low"], row[f"{key}_high"])
    return KeyNumber(measure, cell(row[key], 3).text, span, None if span else "one cell: no interval")


def _span(low: float, high: float) -> tuple[str, str] | None:
    return (cell(low, 3).text, cell(high, 3).text) if math.isfinite(low) and math.isfinite(high) else None


def _facts(sweep: Sweep) -> list[str]:
    models = dict.fromkeys(str((one.manifest.get("model") or {}).get("backbone") or "") for one in sweep.cells)
    counts = [(len(sweep.methods), "method"), (len({one.order for one in sweep.cells}), "order")]
    counts.append((len({one.seed for one in sweep.cells}), "seed"))
    found = [model for model in models if model] + ([f"base {sweep.base}"] if sweep.base else [])
    return [*found, *(f"{num} {noun}{'s' * (num != 1)}" for num, noun in counts), f"{len(sweep.tasks)} tasks"]


def _notices(compared: Comparison) -> list[str]:
    """Return what a reader must know before the numbers: what failed, waits or cannot be read, and what is rough."""
    sweep = compared.sweep
    found = []
    waiting = [one for one in sweep.cells if one.status == "waiting"]
    if waiting:
        found.append(f"This sweep is not finished: {len(waiting)} of {len(sweep.cells)} cells are still to come.")
    found += [f"Failed: {one.place} ({one.directory}): {one.error}" for one in sweep.cells if one.status == "failed"]
    found += [f"{problem}. What needs it is left out." for problem in sweep.problems]
    if len(compared.methods) and compared.methods["rough"].any():
        few = int(compared.methods["cells"].min())
        found.append(
            f"Intervals are rough: the method with the fewest cells has {few}, and {FEW_CELLS} or fewer say little."
        )
    if sweep.tasks and not sweep.headline_names:
        found.append("No task's bound beats the best constant answer by enough for a headline mean.")
    return found


def to_json(compared: Comparison) -> dict[str, Any]:
    """Return summary.json's content: plain JSON, null for what is not defined."""
    sweep = compared.sweep
    measured = {row.pop("method"): row for row in compared.methods.to_dict("records")}
    methods = {}
    for method, row in measured.items():
        spans = {key: [_plain(row.pop(f"{key}_low")), _plain(row.pop(f"{key}_high"))] for key in MEASURES}
        intervals = {key: span for key, span in spans.items() if None not in span}
        methods[method] = {key: _plain(value) for key, value in row.items()} | {"intervals_95": intervals}
    states: dict[str, int] = {}
    for one in sweep.cells:
        states[one.status] = states.get(one.status, 0) + 1
    return {
        "sweep": sweep.name,
        "base": sweep.base,
        "baseline": sweep.baseline,
        "leader": compared.leader,
        "cells": states,
        "tasks": sweep.tasks,
        "headline_tasks": sweep.headline_names,
        "methods": methods,
        "paired_differences": [
            {key: _plain(value) for key, value in row.items()} for row in compared.differences.to_dict("records")
        ],
        "failed": {one.directory: one.error for one in sweep.cells if one.status == "failed"},
        "problems": list(sweep.problems),
    }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""A sweep's report: what its page shows, and the verdict that its intervals allow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from analysis.measures.hierarchy import FEW_CELLS
from analysis.report import preflight, sweep_content, sweep_story
from analysis.report.content import ReportTable, cell, spanned
from analysis.report.page import OPENING, KeyNumber, Page
from analysis.report.study_content import study_parts
from analysis.report.study_parts import Studies
from analysis.report.sweep_content import DEFINITIONS, Comparison, compare
from analysis.report.sweep_figures import sweep_figures, why_no_differences
from analysis.report.words import Measure
from analysis.summaries.sweeps import ABOVE, BELOW, BOUNDS, EVEN, JOINT, MEASURES, PER_TASK, Sweep

_SECTIONS = (
    ("preflight", "Preflight", "What the rows of each task can show at all, before any result is trusted."),
    ("methods", "Scores and costs", "What each method reaches, how sure that is, and what it costs."),
    ("differences", "Paired differences", "Each method against the baseline, over the same cells and test rows."),
    ("tasks", "Task by task", "Where the scores come from, and which tasks can tell methods apart."),
    ("stages", "Stage by stage", "How the mean score holds as tasks are added."),
    ("tuning", "Tuning", "What was tried for each method on rows held out of training, and what was chosen."),
    ("details", "Details", "Every measure, every cell, and what each method is."),
)


def sweep_page(sweep: Sweep) -> Page:
    """Return the page of a sweep, finished or not."""
    compared, checks, parts = compare(sweep), preflight.sweep_checks(sweep), study_parts(sweep)
    tables = _tables(compared, checks)
    for place, more in parts.tables.items():
        tables[place] = [*tables.get(place, []), *more]
    story = sweep_story.story_of(compared)
    page = Page(
        kind="Sweep",
        title=sweep.name,
        verdict=verdict(compared),
        gloss=gloss(compared),
        sections=_sections(sweep, parts),
        report_figures=[*sweep_figures(compared), *parts.report_figures],
        tables=tables,
        facts=_facts(sweep),
        key_numbers=_key_numbers(compared),
        notices=[*_notices(compared, is_rough=story is None), *parts.problems],
        points={"preflight": preflight.points(checks, "They are shown, and kept out of the headline mean.")}
        if checks
        else {},
        summary=to_json(compared),
    )
    return page if story is None else _with_story(page, story)


def _with_story(page: Page, story: sweep_story.Story) -> Page:
    """Return a page that opens with the story of its runs; what the methods reach side by side follows below."""
    below = [
        replace(figure, section="methods") if figure.section == OPENING else figure for figure in page.report_figures
    ]
    key = sweep_story.SECTION[0]
    return replace(
        page,
        verdict=sweep_story.verdict(story),
        gloss=sweep_story.gloss(story),
        sections=[sweep_story.SECTION, *page.sections],
        key_numbers=_numbers_of_two(story) or page.key_numbers,
        notices=[*page.notices, *story.problems],
        report_figures=[*sweep_story.figures(story), *below],
        tables={**page.tables, key: [sweep_story.table(story)]},
        points={**page.points, key: sweep_story.points(story)},
        summary={**page.summary, "changes": sweep_story.to_json(story)},
    )


def _sections(sweep: Sweep, parts: Studies) -> list[tuple[str, str, str]]:
    """Return the page's sections: the studies' stand before what was tuned and the details."""
    before = [section for section in _SECTIONS if section[0] not in ("tuning", "details")]
    after = [section for section in _SECTIONS if section[0] == "details" or (section[0] == "tuning" and sweep.tuning)]
    return [*before, *parts.sections, *after]


def _tables(compared: Comparison, checks: list[preflight.Check]) -> dict[str, list[ReportTable]]:
    sweep = compared.sweep
    found: dict[str, list[ReportTable | None]] = {
        "preflight": [preflight.table(checks, sweep.headline_names) if checks else None],
        "methods": [
            sweep_content.main_table(compared),
            sweep_content.published_table(compared),
            sweep_content.cost_table(compared),
        ],
        "paired_differences": [sweep_content.difference_table(compared)],
        "tuning": [sweep_content.tuning_table(sweep)],
        "details": [
            sweep_content.measure_table(compared),
            sweep_content.cell_table(sweep),
            sweep_content.setting_table(sweep),
        ],
    }
    return {place: [table for table in tables if table is not None] for place, tables in found.items()}


def verdict(compared: Comparison) -> str:
    """Return what the sweep shows, in a sentence; no difference is called that its interval does not."""
    sweep, leader = compared.sweep, compared.leader
    if leader is None:
        return "No cell is finished yet, so no method can be judged."
    num, of = len(sweep.headline_names) or len(sweep.tasks), "headline task" if sweep.headline_names else "task"
    span = sweep_content.span_of(compared, leader, compared.key) or (math.nan, math.nan)
    reach = f"{spanned(compared.row(leader)[compared.key], *span).line} on {num} {of}{'s' * (num != 1)}"
    rivals = _rivals(compared)
    if len(rivals) == 1:
        alone = "it is the sweep's one method" if len(sweep.methods) == 1 else "no other method has a finished cell"
        return f"{leader} reaches a mean final score of {reach}; {alone}."
    tied = [one for one in rivals if compared.row(one)[compared.key] == compared.row(leader)[compared.key]]
    have = "has" if len(tied) == 1 else "share"
    first = f"{_listed(tied)} {have} the highest mean final score of {len(rivals)} methods, {reach}"
    groups = _groups(compared, compared.from_leader, rivals)
    even, below = [one for one in groups[EVEN] + groups[ABOVE] if one not in tied], groups[BELOW]
    if len(tied) == len(rivals):
        return f"{first}."
    if even and len(tied) > 1:
        return f"{first}; not told apart from {leader}: {_listed(even)}."
    if even:
        return f"{first}, but it is not told apart from {_listed(even)}."
    if len(below) == len(rivals) - 1:
        return f"{first}, and {'every other one is' if len(below) > 1 else f'{below[0]} is'} below it."
    return f"{first}{f', and {_listed(below)} are below it' if below else ''}; the rest cannot be paired with it."


def _rivals(compared: Comparison) -> list[str]:
    """Return the measured methods that compete: all but the bounds."""
    return [method for method in compared.sweep.measured if method not in BOUNDS]


def gloss(compared: Comparison) -> str:
    """Return how the methods stand to the baseline, and what being told apart means."""
    sweep, rivals = compared.sweep, _rivals(compared)
    groups = _groups(compared, compared.differences, rivals)
    if not any(groups.values()):
        return ""
    parts = []
    for word, names in groups.items():
        if names and word == EVEN:
            parts.append(f"{_listed(names)} {_are(names)} not told apart from it")
        elif names:
            parts.append(f"{_listed([_with_difference(compared, name) for name in names])} {_are(names)} {word} it")
    told = "Methods are told apart where the 95 % interval of their paired difference leaves out 0."
    return f"Against {sweep.baseline}, the baseline: {'; '.join(parts)}. {told}"


def _groups(compared: Comparison, frame: Any, rivals: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {ABOVE: [], BELOW: [], EVEN: []}
    for method in rivals:
        if found := compared.difference(frame, method):
            groups[found["verdict"]].append(method)
    return groups


def _with_difference(compared: Comparison, method: str) -> str:
    found = compared.difference(compared.differences, method)
    assert found is not None
    return f"{method} (by {cell(abs(found['difference']), 3).text})"


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _key_numbers(compared: Comparison) -> list[KeyNumber]:
    """Return the six numbers of the first screen: the leader's own, and its paired differences from a rival."""
    leader = compared.leader
    if leader is None:
        return []
    own = [_number(compared, leader, key) for key in (compared.key, "backward_transfer", "learning_accuracy")]
    sweep = compared.sweep
    rival, sign, frame, why = sweep.baseline or "the baseline", 1, compared.differences, why_no_differences(sweep)
    if leader == sweep.baseline:  # then from the next best
        others = [other for other in _rivals(compared) if compared.difference(compared.from_leader, other)]
        rival = max(others, key=lambda other: compared.row(other)[compared.key], default="the next best")
        sign, frame, why = -1, compared.from_leader, "no other method can be paired with it"
    about = rival if sign < 0 else leader
    pairs = [
        _paired(compared.difference(frame, about, key), sign, f"{name}, {leader} minus {rival}", why)
        for key, name in (("average_accuracy", "final score"), ("backward_transfer", "backward transfer"))
    ]
    return [own[0], pairs[0], own[1], pairs[1], own[2], _to_bound(compared, leader)]


def _numbers_of_two(story: sweep_story.Story) -> list[KeyNumber]:
    """Return the six numbers of two runs side by side: each one's own, their difference, and the bytes kept."""
    compared, methods = story.compared, [one.method for one in story.cells]
    rival = next((method for method in methods if compared.difference(compared.differences, method)), None)
    if len(methods) != 2 or rival is None:
        return []
    own = [_number(compared, method, key) for key in (compared.key, "backward_transfer") for method in methods]
    apart = compared.difference(compared.differences, rival)
    difference = _paired(apart, 1, f"final score, {rival} minus {compared.sweep.baseline}", "")
    kept = Measure(f"bytes kept, {rival}", "lower", "What the method keeps on disk for later stages, after the last.")
    return [
        *own[:2],
        difference,
        *own[2:],
        KeyNumber(kept, sweep_story.kept_bytes(story, rival).removesuffix(" bytes")),
    ]


def _to_bound(compared: Comparison, leader: str) -> KeyNumber:
    """Return what a bound has more than the leader or, without a bound to pair it with, the leader's way there."""
    for bound in (JOINT, PER_TASK):
        if found := compared.difference(compared.from_leader, bound):
            return _paired(found, 1, f"final score, {bound} (bound) minus {leader}", "", "lower")
    return _number(compared, leader, "average_incremental_accuracy")


def _paired(found: Mapping[str, Any] | None, sign: int, name: str, why: str, better: str = "higher") -> KeyNumber:
    measure = Measure(name, better, "A paired difference, over the cells and test rows that both methods have.")
    if found is None:
        return KeyNumber(measure, "–", None, why)
    low, high = sorted((sign * found["low"], sign * found["high"]))
    return KeyNumber(measure, cell(sign * found["difference"], 3).text, _span((low, high)))


def _number(compared: Comparison, method: str, key: str) -> KeyNumber:
    defined, value = DEFINITIONS[key], compared.row(method)[key]
    measure = Measure(f"{defined.name}, {method}", defined.better, defined.definition)
    span = sweep_content.span_of(compared, method, key)
    known = "one cell: no interval" if math.isfinite(value) else "not defined for it"
    return KeyNumber(measure, cell(value, 3).text, _span(span), None if span else known)


def _span(span: tuple[float, float] | None) -> tuple[str, str] | None:
    return (cell(span[0], 3).text, cell(span[1], 3).text) if span else None


def _facts(sweep: Sweep) -> list[str]:
    models = dict.fromkeys(str((one.manifest.get("model") or {}).get("backbone") or "") for one in sweep.cells)
    counts = [(len(sweep.methods), "method"), (len({one.order for one in sweep.cells}), "order")]
    counts.append((len({one.seed for one in sweep.cells}), "seed"))
    found = [model for model in models if model] + ([f"base {sweep.base}"] if sweep.base else [])
    done = sum(one.matrix is not None for one in sweep.cells)
    found += [f"{num} {noun}{'s' * (num != 1)}" for num, noun in counts]
    return [
        *found,
        f"{done} of {len(sweep.cells)} cells",
        f"{len(sweep.headline_names)} of {len(sweep.tasks)} tasks in the headline mean",
    ]


def _notices(compared: Comparison, is_rough: bool) -> list[str]:
    """Return what a reader must know before the numbers: what failed, waits or cannot be read, and what is rough.

    ``is_rough`` is False where the page's opening says already that there is one cell a method.
    """
    sweep = compared.sweep
    found = []
    waiting = [one for one in sweep.cells if one.status == "waiting"]
    if waiting:
        of, be = len(sweep.cells), "is" if len(waiting) == 1 else "are"
        found.append(f"This sweep is not finished: {len(waiting)} of {of} cells {be} still to come.")
    found += [f"Failed: {one.place} ({one.directory}): {one.error}" for one in sweep.cells if one.status == "failed"]
    found += [f"{problem}. What needs it is left out." for problem in sweep.problems]
    if is_rough and len(compared.methods) and compared.methods["rough"].any():
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

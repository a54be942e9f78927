"""The first screen, the preflight and the routing story: what they call, and that they call nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sweep_files as files

from analysis import load_run, load_sweep, summarise
from analysis.report import preflight, story, words, write_report
from analysis.report.content import TableCell, cell, make_table
from analysis.report.page import KeyNumber
from analysis.report.run_page import run_page
from analysis.report.story_figures import story_figures
from analysis.report.sweep_page import sweep_page
from analysis.summaries.changes import task_changes
from analysis.summaries.row_spans import row_interval
from continual.storage import records

MakeRun = Callable[..., Path]
TINY = {"num_atoms": 4, "num_blocks": 2, "num_rows": 20, "num_steps": 6}


def write_scores(directory: Path, earned: np.ndarray, constant: float = 0.2, **facts: Any) -> Path:
    """Write a run of tasks a, b, ... whose rows earned ``earned``, shape (T + 1, T, rows), without routes."""
    names = list("abcdef"[: earned.shape[1]])
    files.write_cell(directory, names, earned, constants=dict.fromkeys(names, constant), **facts)
    return directory


def ones(*shares: list[float], num_rows: int = 40) -> np.ndarray:
    """Rows of which the first ``share`` earn 1: a row a stage, a column a task."""
    return (np.arange(num_rows) < np.round(np.array(shares) * num_rows)[..., None]).astype(float)


# ---- the verdict


def test_what_is_learnt_and_lost_is_called_by_its_interval(tmp_path: Path) -> None:
    """a is learnt and clearly lost; b is learnt and one row of 40 lower, within chance; c is just at the constant."""
    run = write_scores(
        tmp_path / "r", ones([0.2, 0.2, 0.2], [0.9, 0.2, 0.2], [0.6, 0.9, 0.2], [0.5, 0.875, 0.25]), 0.25
    )
    summary = summarise(load_run(run))
    changes = task_changes(summary).set_index("task")
    assert list(changes["taught"]) == pytest.approx([0.65, 0.65, 0.0])
    assert list(changes["kept"][:2]) == pytest.approx([-0.4, -0.025]) and np.isnan(changes.loc["c", "kept"])
    assert changes.loc["a", "kept_high"] < 0 and changes.loc["b", "kept_high"] == 0
    said = words.verdict(summary)
    assert said.startswith("The model learnt 2 of 3 tasks, and lost ground on 1 of 2 earlier ones; after 3 stages")
    assert "The largest fall is that of a: −0.40" in words.gloss(summary)
    rows = run_page(load_run(run)).tables["scores"][0].rows
    assert [row[8].text for row in rows] == ["lost", "not told apart", "–"]


def test_nothing_is_called_that_chance_explains(tmp_path: Path) -> None:
    near = ones([0.5, 0.5], [0.525, 0.5], [0.5, 0.525])
    summary = summarise(load_run(write_scores(tmp_path / "r", near)))
    assert words.verdict(summary).startswith(
        "No learning can be told from chance on any of the 2 tasks; after 2 stages"
    )
    assert "fall" not in words.gloss(summary)
    kept = ones([0.2, 0.2], [0.9, 0.2], [0.875, 0.9])
    said = words.verdict(summarise(load_run(write_scores(tmp_path / "kept", kept))))
    assert said.startswith("The model learnt both tasks, and no loss on the earlier one can be told from chance;")
    page = write_report(tmp_path / "kept").with_name("report.md").read_text(encoding="utf-8")
    assert "No column falls below its frame by more than chance." in page


def test_without_answers_nothing_is_called_learnt_or_lost(tmp_path: Path) -> None:
    run = write_scores(tmp_path / "r", ones([0.2, 0.2], [0.9, 0.2], [0.1, 0.9]))
    (run / "answers.parquet").unlink()
    summary = summarise(load_run(run))
    assert words.verdict(summary) == "After 2 stages the average accuracy is 0.50, from 0.20 untrained."
    assert "nothing is called learnt or lost" in words.gloss(summary)


@pytest.mark.parametrize("routes", [True, False])
def test_six_key_numbers_with_intervals(make_run: MakeRun, routes: bool) -> None:
    numbers = run_page(load_run(make_run(routes=routes, **TINY))).key_numbers
    assert len(numbers) == 6 and all(one.interval is not None for one in numbers)
    assert all(float(low.replace("−", "-")) <= float(high.replace("−", "-")) for low, high in spans(numbers))


def spans(numbers: Any) -> list[tuple[str, str]]:
    return [one.interval for one in numbers if isinstance(one, KeyNumber) and one.interval]


def test_a_sweeps_key_numbers_have_intervals_even_of_one_cell(tmp_path: Path) -> None:
    for name, orders in (("many", ("first", "second", "third")), ("one", ("first",))):
        numbers = sweep_page(load_sweep(files.plausible_sweep(tmp_path / name, orders=orders, num_rows=60))).key_numbers
        assert len(numbers) == 6 and all(one.interval is not None for one in numbers)
        assert numbers[0].measure.name == "headline average, growing" and "joint (bound)" in numbers[5].measure.name


def test_one_cells_interval_redraws_its_rows(tmp_path: Path) -> None:
    """Two tasks of 40 rows at 0.5: the mean's standard error is sqrt(0.25 / 80); transfer pairs a row with itself."""
    cells = [files.place("m", "x", 0)]
    half = ones([0.2, 0.2], [0.5, 0.2], [0.5, 0.5])
    files.write_cell(tmp_path / cells[0]["dir"], ["one", "two"], half)
    own = load_sweep(files.write_sweep(tmp_path, cells)).cells[0]
    found = row_interval(own, ["one", "two"], "average_accuracy")
    assert found is not None
    assert found == pytest.approx((0.5 - 1.96 * (0.25 / 80) ** 0.5, 0.5 + 1.96 * (0.25 / 80) ** 0.5), abs=0.02)
    assert row_interval(own, ["one", "two"], "backward_transfer") == (0.0, 0.0)
    assert row_interval(own, ["two"], "backward_transfer") is None  # the last task has had no time to forget
    assert row_interval(own, ["one"], "forgetting") is None


def test_methods_that_tie_share_the_lead_and_nothing_is_less_than_none(tmp_path: Path) -> None:
    half = ones([0.2, 0.2], [0.5, 0.2], [0.5, 0.5])
    cells = [files.place(method, "x", seed) for method in ("m", "n") for seed in (0, 1)]
    for one in cells:
        files.write_cell(tmp_path / one["dir"], ["one", "two"], half)
    page = sweep_page(load_sweep(files.write_sweep(tmp_path, cells, baseline="m")))
    assert page.verdict.startswith("m and n share the highest mean final score of 2 methods, 0.500 (")
    assert page.key_numbers[1].value == "0.000" and page.key_numbers[1].interval == ("0.000", "0.000")
    assert cell(-0.0001, 3).text == "0.000" and cell(-0.001, 3).text == "−0.001"


# ---- the preflight


def test_preflight_by_hand(tmp_path: Path) -> None:
    """b's bound, its own just-trained score, is 0.04 above the best constant answer: no forgetting can show on it."""
    run = write_scores(tmp_path / "r", ones([0.2, 0.2], [0.9, 0.2], [0.8, 0.24], num_rows=50))
    manifest = json.loads((run / "manifest.json").read_text())
    more = {"train_rows": 200, "test_rows": 50, "cut_rows": {"train": 3, "test": 1}, "dropped_shared_rows": 7}
    manifest["tasks"]["a"] |= more
    (run / "manifest.json").write_text(json.dumps(manifest))
    summary = summarise(load_run(run))
    checks = preflight.run_checks(summary)
    assert [check.passes for check in checks] == [True, False] and [check.source for check in checks] == [
        "this run"
    ] * 2
    table = preflight.table(checks)
    found = dict(zip(table.columns, table.rows[0], strict=True))
    assert (found["bound"].text, found["bound over constant"].text) == ("0.900", "0.700")
    assert (found["training rows"].line, found["test rows"].line) == ("200 (1.5 % cut)", "50 (2.0 % cut)")
    assert found["shared rows dropped"].text == "7" and found["smallest difference"].text == "0.196"
    page = run_page(load_run(run))
    said = " ".join(point.text for point in page.points["preflight"])
    assert "1 of 2 tasks" in said and "Not so: b" in said and "alone the average final score is 0.80." in said
    assert "Contexts were shortened on a." in said
    assert [section[0] for section in page.sections][:2] == ["preflight", "scores"]


def test_the_bound_is_the_per_task_run_where_there_is_one(tmp_path: Path) -> None:
    run = write_scores(tmp_path / "r", ones([0.2, 0.2], [0.9, 0.2], [0.8, 0.22]))
    write_scores(run / "bounds" / "per_task", ones([0.2, 0.2], [0.7, 0.2], [0.7, 0.6]))
    checks = preflight.run_checks(summarise(load_run(run)))
    assert [check.bound for check in checks] == pytest.approx([0.7, 0.6])
    assert {check.source for check in checks} == {"per_task"} and all(check.passes for check in checks)


def test_an_unfinished_task_is_not_judged(make_run: MakeRun) -> None:
    run = load_run(make_run(finished=1, names=["one", "two"], **TINY))
    assert [check.passes for check in preflight.run_checks(summarise(run))] == [True, None]
    assert "Not known yet: two." in preflight.points(preflight.run_checks(summarise(run)), "")[0].text


@pytest.mark.usefixtures("sketched")
def test_a_sweeps_preflight_stands_before_its_results(tmp_path: Path) -> None:
    page = write_report(files.plausible_sweep(tmp_path, num_tasks=3, num_rows=40))
    text = page.with_name("report.md").read_text(encoding="utf-8")
    assert text.index("## Preflight") < text.index("## Scores and costs")
    assert re.search(r"\| coin_toss +\| labels +\| .*per_task.*\| +no +\|", text)


# ---- the routing story


def write_routes(directory: Path) -> Path:
    """A run of two tasks over three atoms: a's routes move at stage 2 from atom 0 to atom 1, which b uses too."""
    write_scores(directory, ones([0.2, 0.2], [0.9, 0.2], [0.4, 0.9]))
    routes = {0: [(0.4, 0.3, 0.3)] * 2, 1: [(0.9, 0.1, 0.0), (0.4, 0.3, 0.3)], 2: [(0.2, 0.8, 0.0), (0.0, 0.9, 0.1)]}
    usage, halves = [], []
    for stage, tasks in routes.items():
        for task, shares in zip("ab", tasks, strict=True):
            key = {"run": "r", "seed": 0, "stage": stage, "task": task, "block": 0, "direction": "none", "count": 9}
            usage += [key | {"atom": atom, "metric": "usage", "value": share} for atom, share in enumerate(shares)]
            halves.append(key | {"other": task, "metric": "js_split_half", "value": 0.01})
    records.append(directory, "routing", usage)
    records.append(directory, "separation", halves)
    return directory


def test_the_story_by_hand(tmp_path: Path) -> None:
    summary = summarise(load_run(write_routes(tmp_path / "r")))
    first, last = story.chapters(summary)
    assert first.atoms == [(1, pytest.approx(0.8)), (0, pytest.approx(0.2))]
    assert (first.nearest, first.common) == ("b", pytest.approx(0.8))  # 1 - (0.2 + 0.1 + 0.1) / 2
    assert (first.stage, first.at, first.lost) == (2, "b", pytest.approx(0.5)) and last.stage == 0
    p, q, m = np.array([0.2, 0.8]), np.array([0.9, 0.1]), np.array([0.55, 0.45])
    moved = float((p * np.log(p / m) + q * np.log(q / m)).sum() / 2)
    assert first.moved == pytest.approx(moved) and first.null == pytest.approx(0.01) and first.beyond_chance
    said = story.points([first])[0].text
    assert said.startswith("Uses atoms 1 (0.80), 0 (0.20) most. Shares most with b: 0.80 of its routing weight.")
    assert "27.54 times the split-half null; it lost 0.50 (" in said


def test_a_move_within_its_null_is_not_called_one(make_run: MakeRun) -> None:
    told = story.chapters(summarise(load_run(make_run(num_rows=40, num_steps=6))))
    for chapter, point in zip(told, story.points(told), strict=True):
        if chapter.beyond_chance is False:
            assert "not told from chance" in point.text and "lost" not in point.text
        low, high = chapter.lost_span
        assert ("it lost" in point.text) == (bool(chapter.beyond_chance) and low > 0)
        assert ("it gained" in point.text) == (bool(chapter.beyond_chance) and high < 0)
    assert {chapter.beyond_chance for chapter in told} == {True, False, None}


def test_drift_predicts_forgetting_only_where_its_interval_says_so(make_run: MakeRun) -> None:
    for seed in (3, 4, 5):
        summary = summarise(load_run(make_run(f"run-{seed}", seed=seed, num_rows=40, num_steps=6)))
        content = next(content for content in story_figures(summary) if content.name == "drift_against_loss")
        found = re.search(r"interval (\S+) to (\S+),", content.alt.replace("−", "-"))
        assert found is not None
        if float(found[1]) < 0 < float(found[2]):
            assert content.see == "Not shown: the interval of the correlation holds 0."


# ---- tables


def test_intervals_stand_under_their_numbers_and_in_one_line_in_a_terminal() -> None:
    held = TableCell("0.50", 0.5, "0.40 to 0.60")
    assert held.line == "0.50 (0.40 to 0.60)" and cell(0.5).line == "0.50"
    table = make_table("k", "t", ["name", "value", "nothing"], [[TableCell("a"), held, cell(None)]])
    assert table.numeric == [False, True, True]

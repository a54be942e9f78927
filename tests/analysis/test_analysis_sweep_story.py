"""The story of single runs side by side: worked by hand, in words that the intervals allow, and on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sweep_files as files
from conftest import routing_tables, usage_model

from analysis import load_sweep
from analysis.report import write_report
from analysis.report.sweep_content import compare
from analysis.report.sweep_story import Story, figures, gloss, points, story_of, verdict

STAGES = ["one", "two", "three"]
PLAIN = [[0.1, 0.1, 0.1], [0.8, 0.1, 0.1], [0.4, 0.9, 0.1], [0.3, 0.1, 0.7]]
KEEPS = [[0.1, 0.1, 0.1], [0.8, 0.1, 0.1], [0.8, 0.9, 0.1], [0.8, 0.9, 0.6]]


def earned(scores: list[list[float]], num_rows: int = 20) -> np.ndarray:
    """Rows that earn 1 as often as ``scores`` (a row a stage, a column a task) says, the first ones first."""
    return (np.arange(num_rows) < np.round(np.array(scores) * num_rows)[..., None]).astype(float)


def write(directory: Path, methods: dict[str, list[list[float]]], routes: bool = True, seeds: int = 1) -> Path:
    cells = []
    for (method, scores), seed in ((item, seed) for item in methods.items() for seed in range(seeds)):
        cells.append(files.place(method, "base", seed))
        stored = {str(stage): 1300 * stage * (method != "plain") for stage in range(len(scores))}
        place = directory / cells[-1]["dir"]
        files.write_cell(place, STAGES[: len(scores[0])], earned(scores), seed, stored_bytes=stored)
        if routes:
            routing_tables(place, STAGES[: len(scores[0])], usage_model(len(scores[0]), len(scores) - 1, 2, 6, seed))
    return files.write_sweep(directory, cells, baseline="plain")


def story(directory: Path) -> Story:
    found = story_of(compare(load_sweep(directory)))
    assert found is not None
    return found


def test_what_became_of_each_task_by_hand(tmp_path: Path) -> None:
    told = story(write(tmp_path, {"plain": PLAIN, "keeps": KEEPS}))
    found = told.changes.set_index(["method", "task"])
    row = found.loc[("plain", "one")]
    assert tuple(row[["untrained", "trained", "final"]]) == (0.1, 0.8, 0.3)
    assert row["kept"] == pytest.approx(-0.5) and row["low"] < -0.5 < row["high"] < 0 and row["verdict"] == "lost"
    still = found.loc[("keeps", "two")]
    assert (still["kept"], still["low"], still["high"], still["verdict"]) == (0, 0, 0, "not told from chance")
    assert found.loc[("plain", "three"), "verdict"] == "" and np.isnan(found.loc[("plain", "three"), "kept"])


def test_the_verdict_and_what_it_rests_on(tmp_path: Path) -> None:
    mixed = [[0.1] * 3, [0.8, 0.1, 0.1], [0.8, 0.9, 0.1], [0.8, 0.2, 0.6]]
    told = story(write(tmp_path, {"plain": PLAIN, "keeps": KEEPS, "mixed": mixed}))
    assert verdict(told) == (
        "plain forgot: one fell from 0.80 to 0.30 and two from 0.90 to 0.10; "
        "keeps forgot nothing that can be told from chance: one went from 0.80 to 0.80 and two from 0.90 to 0.90; "
        "mixed forgot: two fell from 0.90 to 0.20, while one went from 0.80 to 0.80."
    )
    text = gloss(told)
    assert "plain 0.367, keeps 0.767 and mixed 0.533" in text and "keeps minus plain: 0.400 (" in text
    assert "Kept on disk for later stages: plain nothing, keeps 3,900 bytes and mixed 3,900 bytes." in text
    assert "One seed, one order and 20 test rows a task" in text


def test_routes_are_told_from_each_tasks_own_stage(tmp_path: Path) -> None:
    told = story(write(tmp_path, {"plain": PLAIN, "keeps": KEEPS}))
    moved = told.moved("plain").set_index("task")
    assert list(moved.index) == ["one", "two"] and (moved["value"] > 0).all()
    assert moved["null"].tolist() == pytest.approx([0.0045, 0.0045])
    (plain, _) = points(told)
    assert plain.term == "plain" and f"one {moved.loc['one', 'value']:.4f} and two" in plain.text
    assert "one: −0.500 (" in plain.text and "halves of one task differ by 0.0045 at most" in plain.text
    scores, moves = figures(told)
    assert scores.draw is not None and moves.draw is not None
    panels = [ax.get_title() for ax in moves.draw().axes if ax.get_title()]
    assert panels == ["plain", "keeps"]
    texts = [text.get_text() for text in scores.draw().axes[0].texts]
    assert texts == [f"{score:.2f}" for row in PLAIN for score in row]


@pytest.mark.parametrize(
    ("methods", "seeds"),
    [
        ({"plain": PLAIN}, 1),
        ({"plain": PLAIN, "keeps": KEEPS}, 2),
        ({"plain": PLAIN, "joint": KEEPS}, 1),
        ({"plain": PLAIN, "other": [row[:2] for row in PLAIN[:3]]}, 1),
        (dict.fromkeys(("plain", "a", "b", "c", "d"), PLAIN), 1),
        ({"plain": [[0.1], [0.8]], "keeps": [[0.1], [0.9]]}, 1),
    ],
    ids=["one method", "two seeds", "a bound", "other stages", "too many methods", "one stage"],
)
def test_other_sweeps_have_no_story(tmp_path: Path, methods: dict[str, Any], seeds: int) -> None:
    assert story_of(compare(load_sweep(write(tmp_path, methods, routes=False, seeds=seeds)))) is None


def test_runs_without_answers_have_none_either(tmp_path: Path) -> None:
    directory = write(tmp_path, {"plain": PLAIN, "keeps": KEEPS}, routes=False)
    (directory / "cells/keeps/base-seed0/answers.parquet").unlink()
    assert story_of(compare(load_sweep(directory))) is None


@pytest.mark.usefixtures("sketched")
def test_the_page_opens_with_the_story(tmp_path: Path) -> None:
    directory = write(tmp_path, {"plain": PLAIN, "keeps": KEEPS})
    report = write_report(directory)
    text = report.with_name("report.md").read_text(encoding="utf-8")
    assert text.index("plain forgot: one fell") < text.index("## What was forgotten and what was kept")
    assert text.index("## What was forgotten and what was kept") < text.index("## Run by run") < text.index("## Scores")
    assert "- bytes kept, keeps: 3,900" in text and "Methods side by side" in text
    assert "Intervals are rough" not in text  # the opening says so in its own words
    html = report.read_text(encoding="utf-8")
    assert len(re.findall(r'id="figure-(?:scores|moves)_side_by_side"', html)) == 2
    (row, *_) = json.loads(report.with_name("summary.json").read_text())["changes"]
    assert (row["method"], row["task"], row["verdict"]) == ("plain", "one", "lost")


@pytest.mark.usefixtures("sketched")
def test_runs_that_recorded_no_routes_say_so(tmp_path: Path) -> None:
    report = write_report(write(tmp_path, {"plain": PLAIN, "keeps": KEEPS}, routes=False))
    text = report.with_name("report.md").read_text(encoding="utf-8")
    assert "no run recorded routes" in text and not (report.parent / "figures" / "moves_side_by_side.png").exists()
    assert "Routes moved since trained" not in text


@pytest.mark.usefixtures("sketched")
def test_a_score_below_nothing_is_drawn_too(tmp_path: Path) -> None:
    """R2 has no lower end: the figure is drawn, and the value written."""
    from analysis.report import sweep_story

    told = story(write(tmp_path, {"plain": PLAIN, "keeps": KEEPS}))
    frame = sweep_story._scores(told)
    frame.loc[0, "value"] = -31.5
    ax = sweep_story.drawings.score_matrices(frame).axes[0]
    assert ax.texts[0].get_text() == "−31.5"

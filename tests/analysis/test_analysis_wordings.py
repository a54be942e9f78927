"""Reworded prompts and general ability in the analysis: tables by hand, intervals, and when the report shows them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import load, load_run
from analysis.report import write_report
from analysis.runs.frames import Frame
from analysis.summaries.general import general_ability
from analysis.summaries.wordings import wording_table
from continual.storage import records


def keys(stage: int, task: str) -> dict[str, Any]:
    return {"run": "stages-1a2b3c", "seed": 0, "stage": stage, "task": task}


def measured(stage: int, nats: float) -> dict[str, Any]:
    metric = {"metric": "log_likelihood_nats", "direction": "higher", "value": nats, "count": 100}
    return keys(stage, "general") | metric


@pytest.fixture
def run_dir(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run of three stages, 40 rows a task, to add tables to."""
    return Path(shutil.copytree(small_run, tmp_path / "run"))


def add_words(run_dir: Path, wording: str, earned: Callable[[np.ndarray, int], np.ndarray], tasks: int = 3) -> None:
    """Add answers under reworded prompts: ``earned`` gives them from a task's answers in the trained ones."""
    place = {"wording": wording, "where": "both", "options": "kept"}
    rows: list[dict[str, Any]] = []
    answers: Frame = records.read(run_dir, "answers")
    for index, task in enumerate(load_run(run_dir).stages[:tasks]):
        own = answers[(answers["stage"] == 3) & (answers["task"] == task)].sort_values("row")
        for row, got in zip(own["row"], earned(own["value"].to_numpy(), index), strict=True):
            rows.append(keys(3, task) | place | {"row": int(row), "value": float(got)})
    records.append(run_dir, "wording_answers", rows)


def test_the_same_answers_differ_by_nothing_and_their_interval_is_a_point(run_dir: Path) -> None:
    add_words(run_dir, "others-1", lambda values, _: values)
    (line,) = wording_table(load_run(run_dir)).to_dict("records")
    assert (line["words"], line["num_tasks"], line["difference"], line["low"], line["high"]) == ("others", 3, 0, 0, 0)
    assert line["score"] == line["trained"]


def test_a_difference_is_the_mean_over_tasks_of_paired_rows(run_dir: Path) -> None:
    # Two paraphrases: in the first, 4 of 40 rows lose a point in the first task alone; in the second, nothing changes.
    add_words(run_dir, "others-1", lambda values, task: values - (task == 0) * (np.arange(40) < 4))
    add_words(run_dir, "others-2", lambda values, _: values)
    add_words(run_dir, "wrong", lambda values, _: values * 0, tasks=2)
    table = wording_table(load_run(run_dir)).set_index("words")
    assert table.loc["others", "difference"] == pytest.approx(-(0.1 / 2) / 3)
    assert table.loc["wrong", "difference"] == pytest.approx(-table.loc["wrong", "trained"])
    assert table["num_tasks"].to_dict() == {"others": 3, "wrong": 2}
    # The rows of a share p = 0.1 of one task of three: a spread of sqrt(p (1 - p) / 40) / 2 / 3 about the difference.
    spread = np.sqrt(0.1 * 0.9 / 40) / 6
    assert table.loc["others", "high"] - table.loc["others", "low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert table.loc["others", "low"] < table.loc["others", "difference"] < table.loc["others", "high"] <= 0


def test_general_ability_is_a_change_against_stage_0(run_dir: Path) -> None:
    assert general_ability(load_run(run_dir)).empty
    rows = [measured(stage, nats) for stage, nats in enumerate([-4.0, -4.4, -4.2, -4.1])]
    records.append(run_dir, "general", rows)
    assert general_ability(load_run(run_dir))["change"].to_list() == pytest.approx([0, -0.1, -0.05, -0.025])
    assert len(load(run_dir).general) == 4


@pytest.mark.usefixtures("sketched")
def test_the_report_shows_both_where_there_are_any_and_no_empty_section(run_dir: Path) -> None:
    text = write_report(run_dir).with_suffix(".md").read_text()
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert "## Reworded prompts" not in text and "## General ability" not in text
    assert (
        summary["general_ability_change"] is None and "did not record" in summary["reasons"]["general_ability_change"]
    )
    add_words(run_dir, "others-1", lambda values, _: values)
    records.append(run_dir, "general", [measured(stage, -4 - 0.01 * stage) for stage in range(4)])
    text = write_report(run_dir).with_suffix(".md").read_text()
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert "| others | prompt and gate | kept" in text and "General ability by stage" in text
    assert summary["general_ability_change"] == pytest.approx(-0.0075)
    assert (run_dir / "report" / "figures" / "general_ability.svg").is_file()

"""A run that scores some tasks after some stages only: what needs no missing score is there, the rest says why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.report import write_report
from analysis.runs.load import load_run
from analysis.summaries.summary import summarise

MakeRun = Callable[..., Path]
NEEDED = ("average_accuracy", "backward_transfer", "learning_accuracy")


def keep(directory: Path, scored: Callable[[int, int], bool]) -> None:
    """Drop what a run with fewer scores would not have written; ``scored`` takes a stage and a task's own stage."""
    order = {name: index for index, name in enumerate(load_run(directory).stages, start=1)}
    for table in ("scores", "answers", "routing", "separation", "drift"):
        path = directory / f"{table}.parquet"
        rows = pq.read_table(path)
        columns = rows.to_pydict()
        mask = [scored(stage, order[task]) for stage, task in zip(columns["stage"], columns["task"], strict=True)]
        pq.write_table(rows.filter(pa.array(mask)), path)


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("scoring", ["seen", "final"])
def test_measures_that_need_no_missing_score_stay_as_they_were(scoring: str, make_run: MakeRun) -> None:
    directory = make_run(num_rows=40, num_atoms=6, num_blocks=2, num_steps=6)
    whole = summarise(load_run(directory))
    last = len(whole.run.stages)

    def scored(stage: int, own: int) -> bool:
        return stage in (0, last) or stage == own or (scoring == "seen" and own <= stage)

    keep(directory, scored)
    summary = summarise(load_run(directory))
    for key in NEEDED:
        assert summary.values[key] == whole.values[key] and key in summary.intervals
    assert summary.values["forward_transfer"] is None and "is missing" in summary.reasons["forward_transfer"]
    assert summary.values["forgetting"] is None  # its maximum runs over all earlier stages, untrained ones too
    assert math.isnan(summary.matrix[1, 1]) and not math.isnan(summary.matrix[0, 1])
    write_report(directory)
    written = json.loads((directory / "report" / "summary.json").read_text())
    assert written["score_matrix"][1][1] is None


@pytest.mark.usefixtures("sketched")
def test_a_run_whose_earlier_stages_trained_nothing(make_run: MakeRun) -> None:
    directory = make_run(num_rows=40, num_atoms=6, num_blocks=2, num_steps=6)
    last = len(load_run(directory).stages)
    keep(directory, lambda stage, own: stage in (0, last))
    write_report(directory)
    written = json.loads((directory / "report" / "summary.json").read_text())
    assert written["average_accuracy"] is not None
    assert written["backward_transfer"] is None and written["learning_accuracy"] is None
    assert set(written["reasons"]) >= {"backward_transfer", "learning_accuracy", "forgetting"}
    assert "–" in (directory / "report" / "report.md").read_text()


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("facts", [{}, None, {"0": "soon"}])
def test_a_run_that_does_not_say_how_long_scoring_took(facts: dict[str, object] | None, make_run: MakeRun) -> None:
    directory = make_run(num_rows=10, num_atoms=6, num_blocks=2, num_steps=6)
    manifest = directory / "manifest.json"
    state = json.loads(manifest.read_text())
    spent = [sum(state[key].values()) for key in ("scoring_seconds", "stage_seconds")]
    share = f"Scoring took {100 * spent[0] / spent[1]:.0f} % of the time."
    assert share in write_report(directory).read_text()
    manifest.write_text(json.dumps(state | {"scoring_seconds": facts}))
    assert "of the time." not in write_report(directory).read_text()

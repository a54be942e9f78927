"""Sweeps: means and paired differences worked by hand, and the report of any sweep."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import sweep_files as files
import test_analysis_page as page_tests

from analysis import RunReadError, figures, load_sweep, method_table, paired_differences
from analysis.measures import hierarchy
from analysis.report import published, write_report
from analysis.report.command import main
from analysis.report.sweep_content import compare, edges
from analysis.report.sweep_figures import sweep_figures
from analysis.summaries import differences
from analysis.summaries.sweeps import ABOVE, BELOW, EVEN, headline_tasks
from continual.storage import records

FOREST = "paired_differences"
FIGURES = {"methods_side_by_side", FOREST, "scores_by_task", "accuracy_by_stage"}


def earned(*scores: list[float], num_rows: int = 10) -> np.ndarray:
    """Rows that earn 1 as often as ``scores`` (a row a stage, a column a task) says, the first ones first."""
    matrix = np.array(scores)
    return (np.arange(num_rows) < np.round(matrix * num_rows)[..., None]).astype(float)


def by_hand(directory: Path, cells: dict[tuple[str, str, int], np.ndarray], stages: list[str], **facts: Any) -> Path:
    """Write a sweep whose cells (method, order, seed) earned what is given."""
    places = []
    for (method, order, seed), rows in cells.items():
        places.append(files.place(method, order, seed))
        more = {key: facts[key] for key in ("constants", "rows") if key in facts}
        files.write_cell(directory / places[-1]["dir"], stages, rows, seed, **more)
    return files.write_sweep(
        directory, places, **{key: facts[key] for key in facts if key not in ("constants", "rows")}
    )


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plausible sweep of three methods and two bounds over two orders, one of them with two seeds."""
    methods = ("growing", "ewc", "sequential", "joint", "per_task")
    directory = tmp_path_factory.mktemp("trial")
    return files.plausible_sweep(directory, methods, 4, ("first", "second"), {"first": 2}, num_rows=60)


@pytest.fixture(scope="module")
def report(trial: Path) -> Path:
    return write_report(trial)


# ---- the numbers

A = earned([0.2, 0.2], [0.8, 0.2], [0.6, 0.9])  # average 0.75, backward transfer -0.2, learning accuracy 0.85
B = earned([0.2, 0.2], [0.9, 0.2], [0.9, 0.9])  # 0.9, 0, 0.9
C = earned([0.2, 0.2], [0.5, 0.2], [0.4, 0.6])  # 0.5, -0.1, 0.55
JOINT = earned([0.2, 0.2], [0.9, 0.2], [0.9, 1.0])  # learning accuracy 0.95


def test_means_worked_by_hand(tmp_path: Path) -> None:
    """Order x has the seeds A and B, order y has C: each order counts the same, (mean(A, B) + C) / 2."""
    cells = {("m", "x", 0): A, ("m", "x", 1): B, ("m", "y", 0): C, ("joint", "x", 0): JOINT}
    table = method_table(load_sweep(by_hand(tmp_path, cells, ["one", "two"]))).set_index("method")
    found = table.loc["m"]
    assert found["cells"] == 3 and found["rough"]
    assert found["average_accuracy"] == pytest.approx(((0.75 + 0.9) / 2 + 0.5) / 2)
    assert found["backward_transfer"] == pytest.approx(((-0.2 + 0.0) / 2 - 0.1) / 2)
    assert found["learning_accuracy"] == pytest.approx(((0.85 + 0.9) / 2 + 0.55) / 2)
    assert found["forgetting"] == pytest.approx(((0.2 + 0.0) / 2 + 0.1) / 2)
    assert found["forward_transfer"] == pytest.approx(0)
    # Mean over stages of joint minus just-trained, in the one cell that joint has too: (0.9 - 0.8 + 1.0 - 0.9) / 2.
    assert found["intransigence"] == pytest.approx(0.1)
    # A quarter of the draws take y twice, so the low end is C's; 1/64 take x twice and B four times (0.9), 1/16 take x
    # twice and B three times, so the upper 2.5 % begin there: (0.75 + 3 * 0.9) / 4.
    assert found["average_accuracy_low"] == pytest.approx(0.5)
    assert found["average_accuracy_high"] == pytest.approx(0.8625)
    assert np.isnan(table.loc["joint"]["average_accuracy_low"]) and np.isnan(table.loc["joint"]["intransigence"])


def test_the_micro_mean_stands_beside_the_macro_mean(tmp_path: Path) -> None:
    """Finals 0.6 and 0.9 over 10 and 30 rows: (6 + 27) / 40. R2 is no mean over rows and has none."""
    directory = by_hand(tmp_path, {("m", "x", 0): A, ("r2", "x", 0): A}, ["one", "two"])
    cell = directory / "cells/m/x-seed0"
    rows = records.read(cell, "scores").assign(count=lambda frame: frame["task"].map({"one": 10, "two": 30}))
    (cell / "scores.parquet").unlink()
    records.append(cell, "scores", rows.to_dict("records"))
    cell = directory / "cells/r2/x-seed0"
    (cell / "scores.parquet").unlink()
    records.append(cell, "scores", rows.assign(metric="r2").to_dict("records"))
    facts = json.loads((cell / "manifest.json").read_text())
    facts["tasks"] = dict.fromkeys(facts["tasks"], {"metric": "r2"})
    (cell / "manifest.json").write_text(json.dumps(facts))
    found = method_table(load_sweep(directory)).set_index("method")
    assert found.loc["m", "average_accuracy"] == pytest.approx(0.75)
    assert found.loc["m", "micro_average_accuracy"] == pytest.approx(0.825)
    assert np.isnan(found.loc["r2", "micro_average_accuracy"])


def test_paired_differences_worked_by_hand(tmp_path: Path) -> None:
    """Two cells in common (a third has no twin): (0.9 - 0.75 + 0.9 - 0.5) / 2, over two orders."""
    cells = {("base", "x", 0): A, ("m", "x", 0): B, ("base", "y", 0): C, ("m", "y", 0): B, ("m", "y", 1): B}
    sweep = load_sweep(by_hand(tmp_path, cells, ["one", "two"]))
    found = paired_differences(sweep, "base")
    every = found[found["tasks"] == "all"].set_index("measure")
    assert list(every["cells"]) == [2, 2] and list(found["method"].unique()) == ["m"]
    assert every.loc["average_accuracy", "difference"] == pytest.approx((0.15 + 0.4) / 2)
    assert every.loc["backward_transfer", "difference"] == pytest.approx((0.2 + 0.1) / 2)
    assert every.loc["average_accuracy", "verdict"] == ABOVE
    other = paired_differences(sweep, "m").set_index(["tasks", "measure"]).loc[("all", "average_accuracy")]
    assert other["difference"] == pytest.approx(-0.275) and other["verdict"] == BELOW
    assert (other["low"], other["high"]) == pytest.approx(
        (-every.loc["average_accuracy", "high"], -every.loc["average_accuracy", "low"])
    )


def test_tasks_of_few_rows_are_a_group_of_their_own(tmp_path: Path) -> None:
    """An eighth of the largest task's training rows is few; only a headline task counts."""
    directory = by_hand(tmp_path, {("base", "x", 0): A, ("m", "x", 0): B}, ["one", "two"])
    assert not load_sweep(directory).few_row_names
    for cell in directory.glob("cells/*/*"):
        facts = json.loads((cell / "manifest.json").read_text())
        facts["tasks"]["one"]["trained_rows"], facts["tasks"]["two"]["trained_rows"] = 64, 512
        (cell / "manifest.json").write_text(json.dumps(facts))
    sweep = load_sweep(directory)
    assert sweep.few_row_names == ["one"]
    found = paired_differences(sweep, "base").set_index(["tasks", "measure"])["difference"]
    assert found["few rows", "average_accuracy"] == pytest.approx(0.9 - 0.6)
    assert found["all", "average_accuracy"] == pytest.approx(0.9 - 0.75)
    forest = next(
        content for content in sweep_figures(compare(replace(sweep, baseline="base"))) if content.name == FOREST
    )
    assert forest.draw is not None
    dots = [line for line in forest.draw().axes[0].lines if str(line.get_marker()) in ("o", "D")]
    assert len(dots) == 1  # the headline tasks' alone: those of few rows stand in the table


def test_a_bound_scored_at_the_end_alone_is_compared_too(tmp_path: Path) -> None:
    """Joint training may skip all stages but the last: it has final scores, and none to have forgotten from."""
    directory = by_hand(tmp_path, {("base", "x", 0): A, ("joint", "x", 0): B}, ["one", "two"])
    whole = paired_differences(load_sweep(directory), "base").set_index(["tasks", "measure"])
    for table in ("scores", "answers"):
        path = directory / "cells" / "joint" / "x-seed0" / f"{table}.parquet"
        kept = pq.read_table(path).filter(pc.field("stage") != 1)
        pq.write_table(kept, path)
    sweep = load_sweep(directory)
    assert not sweep.problems
    found = paired_differences(sweep, "base").set_index(["tasks", "measure"])
    assert set(found.index.get_level_values("measure")) == {"average_accuracy"}
    columns = ["difference", "low", "high", "verdict"]
    for tasks, measure in found.index:
        assert tuple(found.loc[(tasks, measure), columns]) == tuple(whole.loc[(tasks, measure), columns])


def test_one_cell_gives_the_rows_share_and_equal_methods_are_not_told_apart(tmp_path: Path) -> None:
    cells = {("base", "x", 0): A, ("same", "x", 0): A, ("more", "x", 0): earned([0.2] * 2, [0.8, 0.2], [0.7, 0.9])}
    found = paired_differences(load_sweep(by_hand(tmp_path, cells, ["one", "two"])), "base")
    found = found[(found["measure"] == "average_accuracy") & (found["tasks"] == "all")].set_index("method")
    assert tuple(found.loc["same", ["difference", "low", "high", "verdict"]]) == (0, 0, 0, EVEN)
    # One row of ten in one task of two: 0.05, and a third of the draws do not hold that row, so 0 is inside.
    assert found.loc["more", "difference"] == pytest.approx(0.05)
    assert found.loc["more", "low"] == 0 and found.loc["more", "high"] > 0.1 and found.loc["more", "verdict"] == EVEN


def test_rows_are_matched_by_their_number(tmp_path: Path) -> None:
    """The baseline's rows 5..14 share 5..9 with the method's 0..9; all of those it gets wrong, the method right."""
    cells = [files.place("base", "x", 0), files.place("m", "x", 0)]
    ones, zeros = np.ones((2, 1, 10)), np.concatenate([np.zeros((2, 1, 5)), np.ones((2, 1, 5))], axis=2)
    files.write_cell(tmp_path / cells[0]["dir"], ["one"], zeros, rows=range(5, 15))
    files.write_cell(tmp_path / cells[1]["dir"], ["one"], ones, rows=range(10))
    found = paired_differences(load_sweep(files.write_sweep(tmp_path, cells)), "base")
    assert list(found["difference"]) == [1.0, 1.0] and set(found["measure"]) == {"average_accuracy"}


def test_orders_of_other_stages_compare_task_by_task(tmp_path: Path) -> None:
    """Two orders of the same tasks: rows meet by the task's name, whatever its column."""
    cells = []
    for order, stages in (("x", ["one", "two"]), ("y", ["two", "one"])):
        for method, one, two in (("base", 0.5, 0.5), ("m", 0.9, 0.5)):
            final = [one, two] if stages[0] == "one" else [two, one]
            cells.append(files.place(method, order, 0))
            files.write_cell(tmp_path / cells[-1]["dir"], stages, earned([0.2, 0.2], final, final))
    sweep = load_sweep(files.write_sweep(tmp_path, cells, baseline="base"))
    found = paired_differences(sweep, "base").set_index(["tasks", "measure"])
    assert found.loc[("all", "average_accuracy"), "difference"] == pytest.approx(0.2)


def test_a_task_whose_answers_no_cell_has_hinders_no_other(tmp_path: Path) -> None:
    cells = []
    for method, score in (("base", 0.5), ("m", 0.7)):
        for order, stages in (("one", ["a", "b"]), ("two", ["c", "d"])):
            cells.append(files.place(method, order, 0))
            values = earned([0, 0], [score, 0], [score, score])
            files.write_cell(tmp_path / cells[-1]["dir"], stages, values)
            if order == "two":
                (tmp_path / cells[-1]["dir"] / "answers.parquet").unlink()
    found = paired_differences(load_sweep(files.write_sweep(tmp_path, cells)), "base")
    found = found.set_index(["tasks", "measure"])
    assert found.loc[("all", "average_accuracy"), "difference"] == pytest.approx(0.2)


def test_headline_tasks_by_hand(tmp_path: Path) -> None:
    """per_task is the bound where there is one, else the best just-trained score; 0.30 does not beat 0.28 by 0.05."""
    cells = {
        ("m", "x", 0): earned([0.1, 0.1], [0.9, 0.1], [0.9, 0.9]),
        ("per_task", "x", 0): earned([0.1] * 2, [0.8, 0.1], [0.8, 0.3]),
    }
    constants = {"one": 0.25, "two": 0.28}
    sweep = load_sweep(by_hand(tmp_path / "with", cells, ["one", "two"], constants=constants))
    found = headline_tasks(sweep).set_index("task")
    assert list(found["bound"]) == pytest.approx([0.8, 0.3]) and list(found["headline"]) == [True, False]
    assert method_table(sweep).set_index("method").loc["m", "headline_accuracy"] == pytest.approx(0.9)
    del cells[("per_task", "x", 0)]
    without = load_sweep(by_hand(tmp_path / "without", cells, ["one", "two"], constants=constants))
    assert list(headline_tasks(without)["bound_from"]) == ["m", "m"] and len(without.headline_names) == 2


def test_the_untrained_backbone_has_an_average_and_no_stages(tmp_path: Path) -> None:
    cells = {("zero_shot", "x", 0): earned([0.3, 0.1]), ("m", "x", 0): A}
    sweep = load_sweep(by_hand(tmp_path, cells, ["one", "two"]))
    found = method_table(sweep).set_index("method").loc["zero_shot"]
    assert found["average_accuracy"] == pytest.approx(0.2) and np.isnan(found["backward_transfer"])
    assert list(paired_differences(sweep, "zero_shot")["measure"].unique()) == ["average_accuracy"]


@pytest.mark.usefixtures("sketched")
def test_a_run_that_scores_a_task_after_its_own_stage_and_at_the_end_only(tmp_path: Path) -> None:
    """A bound's run: what needs the other scores is not given, the rest is."""
    cells = {("base", "x", 0): A, ("joint", "x", 0): JOINT}
    directory = by_hand(tmp_path, cells, ["one", "two"], baseline="base")
    place = directory / "cells/joint/x-seed0"
    for table in ("scores", "answers"):
        frame: Any = pd.read_parquet(place / f"{table}.parquet")
        own = (frame["stage"] == 2) | ((frame["stage"] == 1) & (frame["task"] == "one"))
        (place / f"{table}.parquet").unlink()
        records.append(place, table, frame[own].to_dict("records"))
    sweep = load_sweep(directory)
    found = method_table(sweep).set_index("method")
    assert found.loc["joint", "average_accuracy"] == pytest.approx(0.95) and not sweep.problems
    assert found.loc["joint", "learning_accuracy"] == pytest.approx(0.95)
    assert np.isnan(found.loc["joint", "forward_transfer"])
    assert found.loc["base", "intransigence"] == pytest.approx(0.1)
    assert len(paired_differences(sweep, "base")) == 4
    assert (write_report(directory).parent / "figures" / "accuracy_by_stage.png").is_file()


def test_what_is_stored_may_be_told_by_stage(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"stored_bytes": {"0": 0, "1": 100, "2": 300}, "stored_parameters": {"1": 5, "2": 10}}
    files.write_cell(tmp_path / "cells/m/x-seed0", ["one", "two"], A, **facts, serving_parameters={"2": 4})
    row = method_table(load_sweep(files.write_sweep(tmp_path, [files.place("m", "x", 0)]))).iloc[0]
    assert (row["stored_bytes_a_task"], row["stored_parameters"], row["serving_parameters"]) == (150, 10, 4)


def test_weights_of_redrawn_cells() -> None:
    orders = ["x", "x", "x", "y", "z"]
    drawn = hierarchy.cell_weights(orders, np.random.default_rng(0), 4000)
    assert drawn.sum(axis=1) == pytest.approx(1)
    assert drawn.mean(axis=0) == pytest.approx(hierarchy.mean_weights(orders), abs=0.01)
    assert set(np.round(drawn[:, 3] * 3).astype(int)) == {0, 1, 2, 3}  # order y is drawn 0 to 3 times of 3


@pytest.mark.parametrize(("off", "verdict"), [(2e-19, "not told apart"), (1e-6, "above")])
def test_rounding_alone_does_not_keep_an_interval_from_0(off: float, verdict: str) -> None:
    draws = np.linspace(0, 0.01, 1001) + off
    low, high = hierarchy.interval(draws, level=1.0)
    assert low == (0 if off < 1e-9 else off) and high == pytest.approx(0.01 + off)
    assert differences.verdict(low, high) == verdict
    assert hierarchy.interval(-draws, level=1.0) == (-high, -low)
    assert differences.verdict(-high, -low) == verdict.replace("above", "below")
    assert hierarchy.interval(np.zeros(9)) == (0, 0)
    assert hierarchy.interval(np.append(np.arange(1.0, 9.0), np.inf), level=0.5) == (3, 7)


def test_rows_shared_by_cells_widen_the_interval() -> None:
    """The same row effect in every cell must not be averaged away over cells."""
    effect = np.random.default_rng(0).normal(size=50)
    weights = hierarchy.cell_weights(range(20), np.random.default_rng(0), 2000)
    counts = [hierarchy.row_counts(50, np.random.default_rng(1), 2000)]
    spread = hierarchy.means([np.tile(effect, (20, 1))], weights, counts).std()
    assert spread == pytest.approx(effect.std() / 50**0.5, rel=0.1)


# ---- the report


def test_every_file_of_a_sweeps_report(report: Path, trial: Path) -> None:
    folder = report.parent
    assert folder == trial / "report"
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md", "summary.json", "figures"}
    drawn = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert {path.name for path in (folder / "figures").iterdir()} == drawn
    page = report.read_text(encoding="utf-8")
    assert len(re.findall(r'<svg role="img" aria-label="[^"]{20,}"', page)) == page.count("<svg") == len(FIGURES)
    addresses = re.findall(r"""(?:src|href|xlink:href|action|data)\s*=\s*["']([^"']*)""", page)
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)


def test_a_sweeps_summary_and_its_verdict(report: Path, trial: Path) -> None:
    found = json.loads(report.with_name("summary.json").read_text(encoding="utf-8"))
    table = method_table(load_sweep(trial)).set_index("method")
    assert found["leader"] == "growing" and found["cells"] == {"done": 15}
    assert found["headline_tasks"] == [task for task in found["tasks"] if task != "coin_toss"]
    for method, numbers in found["methods"].items():
        assert numbers["average_accuracy"] == pytest.approx(table.loc[method, "average_accuracy"])
        assert numbers["stored_bytes_a_task"] == 4000 and numbers["trainable_parameters"] == 921_600
    calls = {(row["method"], row["tasks"], row["measure"]): row for row in found["paired_differences"]}
    row = calls[("growing", "headline", "average_accuracy")]
    assert row["verdict"] == ABOVE and row["low"] > 0
    text = report.with_name("report.md").read_text(encoding="utf-8")
    assert "growing has the highest mean final score of 3 methods" in text and "Intervals are rough" in text
    assert "joint (bound)" in text and "coin_toss" in text


def test_the_same_sweep_gives_the_same_bytes(report: Path, trial: Path) -> None:
    written = [path for path in sorted(report.parent.rglob("*")) if path.is_file()]
    before = [path.read_bytes() for path in written]
    write_report(trial)
    assert [path.read_bytes() for path in written] == before


@pytest.mark.usefixtures("sketched")
def test_a_difference_is_not_called_that_its_interval_does_not_call(tmp_path: Path) -> None:
    near = earned([0.2] * 2, [0.8, 0.2], [0.7, 0.9])
    cells = {(method, "x", seed): rows for seed in (0, 1) for method, rows in (("base", A), ("more", near))}
    page = write_report(by_hand(tmp_path, cells, ["one", "two"], baseline="base"))
    text = page.with_name("report.md").read_text(encoding="utf-8")
    assert "more is not told apart from it" in text and "but it is not told apart from base" in text
    assert "| above " not in text and "below it" not in text


@pytest.mark.usefixtures("sketched")
def test_what_failed_waits_or_is_cut_is_named_and_the_rest_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {("base", "x", 0): A, ("m", "x", 0): B, ("cut", "x", 0): B, ("rows", "x", 0): B, ("gone", "x", 0): B}
    directory = by_hand(tmp_path, cells, ["one", "two"], baseline="base")
    for name, table in (("cut", "scores"), ("rows", "answers")):
        path = directory / f"cells/{name}/x-seed0/{table}.parquet"
        path.write_bytes(path.read_bytes()[:200])
    (directory / "cells/gone/x-seed0/manifest.json").unlink()
    content = json.loads((directory / "sweep.json").read_text())
    content["cells"] += [
        files.place("m", "x", 1) | {"status": "failed", "error": "CUDA out\nof memory", "seconds": 1.0},
        files.place("m", "x", 2) | {"status": "waiting", "error": None, "seconds": 0.0},
        {"method": "m"},
    ]
    (directory / "sweep.json").write_text(json.dumps(content))
    (directory / "tuning.json").write_text("{")
    assert main([str(directory)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(directory / "report" / "report.html")
    warned = ["cells/cut/x-seed0: scores.parquet", "cells/rows/x-seed0: answers.parquet", "tuning.json: not readable"]
    warned += ["cells/gone/x-seed0: no run directory", "cell 7: a cell lacks its method"]
    assert len(printed.err.splitlines()) == len(warned) and all(
        line.startswith("warning: ") for line in printed.err.splitlines()
    )
    text = (directory / "report" / "report.md").read_text(encoding="utf-8")
    assert all(f"{directory}: {line}" in printed.err.replace("sweep.json, cell", "cell") for line in warned)
    assert "CUDA out of memory" in text and "1 of 7 cells" in text
    found = json.loads((directory / "report" / "summary.json").read_text())
    assert set(found["methods"]) == {"base", "m", "rows"}
    assert {row["method"] for row in found["paired_differences"]} == {"m"}
    assert found["failed"] == {"cells/m/x-seed1": "CUDA out of memory"}


@pytest.mark.parametrize("content", ["{", "[]", '{"methods": {}}', '{"methods": {}, "cells": 3}'])
def test_a_sweep_that_cannot_be_read(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(RunReadError):
        load_sweep(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "report").exists()


@pytest.mark.parametrize("cells", [[], [{**files.place("m", "x", 0), "status": "waiting"}]])
def test_a_sweep_without_a_finished_cell_still_has_a_report(tmp_path: Path, cells: list[dict[str, Any]]) -> None:
    page = write_report(files.write_sweep(tmp_path, cells))
    assert "No cell is finished yet" in page.read_text(encoding="utf-8")
    assert not list((page.parent / "figures").iterdir())


@pytest.mark.usefixtures("sketched")
def test_a_sweep_without_a_baseline_says_so(tmp_path: Path) -> None:
    text = write_report(by_hand(tmp_path, {("m", "x", 0): A, ("n", "x", 0): B}, ["one", "two"])).with_name("report.md")
    assert "names no baseline to compare with" in text.read_text(encoding="utf-8")


def test_markup_in_a_methods_name_is_escaped(tmp_path: Path) -> None:
    planted = '<script>alert("x")</script><img src=x>$x_1$'
    cells = [files.place("base", "x", 0), files.place("m", "x", 0) | {"method": planted}]
    for cell in cells:
        files.write_cell(tmp_path / cell["dir"], ["a<b>", "t|wo](http://x)"], A)
    cells.append(files.place("m", "<i>", 1) | {"status": "failed", "error": "<b>no</b>"})
    tuned = {planted: {"cells": [{"dir": "t", "settings": {"<u>": "<u>"}, "score": 0.5}], "chosen": {"<u>": "<u>"}}}
    (tmp_path / "tuning.json").write_text(json.dumps(tuned))
    page = write_report(files.write_sweep(tmp_path, cells, baseline="base", name="<h1>", base="<base>"))
    html, text = page.read_text(encoding="utf-8"), page.with_name("report.md").read_text(encoding="utf-8")
    assert html.count("<script") == 1 and "&lt;script&gt;" in html
    for tag in ("<img", "<i>", "<u>", "<b>", "a<b>", "<base>"):
        assert tag not in html.split("</style>")[1] and tag not in text
    assert "<script" not in text and "](http" not in text and html.count("<h1>") == 1


@pytest.mark.usefixtures("sketched")
def test_tuning_names_the_chosen_and_the_edge(tmp_path: Path) -> None:
    rates = [{"lr": rate} for rate in (1e-4, 3e-4, 1e-3)]
    assert edges(rates, {"lr": 1e-3}) == "lr at its upper edge" and edges(rates, {"lr": 1e-4}) == "lr at its lower edge"
    assert (
        edges(rates, {"lr": 3e-4}) == ""
        and edges(rates[:1], rates[0]) == ""
        and edges([{"a": True}], {"a": True}) == ""
    )
    tuned = {"m": {"cells": [{"dir": "t", "settings": one, "score": 0.5} for one in rates], "chosen": rates[2]}}
    tuned["n"] = {"cells": [], "chosen": {"lr": 1.0}}
    failed = {"dir": "t", "settings": {"lr": 2.0}, "score": None, "error": "CUDA out of memory"}
    tuned["o"] = {"cells": [failed], "settings": None, "choice": None}
    (tmp_path / "tuning.json").write_text(json.dumps({"stages": ["one"], "methods": tuned}))
    text = write_report(by_hand(tmp_path, {("m", "x", 0): A}, ["one", "two"])).with_name("report.md").read_text()
    assert "lr at its upper edge" in text and text.count("| chosen") >= 2 and "not among those tried" in text
    assert re.search(r"\| o +\| lr=2.0 +\| +– \| – +\| CUDA out of memory", text)


@pytest.mark.usefixtures("sketched")
def test_published_scores_stand_beside_ours(tmp_path: Path) -> None:
    cells = {("m", order, 0): A for order in ("order4", "order5")}
    text = write_report(by_hand(tmp_path / "many", cells, ["one", "two"])).with_name("report.md").read_text()
    lines = [line for line in text.splitlines() if "published, not measured here" in line]
    assert any("N-LoRA" in line and "72.4" in line and "arXiv 2410.10179" in line for line in lines)
    assert not any(" 78.8 " in line and "N-LoRA" in line for line in lines) and "measured here" in text
    assert any("GainLoRA" in line and "77.5" in line for line in lines) and not any("78.0" in line for line in lines)
    few = write_report(
        by_hand(tmp_path / "few", {("m", "x", 0): A}, ["one", "two"], base="configs/published/order2.yaml")
    )
    assert "Llama-2-7B" in few.with_name("report.md").read_text()
    none = write_report(by_hand(tmp_path / "none", {("m", "x", 0): A}, ["one", "two"])).with_name("report.md")
    assert "published" not in none.read_text()


@pytest.mark.parametrize(
    ("name", "number"),
    [("order4", 4), ("order1-1a2b3c4d", 1), ("configs/published/order6.yaml", 6), ("order7", None), ("reorder1", None)],
)
def test_which_published_order_a_name_stands_for(name: str, number: int | None) -> None:
    assert published.order_number(name) == number


def test_a_published_order_is_known_by_its_stages_too() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs" / "published"
    for stages, number in published.ORDERS.items():
        named = re.findall(r"^  - name: (\w+)$", (folder / f"order{number}.yaml").read_text(), flags=re.MULTILINE)
        assert tuple(named) == stages and published.order_number("cell", named) == number


@pytest.mark.usefixtures("sketched")
def test_a_single_run_of_a_published_order_shows_them_too(tmp_path: Path) -> None:
    files.write_cell(tmp_path / "order1-1a2b3c4d", ["one", "two"], A)
    text = write_report(tmp_path / "order1-1a2b3c4d").with_name("report.md").read_text()
    assert "O-LoRA" in text and "published, not measured here" in text


def test_many_methods_and_tasks_are_drawn(tmp_path: Path) -> None:
    """18 runs of 9 tasks: every figure is drawn, in seconds; a name that starts with _ is not left out of a legend."""
    methods = [f"_a_rather_long_method_name_{index}" for index in range(9)]
    directory = files.plausible_sweep(tmp_path, methods, 9, ("x", "y"), num_rows=30, baseline=methods[3])
    start = time.process_time()
    page = write_report(directory)
    assert time.process_time() - start < 60
    assert {path.stem for path in (page.parent / "figures").iterdir()} == FIGURES
    assert methods[0] in json.loads(page.with_name("summary.json").read_text())["methods"]


@page_tests.needs_browser
def test_a_sweeps_page_in_a_browser(report: Path) -> None:
    driver, browser = page_tests.start_browser()
    try:
        for width, scheme in ((390, "light"), (1280, "dark")):
            browser.open(report, width, scheme=scheme)
            assert browser.run("return document.documentElement.scrollWidth") <= width
            sizes = "return [...document.querySelectorAll('figure svg')].map(f => [f.clientWidth, f.clientHeight])"
            assert [across > 150 and down > 80 for across, down in browser.run(sizes)] == [True] * len(FIGURES)
        first = "return document.querySelector('#table-methods tbody tr').cells[0].textContent"
        press = "document.querySelectorAll('#table-methods th button')[2].click(); "
        assert [browser.run(press + first) for _ in range(2)] == ["sequential", "per_task (bound)"]
        ids = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); return ids.length - new Set(ids).size"
        assert browser.run(ids) == 0
        lost = "!document.querySelector(link.getAttribute('href'))"
        assert browser.run(f"return [...document.querySelectorAll('nav a')].filter(link => {lost}).length") == 0
        assert browser.log() == []
        browser.close()
    finally:
        driver.terminate()
        driver.wait()


def test_stages_that_were_not_scored_are_not_drawn_as_if_they_were() -> None:
    place = {"method": "m", "weight": 0.5, "value": 0.5}
    whole = pd.DataFrame([place | {"cell": cell, "stage": stage} for cell in (0, 1) for stage in (1, 2, 3)])
    for frame, style, bands in ((whole, "-", 1), (whole[whole["stage"] != 2], ":", 0)):
        (ax,) = figures.accuracy_by_stage(frame).axes
        assert {line.get_linestyle() for line in ax.lines} == {style} and len(ax.collections) == bands

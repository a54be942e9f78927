"""``make demo``: configs/sweep_demo.yaml compares two methods alike, and a tiny version tells its story."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from analysis.report import page
from continual import run, sweep
from continual.sweeps import cells as sweep_cells
from continual.sweeps import plan as sweep_plan
from continual.sweeps.cells import CellRun

DEMO = Path(__file__).resolve().parents[2] / "configs" / "sweep_demo.yaml"
TINY = [
    "model.backbone={class_path: continual.backbones.TinyCausalLM, init_args: {hidden_size: 16, num_layers: 2}}",
    "model.adapter.init_args.num_blocks=2",
    "trainer={accelerator: cpu}",
    "data.max_tokens=1024",
    "stages.*.task.init_args.train_rows=12",
    "stages.*.task.init_args.test_rows=4",
]


def in_process(cell: CellRun, arguments: list[str], log: IO[bytes]) -> int:
    """Run a cell's command line in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = run.main(arguments)
    log.write(printed.getvalue().encode())
    return code


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Path, str, list[str]]]:
    """Makes the tiny demo, or goes on with it: returns its directory, what was printed, and the cells that ran."""
    folder = tmp_path_factory.mktemp("demo") / "demo"

    def make() -> tuple[Path, str, list[str]]:
        ran: list[str] = []

        def call_run(cell: CellRun, arguments: list[str], log: IO[bytes]) -> int:
            ran.append(cell.place)
            return in_process(cell, arguments, log)

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(sweep_cells, "call_run", call_run)
            patch.setattr(page, "_DOTS_PER_INCH", 40)  # nobody looks at them
            assert sweep.main([str(DEMO), "--out", str(folder), "--jobs", "1", "--report", *TINY]) == 0
        return folder, printed.getvalue(), ran

    return make


@pytest.fixture(scope="module")
def made(demo: Callable[[], tuple[Path, str, list[str]]]) -> tuple[Path, str, list[str]]:
    """The tiny demo after its first call."""
    return demo()


def test_the_two_methods_differ_in_their_strategy_alone() -> None:
    plan = sweep_plan.load(DEMO)
    (order,) = plan.orders.values()
    assert plan.cells() == [("sequential", "base", 0), ("replay", "base", 0)] and len(order.stages) == 3
    trees = [yaml.safe_load(plan.configuration("x", plan.methods[m], order.stages, 0)) for m in plan.methods]
    strategies = [tree["model"].pop("strategy", None) for tree in trees]
    assert trees[0] == trees[1]  # stages, rows, seeds, adapter, learning rate
    assert strategies[0] is None and strategies[1]["class_path"] == "continual.strategies.ExperienceReplay"
    assert trees[0]["threads"] == 1 and "Queryable" in trees[0]["model"]["adapter"]["class_path"]


def test_the_terminal_says_what_goes_on(made: tuple[Path, str, list[str]]) -> None:
    folder, printed, ran = made
    lines = printed.splitlines()
    assert ran == ["cells/sequential/base-seed0", "cells/replay/base-seed0"]
    assert lines[0].startswith(f"Sweep {folder}: 2 cells") and "family > siblings > who" in lines[2]
    for method in ("sequential", "replay"):
        told = [line.split("] ", 1)[1] for line in lines if f"] {method}, " in line]
        names = [line.split(":")[0] for line in told]
        assert names == [f"{method}, untrained", *(f"{method}, stage {stage} of 3" for stage in (1, 2, 3))]
        assert "family " in told[2] and "siblings [" in told[2] and "who" not in told[2]
    assert lines[-2:] == [f"Report: {folder / 'report' / 'report.html'}", str(folder)]


def test_the_report_tells_what_was_kept_at_what_cost_and_how_routes_moved(made: tuple[Path, str, list[str]]) -> None:
    report = made[0] / "report"
    drawn = {path.stem for path in (report / "figures").glob("*.png")}
    assert {"scores_side_by_side", "moves_side_by_side", "methods_side_by_side"} <= drawn
    opening = (report / "report.md").read_text(encoding="utf-8").split("## Run by run")[0]
    kept = sum(path.stat().st_size for path in made[0].glob("cells/replay/*/strategy/stage-03/*"))
    assert f"Kept on disk for later stages: sequential nothing and replay {kept:,} bytes" in opening
    assert "sequential forgot" in opening and "replay forgot" in opening and "4 test rows a task" in opening
    changes = json.loads((report / "summary.json").read_text())["changes"]
    assert [(row["method"], row["task"]) for row in changes] == [
        (method, task) for method in ("sequential", "replay") for task in ("family", "siblings", "who")
    ]


def test_a_second_call_redoes_nothing(made: Any, demo: Callable[[], tuple[Path, str, list[str]]]) -> None:
    folder = made[0]

    def times() -> dict[Path, int]:
        kept = [*folder.glob("cells/**/*"), *folder.glob("report/**/*")]
        return {path: path.stat().st_mtime_ns for path in kept if path.is_file()}

    before = times()
    _, printed, ran = demo()
    assert ran == [] and times() == before
    assert "2 of 2 cells are finished already: nothing to do" in printed
    assert printed.splitlines()[-2:] == [f"Report: {folder / 'report' / 'report.html'}", str(folder)]
    (folder / "report" / "report.html").unlink()  # killed while it was drawn, say
    assert demo()[2] == [] and (folder / "report" / "report.html").is_file()

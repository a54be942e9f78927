"""``python -m continual.sweep``: what it leaves, what it refuses, and how it goes on after a failure or a kill."""

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import joblib
import numpy as np
import pandas as pd
import pytest
import yaml
from forking import Forks

from continual import run, sweep
from continual.errors import DIVERGED
from continual.storage import records
from continual.sweeps import cells as sweep_cells
from continual.sweeps import plan as sweep_plan
from continual.sweeps.cells import CellOutcome, CellRun
from continual.sweeps.loop import SweepLoop, _at_edge

Tree = dict[str, Any]

LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
LR = "model.optimizer.init_args.lr"


def sweep_text(**changes: Any) -> str:
    """Return a sweep file of two methods over the two stages of the tests' experiment, in two orders."""
    tree = {
        "base": "tiny.yaml",
        "baseline": "lora",
        "methods": {"lora": {"model.adapter": LORA, LR: "5e-3"}, "routed": {}},
        "orders": {"forth": {"seeds": [0, 1]}, "back": {"stages": ["colours"], "seeds": [3]}},
    }
    return yaml.safe_dump(tree | changes, sort_keys=False)


class InProcess:
    """Takes the place of a cell's process: the same command line, without the seconds that a new process takes."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, cell: CellRun, arguments: list[str], log: IO[bytes]) -> int:
        self.calls.append(cell.place)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = run.main(arguments)
        log.write(printed.getvalue().encode())
        log.flush()
        return code


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """Runs cells in this process; remembers which."""
    in_process = InProcess()
    monkeypatch.setattr(sweep_cells, "call_run", in_process)
    return in_process


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``continual.sweep`` in this process, one cell at a time; returns its status and what it printed."""

    def command(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = sweep.main([*map(str, argv), "--jobs", "1"])
        printed = capsys.readouterr()
        return code, str(printed.out), str(printed.err)

    return command


@pytest.fixture
def planned(tree: Tree, write: Callable[..., str]) -> Callable[..., str]:
    """Writes a sweep file beside its base; returns its path."""

    def planned(**changes: Any) -> str:
        write(tree)
        return write(sweep_text(**changes), "sweep.yaml")

    return planned


@pytest.fixture(scope="module")
def swept(base_tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a finished sweep, to read only."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(base_tree))
    (folder / "sweep.yaml").write_text(sweep_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_cells, "call_run", InProcess())
        assert sweep.main([str(folder / "sweep.yaml"), "--out", str(folder / "out"), "--jobs", "1"]) == 0
    yield folder / "out"


def state_of(sweep_dir: Path) -> Tree:
    return json.loads((sweep_dir / "sweep.json").read_text())


def statuses(sweep_dir: Path) -> dict[str, str]:
    return {cell["dir"]: cell["status"] for cell in state_of(sweep_dir)["cells"]}


def every_byte(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


# -- what a sweep leaves ----------------------------------------------------------------------------------------------


def test_every_cell_is_an_ordinary_run_of_its_method_order_and_seed(swept: Path) -> None:
    state = state_of(swept)
    wanted = [(m, o, s) for o, s in (("forth", 0), ("forth", 1), ("back", 3)) for m in ("lora", "routed")]
    assert [(cell["method"], cell["order"], cell["seed"]) for cell in state["cells"]] == wanted
    for cell in state["cells"]:
        assert cell["dir"] == f"cells/{cell['method']}/{cell['order']}-seed{cell['seed']}"
        assert (cell["status"], cell["error"]) == ("done", None) and cell["seconds"] > 0
        manifest = json.loads((swept / cell["dir"] / "manifest.json").read_text())
        resolved = yaml.safe_load((swept / cell["dir"] / "experiment.yaml").read_text())
        assert manifest["complete"] and manifest["seed"] == cell["seed"]
        assert manifest["stages"] == (["animals", "colours"] if cell["order"] == "forth" else ["colours"])
        assert {stage["task"]["init_args"]["seed"] for stage in resolved["stages"]} == {cell["seed"]}
        assert ("peft" in manifest["model"]["adapter"]) == (cell["method"] == "lora")
        assert resolved["model"]["optimizer"]["init_args"]["lr"] == (0.005 if cell["method"] == "lora" else 0.01)
        assert not (swept / cell["dir"] / "report").exists()


def test_the_state_says_what_was_swept(swept: Path) -> None:
    state = state_of(swept)
    assert (state["baseline"], state["base"], state["seeds"]) == ("lora", "base.yaml", [0, 1, 3])
    assert state["methods"] == {"lora": {"model.adapter": LORA, LR: 0.005}, "routed": {}}  # a number, not "5e-3"
    assert state["orders"]["forth"] == {"stages": ["animals", "colours"], "seeds": [0, 1]}
    assert not (swept / "tuning.json").exists() and not list(swept.rglob(".*"))


def test_a_cell_is_the_run_that_its_configuration_makes_alone(swept: Path, finished: Path) -> None:
    cell = swept / "cells" / "routed" / "forth-seed0"
    for table in records.SCHEMAS:
        one, other = (records.read(folder, table).drop(columns="run") for folder in (cell, finished))
        pd.testing.assert_frame_equal(one, other)


def test_the_saved_sweep_is_the_same_sweep(swept: Path) -> None:
    assert sweep_plan.load(swept / "sweep.yaml") == sweep_plan.load(swept.parent / "sweep.yaml")


def test_a_finished_sweep_does_nothing_again(swept: Path, cells: InProcess, command: Callable) -> None:
    before = every_byte(swept / "cells")
    for argv in (["--resume", swept], [swept.parent / "sweep.yaml", "--out", swept]):
        code, out, _ = command(*argv)
        assert (code, out.splitlines()[-1]) == (0, str(swept))
        assert "6 of 6 cells are finished already" in out
    assert cells.calls == [] and every_byte(swept / "cells") == before
    assert set(statuses(swept).values()) == {"done"}


def test_overrides_and_set_change_every_cell_and_the_command_line_wins(planned: Callable) -> None:
    path = planned(set={"data.batch_size": 2, "stages.*.task.init_args.train_rows": 5}, orders={"o": {}}, seeds=[7])
    plan = sweep_plan.load(path, ["data.batch_size=3", "trainer.max_epochs=2"])
    configuration = yaml.safe_load(plan.configuration("x", plan.methods["lora"], plan.orders["o"].stages, 7))
    assert (configuration["data"]["batch_size"], configuration["trainer"]["max_epochs"]) == (3, 2)
    assert [stage["task"]["init_args"]["train_rows"] for stage in configuration["stages"]] == [5, 5]
    assert plan.cells() == [("lora", "o", 7), ("routed", "o", 7)]


# -- a cell that fails ------------------------------------------------------------------------------------------------


def test_a_failed_cell_stops_no_other_and_is_named(
    planned: Callable, cells: InProcess, command: Callable, tmp_path: Path
) -> None:
    methods = {"short": {"data.max_tokens": 20}, "lora": {"model.adapter": LORA}}
    path = planned(methods=methods, orders={"o": {"stages": ["animals"]}})
    code, out, err = command(path, "--out", tmp_path / "out")
    assert code == 1 and out.splitlines()[-1] == str(tmp_path / "out")
    assert statuses(tmp_path / "out") == {"cells/short/o-seed0": "failed", "cells/lora/o-seed0": "done"}
    reason = state_of(tmp_path / "out")["cells"][0]["error"]
    assert reason.startswith("stages.animals") and "tokens" in reason and "\n" not in reason
    assert f"  cells/short/o-seed0: {reason}" in err.splitlines() and "1 cells failed" in err
    assert command("--resume", tmp_path / "out")[0] == 1
    assert cells.calls == ["cells/short/o-seed0", "cells/lora/o-seed0", "cells/short/o-seed0"]


def test_why_a_process_ended_is_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old\nerror: stage 'a' failed\r\n  step 3/4\nTraceback\n")
    assert sweep_cells._reason(log, 0, 1) == "stage 'a' failed"
    assert sweep_cells._reason(log, 4, -signal.SIGKILL) == "killed by SIGKILL"
    assert sweep_cells._reason(log, log.stat().st_size, 3) == "exit status 3"
    log.write_text("Traceback\nRuntimeError: out of memory\n\n")
    assert sweep_cells._reason(log, 0, 1) == "RuntimeError: out of memory"


def test_a_run_started_with_other_settings_is_not_taken_for_the_cell(swept: Path, cells: InProcess) -> None:
    cell = CellRun(swept, "cells/lora/forth-seed0", "other: 1\n", Path.cwd())
    assert sweep_cells.outcome_of(cell).error is None  # finished is finished
    state = json.loads((cell.run_dir / "manifest.json").read_text())
    copy = CellRun(swept.parent / "copy", cell.place, cell.config, Path.cwd())
    copy.run_dir.mkdir(parents=True)
    copy.config_path.parent.mkdir(parents=True)
    copy.config_path.write_text(cell.config_path.read_text())
    (copy.run_dir / "experiment.yaml").write_bytes((cell.run_dir / "experiment.yaml").read_bytes())
    (copy.run_dir / "manifest.json").write_text(json.dumps(state | {"complete": False}))
    assert "other settings" in str(sweep_cells.run_cell(copy).error) and cells.calls == []


# -- tuning -----------------------------------------------------------------------------------------------------------


def tuned(folder: Path) -> Tree:
    """Return what tuning.json holds, without the seconds."""
    tuning = json.loads((folder / "tuning.json").read_text())
    for entry in tuning["methods"].values():
        for cell in entry["cells"]:
            del cell["seconds"]
    return tuning


def test_tuning_chooses_on_held_out_rows_and_never_reads_a_test_row(
    tree: Tree, tables: Path, write: Callable, cells: InProcess, command: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    for file in tables.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for stage in tree["stages"]:
        stage["task"]["init_args"]["folder"] = str(folder)
    tree["trainer"]["max_epochs"] = 3
    write(tree)
    grid = {"*": {LR: [1e-9, 0.02]}, "routed": {"model.warmup_steps": [0, 1]}}
    tune = {"stages": ["colours"], "validation_rows": 5, "seed": 4, "grid": grid}
    path = write(sweep_text(tune=tune, orders={"o": {"stages": ["animals"]}}), "sweep.yaml")
    code, out, _ = command(path, "--out", tmp_path / "out")
    assert code == 0 and len(cells.calls) == 2 + 4 + 2

    tuning = tuned(tmp_path / "out")
    assert [cell["settings"] for cell in tuning["methods"]["routed"]["cells"]] == [
        {LR: lr, "model.warmup_steps": steps} for lr in (1e-9, 0.02) for steps in (0, 1)
    ]
    train = pd.read_parquet(folder / "colours.train.parquet")
    held_out: set[tuple[int, ...]] = set()  # of every cell the same: methods are tuned on one draw
    for method, entry in tuning["methods"].items():
        found = []
        for number, cell in enumerate(entry["cells"]):
            assert cell["dir"] == f"tuning/{method}/{number:02d}"
            answers = records.read(tmp_path / "out" / cell["dir"], "answers").query("stage == 1")
            held_out.add(tuple(sorted(answers["row"])))
            assert len(held_out) == 1 and len(set(answers["row"])) == 5 == len(answers)
            right = answers["prediction"].to_numpy() == train["target"].to_numpy()[answers["row"]]
            assert cell["score"] == pytest.approx(right.mean())  # of the training rows' own answers
            found.append(cell["score"])
        assert entry["choice"] == int(np.argmax(found))
        assert entry["settings"] == entry["cells"][entry["choice"]]["settings"]
        assert state_of(tmp_path / "out")["methods"][method].items() >= entry["settings"].items()
        edge = f"{method}: {LR}={entry['settings'][LR]} lies at the edge of its grid"
        assert edge in out
        resolved = yaml.safe_load((tmp_path / "out" / f"cells/{method}/o-seed0" / "experiment.yaml").read_text())
        assert resolved["model"]["optimizer"]["init_args"]["lr"] == entry["settings"][LR]
        assert (resolved["data"]["score_rows"], resolved["data"]["validation_rows"]) == ("test", 0)

    test = pd.read_parquet(folder / "colours.test.parquet")
    test.iloc[:1].assign(input="Is nothing nothing?").to_parquet(folder / "colours.test.parquet")
    assert command(path, "--out", tmp_path / "again")[0] == 0
    assert tuned(tmp_path / "again") == tuning

    # The choice stands when the sweep goes on, and its cells are not repeated.
    before = every_byte(tmp_path / "out" / "tuning")
    assert command("--resume", tmp_path / "out")[0] == 0
    assert every_byte(tmp_path / "out" / "tuning") == before and tuned(tmp_path / "out") == tuning


def test_the_first_of_equal_settings_wins_and_a_diverged_one_never(planned: Callable, tmp_path: Path) -> None:
    grid = {"*": {LR: [1, 2, 3, 4]}}
    plan = sweep_plan.load(planned(tune={"stages": ["animals"], "validation_rows": 2, "grid": grid}))
    loop = SweepLoop(plan, tmp_path, "loky", 1)
    assert plan.tune is not None
    combinations = plan.tune.combinations("lora")
    beside = yaml.safe_load(plan.tuning_configuration("lora", combinations[0]))
    assert (beside["bounds"], beside["wordings"], beside["general_ability"]) == ([], None, False)
    assert beside["token_sample"] == 0
    group = [CellRun(tmp_path, f"tuning/lora/{i}", "", tmp_path) for i in range(4)]

    def choice(*scores: float | None, reason: str = f"stage 'a', step 3: {DIVERGED} (nan)") -> Tree:
        for cell, score in zip(group, scores, strict=True):
            failed = reason if score is None else None
            loop.outcomes[cell.place] = CellOutcome(
                cell.place, failed, 1.0, {} if score is None else {"animals": score}
            )
        return loop._choice("lora", combinations, group)

    assert choice(0.1, 0.7, 0.7, None)["choice"] == 1
    assert choice(None, float("nan"), 0.2, 0.1)["choice"] == 2
    assert choice(0.1, 0.7, 0.7, None)["at_edge"] == [] and choice(None, None, None, 0.0)["at_edge"] == [LR]
    nothing = choice(None, None, None, None)
    assert (nothing["choice"], nothing["settings"], nothing["at_edge"]) == (None, None, [])
    # Out of memory, say: nobody knows what that value would have given.
    assert choice(0.1, 0.7, 0.7, None, reason="CUDA out of memory")["choice"] is None


def test_only_numbers_have_an_edge() -> None:
    values = {"lr": [3, 1, 2], "kind": ["a", "b"], "on": [False, True], "one": [5]}
    assert _at_edge(values, {"lr": 3, "kind": "a", "on": True, "one": 5}) == ["lr"]
    assert _at_edge(values, {"lr": 2, "kind": "b", "on": False, "one": 5}) == []


CHOICES = {"lora": {"settings": {LR: 0.03}}, "routed": {"settings": {LR: 0.004, "model.warmup_steps": 2}}}


def test_a_sweep_takes_what_another_chose(
    planned: Callable, write: Callable, cells: InProcess, command: Callable, tmp_path: Path
) -> None:
    tune = {"stages": ["animals"], "validation_rows": 2, "grid": {"*": {LR: [0.1, 0.2]}}}
    path = planned(tune=tune, orders={"o": {"stages": ["animals"]}})
    chosen = write(json.dumps({"methods": CHOICES | {"other": {"settings": {LR: 7}}}}), "tuning.json")
    assert command(path, "--out", tmp_path / "out", "--tuning", chosen)[0] == 0
    assert cells.calls == ["cells/lora/o-seed0", "cells/routed/o-seed0"]  # nothing is tuned again
    for method, entry in CHOICES.items():
        resolved = yaml.safe_load((tmp_path / "out" / f"cells/{method}/o-seed0" / "experiment.yaml").read_text())
        assert resolved["model"]["optimizer"]["init_args"]["lr"] == entry["settings"][LR]
        assert state_of(tmp_path / "out")["methods"][method].items() >= entry["settings"].items()
    before = every_byte(tmp_path / "out" / "cells")
    assert command("--resume", tmp_path / "out")[0] == 0 and every_byte(tmp_path / "out" / "cells") == before


@pytest.mark.parametrize(
    "text, words",
    [
        ("{}", ["is not the tuning.json of a sweep"]),
        ("[", ["is not the tuning.json of a sweep"]),
        (json.dumps({"methods": {"lora": {"settings": {LR: 0.1}}}}), ["no settings for the method routed"]),
        (json.dumps({"methods": CHOICES | {"lora": {"settings": None}}}), ["no settings for the method lora"]),
        (json.dumps({"methods": CHOICES | {"lora": {"settings": {"model.optimiser": 1}}}}), ["lora", "optimiser"]),
    ],
)
def test_choices_that_cannot_be_taken_are_refused(
    planned: Callable, write: Callable, cells: InProcess, command: Callable, tmp_path: Path, text: str, words: list[str]
) -> None:
    code, _, err = command(planned(), "--out", tmp_path / "out", "--tuning", write(text, "tuning.json"))
    assert code == 2 and err.count("\n") == 1 and [word for word in words if word not in err] == [], err
    assert cells.calls == [] and not (tmp_path / "out").exists()


def test_a_method_that_cannot_be_tuned_is_not_run(
    planned: Callable, cells: InProcess, command: Callable, tmp_path: Path
) -> None:
    tune = {"stages": ["animals"], "validation_rows": 2, "grid": {"routed": {"data.max_tokens": [20, 21]}}}
    code, _, err = command(planned(tune=tune, orders={"o": {"stages": ["animals"]}}), "--out", tmp_path / "out")
    assert code == 1 and cells.calls == ["tuning/routed/00", "tuning/routed/01", "cells/lora/o-seed0"]
    assert statuses(tmp_path / "out") == {"cells/lora/o-seed0": "done", "cells/routed/o-seed0": "failed"}
    assert (
        "cells/routed/o-seed0: 2 of the 2 tuning cells of routed failed: it would not be tuned like" in err
        and "tuning/routed/00: stages" in err
    )


# -- what is refused --------------------------------------------------------------------------------------------------

TUNE = {"stages": ["animals"], "validation_rows": 2, "grid": {"*": {LR: [0.1]}}}

REFUSED: dict[str, tuple[Tree, list[str]]] = {
    "unknown key": ({"method": {}}, ["'method'", "did you mean methods"]),
    "unknown key of the base": ({"set": {"stagse": []}}, ["tiny.yaml", "'stagse'", "did you mean stages"]),
    "no base": ({"base": None}, ["has no base"]),
    "base missing": ({"base": "gone.yaml"}, ["gone.yaml"]),
    "no methods": ({"methods": {}}, ["methods is empty", "no cells"]),
    "baseline unknown": ({"baseline": "lara"}, ["baseline", "'lara'", "did you mean lora"]),
    "method with a wrong key": ({"methods": {"lora": {"model.adaptor": LORA}}}, ["methods.lora", "adaptor", "adapter"]),
    "method with a wrong argument": (
        {"methods": {"lora": {"model.adapter.init_args.num_atom": 3}}},
        ["methods.lora", "'num_atom'", "num_atoms"],
    ),
    "method with a seed": ({"methods": {"lora": {"seed": 3}}}, ["methods.lora", "seed"]),
    "method is no folder": ({"methods": {"lora": {}, "a/b": {}}}, ["'a/b'"]),
    "no orders": ({"orders": {}}, ["orders is empty", "no cells"]),
    "unknown key of an order": ({"orders": {"o": {"stage": []}}}, ["orders.o", "'stage'", "did you mean stages"]),
    "unknown stage": ({"orders": {"o": {"stages": ["animal"]}}}, ["orders.o.stages", "'animal'", "animals"]),
    "stage twice": ({"orders": {"o": {"stages": ["colours", "colours"]}}}, ["orders.o.stages", "'colours' twice"]),
    "order of nothing": ({"orders": {"o": {"stages": []}}}, ["orders.o.stages", "at least one stage"]),
    "no seeds": ({"orders": {"o": {}}, "seeds": []}, ["seeds", "at least one seed", "no cells"]),
    "order without seeds": ({"orders": {"o": {"seeds": []}}}, ["orders.o.seeds", "no cells"]),
    "seed twice": ({"orders": {"o": {"seeds": [1, 1]}}}, ["orders.o.seeds", "1 twice"]),
    "seed below 0": ({"orders": {"o": {"seeds": [-1]}}}, ["orders.o.seeds", "-1"]),
    "set of an unknown stage": ({"set": {"stages.cats.max_epochs": 1}}, ["set", "'cats'", "animals"]),
    "tune without rows": ({"tune": TUNE | {"validation_rows": 0}}, ["tune.validation_rows", "got 0"]),
    "tune of an unknown stage": ({"tune": TUNE | {"stages": ["color"]}}, ["tune.stages", "'color'", "colours"]),
    "tune of an unknown method": ({"tune": TUNE | {"grid": {"lroa": {}}}}, ["tune.grid", "'lroa'", "lora"]),
    "grid without values": ({"tune": TUNE | {"grid": {"*": {LR: 0.1}}}}, ["tune.grid.*", LR, "0.1"]),
    "grid with a wrong value": ({"tune": TUNE | {"grid": {"*": {LR: ["fast"]}}}}, ["tune.grid for lora", "fast"]),
    "unknown key of tune": ({"tune": TUNE | {"grids": {}}}, ["tune", "'grids'", "did you mean grid"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_sweep_ends_with_2_on_one_line_and_writes_nothing(
    planned: Callable, cells: InProcess, command: Callable, tmp_path: Path, name: str
) -> None:
    changes, words = REFUSED[name]
    path = planned(**changes)
    code, out, err = command(path, "--out", tmp_path / "out")
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert [word for word in words if word not in err] == [], err
    assert cells.calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["give a sweep file"]),
        (["gone.yaml"], ["gone.yaml"]),
        (["--resume", "nowhere"], ["nowhere holds no sweep"]),
        (["sweep.yaml", "--resume", "nowhere", "--out", "out"], ["--out"]),
        (["--resume", "nowhere", "--tuning", "tuning.json"], ["--tuning"]),
        (["sweep.yaml", "--jobs", "0"], ["--jobs", "got 0"]),
        (["sweep.yaml", "--engine", "rye"], ["--engine", "rye", "ray"]),
    ],
)
def test_a_wrong_command_line_ends_with_2(argv: list[str], words: list[str], capsys: Any) -> None:
    assert sweep.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and [word for word in words if word not in err] == [], err


def test_a_directory_of_another_sweep_is_refused(swept: Path, planned: Callable, command: Callable) -> None:
    before = every_byte(swept)
    for changes, name in (({"baseline": "routed"}, "sweep.yaml"), ({"set": {"data.batch_size": 2}}, "base.yaml")):
        code, _, err = command(planned(**changes), "--out", swept)
        assert code == 2 and "another sweep" in err and name in err
    assert command(planned(), "--out", swept / "cells" / "lora" / "forth-seed0")[0] == 2  # a run's
    assert every_byte(swept) == before


def test_two_processes_do_not_work_on_one_sweep(swept: Path, forks: Forks, command: Callable, tmp_path: Path) -> None:
    holder = forks.start("integrity:hold", str(swept), str(tmp_path / "held"))
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    code, _, err = command("--resume", swept)
    forks.kill(holder)
    (swept / ".lock").unlink()  # the sweep is others' too: they look for files that nobody asked for
    assert code == 2 and f"another process ({holder} on " in err and "is working on the sweep" in err


def test_ray_that_is_missing_is_named(planned: Callable, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert sweep.main([planned(), "--engine", "ray", "--out", "never"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'continual[ray]'" in err and not Path("never").exists()


# -- devices and jobs -------------------------------------------------------------------------------------------------


def test_cells_take_the_visible_devices_in_turn(
    planned: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = sweep_plan.load(planned())
    for visible, wanted in (("2,5", ["2", "5", "2"]), ("2", [None] * 3), ("", [None] * 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        loop = SweepLoop(plan, tmp_path, "loky", 1)
        assert [loop._cell(index, "a", "trainer: {}").device for index in range(3)] == wanted
        assert loop._cell(0, "a", "trainer: {devices: 2}").device is None


@pytest.mark.parametrize("visible, cores, jobs", [("", 2, 1), ("", 3, 1), ("", 4, 2), ("", 16, 8), ("0,1", 16, 2)])
def test_jobs_by_default(monkeypatch: pytest.MonkeyPatch, visible: str, cores: int, jobs: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    assert sweep_cells.choose_jobs("loky", None) == jobs and sweep_cells.choose_jobs("loky", 3) == 3


# -- processes of their own -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_sweep_goes_on_without_repeating_a_finished_cell(
    planned: Callable,
    swept: Path,
    forks: Forks,
    contents: Callable,
    cells: InProcess,
    command: Callable,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    process = forks.start("continual.sweep:main", [planned(), "--out", str(out), "--jobs", "2"])
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (out / "sweep.json").exists() and "done" in statuses(out).values():
            break
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    assert forks.wait(process) == -signal.SIGKILL
    finished = {place: every_byte(out / place) for place in statuses(out) if complete(out / place)}
    assert 1 <= len(finished) < 6

    code, printed, err = command("--resume", out)
    assert code == 0, err
    assert f"{len(finished)} of 6 cells are finished already" in printed
    assert sorted(cells.calls) == sorted(set(statuses(out)) - set(finished))
    assert {place: every_byte(out / place) for place in finished} == finished
    for place, status in statuses(out).items():
        assert status == "done" and contents(out / place) == contents(swept / place), place


def complete(run_dir: Path) -> bool:
    path = run_dir / "manifest.json"
    return path.exists() and json.loads(path.read_text())["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_the_cells_of_a_sweep_end_with_it(
    planned: Callable, forks: Forks, tmp_path: Path, number: int, status: int
) -> None:
    process = forks.start("continual.sweep:main", [planned(), "--out", str(tmp_path / "out"), "--jobs", "2"])
    log = tmp_path / "out" / "logs" / "cells" / "lora" / "forth-seed0.log"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not log.exists():
        time.sleep(0.05)
    os.kill(process, number)  # the sweep alone, not its group
    assert forks.wait(process) == status
    while time.monotonic() < deadline:
        try:
            os.killpg(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("something of the sweep is still at work")


@pytest.mark.slow
def test_a_ray_cluster_runs_the_same_cells(
    planned: Callable, swept: Path, forks: Forks, contents: Callable, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    path = planned(orders={"back": {"stages": ["colours"], "seeds": [3]}})
    words = [path, "--out", str(out), "--engine", "ray", "--jobs", "2"]  # by default half the machine's cores
    process = forks.start("continual.sweep:main", words, output=tmp_path / "printed")
    status, printed = forks.wait(process, seconds=500), (tmp_path / "printed").read_text()
    assert status == 0 and "2 at a time on ray" in printed
    assert printed.splitlines()[-1] == str(out)
    assert set(statuses(out).values()) == {"done"}
    for place in statuses(out):
        assert contents(out / place) == contents(swept / place)

"""A run that was killed anywhere and resumed is, byte for byte, the run that was not."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from dying import POINTS
from forking import Forks

from continual.config.experiment import Experiment
from continual.training.module import ContinualModule

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def killed(base_tree: Tree, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run directory for every point that a run was killed at."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(base_tree))
    run_dirs = {point: folder / str(index) for index, point in enumerate(POINTS)}
    for point, run_dir in run_dirs.items():
        process = forks.start("dying:run_until", point, str(folder / "tiny.yaml"), "--out", str(run_dir))
        assert forks.wait(process) == -signal.SIGKILL, point
    return run_dirs


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_resumes_to_the_same_bytes(
    killed: dict[str, Path], finished: Path, engine: Callable, contents: Callable, point: str
) -> None:
    run_dir = killed[point]
    assert json.loads((run_dir / "manifest.json").read_text())["finished_stage"] == POINTS[point]
    for folder in (run_dir / "adapters").glob("stage-*"):
        assert (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_config.json").is_file()
    result = engine("--resume", run_dir)
    assert result.code == 0, result.err
    assert result.last_line == str(run_dir)
    assert f"Going on with {run_dir} after stage {POINTS[point]} of 2." in result.out
    whole, resumed = contents(finished), contents(run_dir)
    assert set(resumed) == set(whole)
    assert [name for name in whole if whole[name] != resumed[name]] == []
    assert list(run_dir.rglob(".*")) == []  # no temporary file stays behind


def test_a_finished_run_resumed_does_nothing_and_says_so(finished: Path, engine: Callable) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished.rglob("*") if path.is_file()}
    result = engine("--resume", finished)
    assert result.code == 0 and result.last_line == str(finished)
    assert "All 2 stages" in result.out and "nothing to do" in result.out
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished.rglob("*") if path.is_file()
    }


@pytest.fixture
def half_done(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run whose manifest says that only stage 1 is finished."""
    run_dir = tmp_path / "half"
    shutil.copytree(finished, run_dir)
    state = json.loads((run_dir / "manifest.json").read_text())
    (run_dir / "manifest.json").write_text(json.dumps(state | {"finished_stage": 1, "complete": False}))
    return run_dir


def test_rows_of_a_stage_that_is_not_finished_are_dropped(
    half_done: Path, finished: Path, engine: Callable, contents: Callable
) -> None:
    assert engine("--resume", half_done).code == 0
    assert contents(half_done) == contents(finished)


def test_an_edited_configuration_is_refused(half_done: Path, engine: Callable, contents: Callable) -> None:
    with open(half_done / "experiment.yaml", "a", encoding="utf-8") as file:
        file.write("# a note\n")
    before = contents(half_done)
    result = engine("--resume", half_done)
    assert result.code == 2 and result.err.count("\n") == 1
    assert result.err.startswith(f"error: {half_done / 'experiment.yaml'} was edited")
    assert contents(half_done) == before


@pytest.mark.parametrize(
    "name, code", [("manifest.json", 1), ("scores.parquet", 1), ("adapters/stage-01/adapter_model.safetensors", 1)]
)
def test_a_damaged_file_is_named(half_done: Path, engine: Callable, name: str, code: int) -> None:
    (half_done / name).write_bytes((half_done / name).read_bytes()[:50])
    result = engine("--resume", half_done)
    assert result.code == code and result.err.count("\n") == 1
    assert result.err.startswith("error: ") and str(half_done / name) in result.err


class PoisonOnce(L.Callback):
    """Puts a NaN into the adapter at one step of one stage, unless ``PoisonOnce.cured``."""

    cured = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.cured and trainer.datamodule.name == "colours" and batch_idx == 2:  # type: ignore[attr-defined]
            with torch.no_grad():
                next(p for p in pl_module.parameters() if p.requires_grad).fill_(float("nan"))


def test_a_nan_loss_drops_its_stage_and_keeps_the_others(
    finished: Path,
    tree: Tree,
    write: Callable,
    engine: Callable,
    contents: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, poison = Experiment.make_trainer, PoisonOnce()

    def poisoned(self: Experiment, stage: Any, run_dir: Path, callbacks: Any) -> Any:
        return make(self, stage, run_dir, [poison, *callbacks])

    monkeypatch.setattr(Experiment, "make_trainer", poisoned)
    result = engine(write(tree), "--out", tmp_path / "run")
    assert result.code == 1
    error = result.err.splitlines()[-1]
    assert error.startswith("error: ") and "'colours'" in error and "step 3" in error and "nan" in error
    state = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert state["finished_stage"] == 1 and not state["complete"]
    assert sorted(path.name for path in (tmp_path / "run" / "adapters").iterdir()) == ["stage-00", "stage-01"]
    poison.cured = True
    assert engine("--resume", tmp_path / "run").code == 0
    assert contents(tmp_path / "run") == contents(finished)


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "stop", "code", "line"),
    [
        ("training_step", interrupt, 130, "interrupted; go on with --resume"),
        ("training_step", terminate, 143, "terminated; go on with --resume"),
        ("test_step", terminate, 143, "terminated; go on with --resume"),
    ],
)
def test_a_run_that_is_stopped_ends_at_once_and_can_be_resumed(
    finished: Path,
    tree: Tree,
    write: Callable,
    engine: Callable,
    contents: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    stop: Callable[[], None],
    code: int,
    line: str,
) -> None:
    plain, calls = getattr(ContinualModule, step), list[int]()

    def stopped(self: ContinualModule, batch: Any, batch_idx: int, *more: Any) -> Any:
        calls.append(batch_idx)
        stop()
        return plain(self, batch, batch_idx, *more)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:
        patch.setattr(ContinualModule, step, stopped)
        try:
            result = engine(write(tree), "--out", tmp_path / "run")
        finally:
            signal.signal(signal.SIGINT, handlers[signal.SIGINT])  # Lightning ignores the signal from then on
    assert result.code == code and result.err.splitlines()[-1] == line
    assert len(calls) == 1 and signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]
    assert engine("--resume", tmp_path / "run").code == 0
    assert contents(tmp_path / "run") == contents(finished)

"""What a sweep tells while its cells run: a line a stage, the time left, and what each cell is doing."""

import io
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from continual.storage import manifest
from continual.sweeps import progress
from continual.sweeps.cells import CellRun
from continual.sweeps.progress import SweepProgress, last_line, short_names

CONFIG = "stages: [{name: animals}, {name: colours}]\n"


@pytest.fixture
def advance(finished: Path, tmp_path: Path) -> Callable[..., CellRun]:
    """Puts a cell's run on disk as it is after a stage, each stage having taken ten seconds."""

    def advance(place: str, stage: int | None) -> CellRun:
        cell = CellRun(tmp_path, place, CONFIG, tmp_path)
        if stage is not None:
            shutil.copytree(finished, cell.run_dir, dirs_exist_ok=True)
            state, _ = manifest.read(cell.run_dir)
            state.finished_stage, state.complete = stage, stage == 2
            state.stage_seconds = {str(done): 10.0 for done in range(stage + 1)}
            state.commit(cell.run_dir)
        return cell

    return advance


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes while a test tells of stages."""
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 0.0, time=time.time))


def looked(cells: list[CellRun], num_jobs: int = 1) -> SweepProgress:
    """Return a progress that looks only when it is told to."""
    shows = SweepProgress(cells, num_jobs)
    shows._over.set()
    return shows


@pytest.mark.usefixtures("stopped_clock")
def test_each_stage_is_told_once_with_its_scores_and_the_time_left(
    advance: Callable[..., CellRun], capsys: pytest.CaptureFixture[str]
) -> None:
    cell, other = advance("cells/lora/o-seed0", None), advance("cells/bank/o-seed0", None)
    with looked([cell, other]) as shows:
        for stage in (0, 1, 1):
            shows._look(advance(cell.place, stage))
        shows._look(advance(other.place, 1))
        advance(cell.place, 2)
        shows.end(cell.place, "[1/2] ended")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(": ")[0] for line in lines] == [
        "[00:00] lora, untrained",
        "[00:00] lora, stage 1 of 2",
        "[00:00] bank, untrained",
        "[00:00] bank, stage 1 of 2",
        "[00:00] lora, stage 2 of 2",
        "[1/2] ended",
    ]
    assert "animals " in lines[0] and "colours " in lines[0] and "left" not in lines[0]  # nothing to go by yet
    assert "animals [" in lines[1] and "colours" not in lines[1]
    assert lines[1].endswith("; about 00:30 left")  # one stage here and two there, ten seconds each, one at a time
    assert lines[3].endswith("; about 00:20 left")
    assert "animals " in lines[4] and "colours [" in lines[4] and lines[4].endswith("; about 00:10 left")


@pytest.mark.usefixtures("stopped_clock")
def test_cells_at_a_time_share_the_time_left_but_none_is_shorter_than_its_own(
    advance: Callable[..., CellRun], capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [advance(f"cells/lora/o-seed{seed}", None) for seed in range(4)]
    with looked(cells, num_jobs=4) as shows:
        shows._look(advance(cells[0].place, 1))
    assert capsys.readouterr().out.endswith("; about 00:20 left\n")  # two stages of ten seconds in the others


@pytest.mark.usefixtures("stopped_clock")
def test_stages_of_an_earlier_session_are_not_told_again(
    advance: Callable[..., CellRun], capsys: pytest.CaptureFixture[str]
) -> None:
    cell = advance("cells/lora/o-seed0", 1)
    with looked([cell]) as shows:
        shows._look(cell)
        shows._look(advance(cell.place, 2))
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.startswith("[00:00] lora, stage 2 of 2: animals ")


def test_the_watch_looks_by_itself_and_says_what_cells_do_without_a_terminal(
    advance: Callable[..., CellRun], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    cell = advance("cells/lora/o-seed0", 0)
    with SweepProgress([cell], 1) as shows:
        cell.log_path.parent.mkdir(parents=True)
        cell.log_path.write_text("Run\nstage 1/2 animals: train:  40%|####  | 2/5 [00:02<00:03]")
        advance(cell.place, 1)
        while shows.told[cell.place] < 1 or shows._spoken == shows._started:
            assert shows._thread.is_alive()
        shows._over.wait(1.5)
    printed = capsys.readouterr()
    assert "lora, stage 1 of 2: animals [" in printed.out
    assert "] lora: stage 1/2 animals: train: 40%\n" in printed.err and "####" not in printed.err


def test_a_terminal_has_a_last_line_of_its_own(
    advance: Callable[..., CellRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    cell = advance("cells/lora/o-seed0", None)
    with looked([cell]) as shows:
        shows._show()
        cell.log_path.parent.mkdir(parents=True)
        cell.log_path.write_text("")
        shows._show()
    assert "[00:00] starting" in screen.getvalue() and "[00:00] lora: starting" in screen.getvalue()
    assert "starting" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("Run x\n\n", "Run x"),
        ("stage 2/3 a b: end of stage: 100%|###| 3/3 [00:01<00:00]\r", "stage 2/3 a b: end of stage: 100%"),
        ("one\rstage 1/3 a: score:   0%|   | 0/4 [00:00<?, ?batch/s]", "stage 1/3 a: score: 0%"),
        ("x" * 9000 + "\n" + "long " * 40, ("long " * 40)[:60]),
    ],
)
def test_the_last_line_of_a_log(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "log").write_text(text)
    assert last_line(tmp_path / "log") == line


def test_a_cell_is_called_by_what_sets_it_apart() -> None:
    assert short_names(["cells/a/base-seed0", "cells/b/base-seed0"]) == ["a", "b"]
    assert short_names(["cells/a/base-seed0", "cells/a/base-seed1"]) == ["a base-seed0", "a base-seed1"]
    assert short_names(["tuning/a/00", "tuning/b/01"]) == ["a 00", "b 01"]


def test_many_tasks_are_told_by_their_mean(
    advance: Callable[..., CellRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_MOST_TASKS", 1)
    found: dict[str, Any] = {"animals": 0.25, "colours": 0.75}
    monkeypatch.setattr(progress, "scores_after", lambda *_: found)
    with looked([cell := advance("cells/lora/o-seed0", 1)]) as shows:
        shows._look(advance(cell.place, 2))
    assert capsys.readouterr().out.endswith("lora, stage 2 of 2: colours [0.750], mean of 2 tasks 0.500\n")

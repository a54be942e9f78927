"""A run goes on from what it wrote, on the same rows, one process at a time; else one line, and nothing changes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from forking import Forks

import analysis
import analysis.report
from analysis.report.run_page import run_page
from continual import ablate, rescore, run
from continual.engine.stage_loop import StageLoop
from continual.errors import RunError
from continual.storage import digests, manifest, records
from continual.storage.lock import DirectoryLock

Tree = dict[str, Any]
STRATEGY = {
    "class_path": "continual.strategies.GrowingBank",
    "init_args": {"background_rows": 8, "probe_rows": 12},
}


def every_byte(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def halves(base_tree: Tree, tables: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that ended after the first of two stages, by strategy, with tables of their own; to read only."""
    fit = StageLoop._fit
    found: dict[str, Path] = {}
    for name, strategy in (("growing", STRATEGY), ("replay", _replay())):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(tables, folder / "tables")
        tree: Tree = copy.deepcopy(base_tree) | {"token_sample": 2}
        tree["model"]["strategy"] = strategy
        for stage in tree["stages"]:
            stage["task"]["init_args"]["folder"] = str(folder / "tables")
        (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))

        def until(self: StageLoop, index: int) -> Any:
            if index == 2:
                raise RunError("that is enough")
            return fit(self, index)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StageLoop, "_fit", until)
            assert run.main([str(folder / "tiny.yaml"), "--out", str(folder / "run")]) == 1
        found[name] = folder / "run"
    return found


def _replay() -> Tree:
    return {"class_path": "continual.strategies.DERPlusPlus", "init_args": {"size": 5}}


def test_what_is_read_has_a_digest(halves: dict[str, Path]) -> None:
    """All files but the two that hold the digests and the configuration, of which the manifest has the hash."""
    for run_dir in halves.values():
        state, _ = manifest.read(run_dir)
        assert state.format == 2 and state.finished_stage == 1
        of_stage = {name for name in every_byte(run_dir) if "stage-00" not in name}
        known = state.files.keys() | {f"{table}.parquet" for table in state.tables}
        assert of_stage - known == {"manifest.json", "experiment.yaml"} and known <= of_stage
        assert all(set(stages) == {"0", "1"} for table, stages in state.tables.items() if table == "scores")


def damaged(path: Path, place: float) -> None:
    """Remove a file, or flip one of its bits at a share of its length."""
    if not place:
        path.unlink()
        return
    flipped = bytearray(path.read_bytes())
    flipped[int(place * len(flipped))] ^= 1
    path.write_bytes(flipped)


@pytest.mark.parametrize("place", [0, 0.5])
@pytest.mark.parametrize("name", ["growing", "replay"])
def test_a_file_that_is_not_what_was_written_is_named_and_nothing_is_changed(
    halves: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], place: float, name: str
) -> None:
    state, _ = manifest.read(halves[name])
    paths = [*state.files, *(f"{table}.parquet" for table in state.tables if not place)]
    assert len(paths) >= 4
    run_dir = Path(shutil.copytree(halves[name], tmp_path / "run"))
    for path in paths:
        damaged(run_dir / path, place)
        before = every_byte(run_dir)
        capsys.readouterr()
        assert run.main(["--resume", str(run_dir)]) == 1, path
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: {run_dir / path}"), line
        assert every_byte(run_dir) == before
        shutil.copy(halves[name] / path, run_dir / path)


def test_no_bit_of_a_table_changes_a_row_in_silence(halves: dict[str, Path], tmp_path: Path) -> None:
    """What changes no row, a flipped bit of a file's description of itself, is nobody's loss."""
    run_dir = Path(shutil.copytree(halves["growing"], tmp_path / "run"))
    state, _ = manifest.read(run_dir)
    found = []
    for table in state.tables:
        rows = records.read_arrow(run_dir, table)
        for tenth in range(1, 40):
            damaged(run_dir / f"{table}.parquet", tenth / 40)
            try:
                digests.check(run_dir, state)
                assert records.read_arrow(run_dir, table).equals(rows, check_metadata=False)
            except RunError as error:
                assert str(error).startswith(str(run_dir / f"{table}.parquet"))
                found.append(table)
            shutil.copy(halves["growing"] / f"{table}.parquet", run_dir)
    assert len(set(found)) == len(state.tables) >= 5


def test_rows_that_the_run_did_not_write_are_named(halves: dict[str, Path], tmp_path: Path, engine: Callable) -> None:
    run_dir = Path(shutil.copytree(halves["growing"], tmp_path / "run"))
    rows = pd.read_parquet(run_dir / "scores.parquet")
    rows.assign(value=0.5).to_parquet(run_dir / "scores.parquet")
    result = engine("--resume", run_dir)
    assert result.code == 1 and "scores.parquet" in result.err
    state, _ = manifest.read(run_dir)
    shutil.copy(halves["growing"] / "scores.parquet", run_dir)
    state.tables.pop("scores")
    state.commit(run_dir)
    result = engine("--resume", run_dir)
    assert result.code == 1 and "is not what the run wrote: it has rows of stage 0, 1" in result.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 999}, "is of format 999, and this version reads up to 2"),
        ({"format": "2"}, "format is a number"),
        ({"finished_stage": None}, "finished_stage is a int, not None"),
        ({"finished_stage": 7}, "finished_stage is a number from -1 to 2, not 7"),
        ({"complete": True}, "complete is True with 1 of 2 stages finished"),
        ({"stages": ["a", "a"]}, "stages is a list of different names"),
        ({"tables": []}, "tables is a dict"),
        ({"seed": True}, "seed is a int"),
    ],
)
def test_a_manifest_that_is_off_is_named_before_anything_is_cut_back(
    halves: dict[str, Path], tmp_path: Path, engine: Callable, change: Tree, words: str
) -> None:
    run_dir = Path(shutil.copytree(halves["replay"], tmp_path / "run"))
    path = run_dir / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = every_byte(run_dir)
    result = engine("--resume", run_dir)
    assert result.code == 1 and words in result.err and result.err.count("\n") == 1
    assert every_byte(run_dir) == before


# -- rows --------------------------------------------------------------------------------------------------------------

OTHER = {"bird": "fish", "fish": "bird"}
EDITS: dict[str, tuple[str, Callable[[pd.DataFrame], Any]]] = {
    "test labels swapped": ("animals.test", lambda rows: rows.assign(target=rows["target"].replace(OTHER))),
    "a test row gone": ("animals.test", lambda rows: rows[:-1]),
    "test rows in another order": ("animals.test", lambda rows: rows[::-1]),
    "a training text changed": ("colours.train", lambda rows: rows.assign(input=["What?", *rows["input"][1:]])),
    "a training row more": ("colours.train", lambda rows: pd.concat([rows, rows[:1]])),
    "another instruction": ("colours.train", lambda rows: rows.assign(instruction="Name the shade.")),
    "the training rows of a finished stage": ("animals.train", lambda rows: rows[1:]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_rows_that_changed_are_refused_or_accepted_with_a_note(
    halves: dict[str, Path], tmp_path: Path, engine: Callable, edit: str
) -> None:
    file, change = EDITS[edit]
    stage, split = file.split(".")
    run_dir = Path(shutil.copytree(halves["replay"], tmp_path / "run"))
    own = halves["replay"].parent / "tables"
    kept = tmp_path / "kept"
    shutil.copytree(own, kept)
    try:
        for each in ["colours.train", "colours.test"] if edit == "another instruction" else [file]:
            change(pd.read_parquet(own / f"{each}.parquet")).to_parquet(own / f"{each}.parquet")
        before = every_byte(run_dir)
        result = engine("--resume", run_dir)
        assert result.code == 2 and result.err.count("\n") == 1
        assert f"stages.{stage}: " in result.err and "--accept-data" in result.err
        assert f"its {split} rows are not those" in result.err
        assert every_byte(run_dir) == before
        if edit == "test labels swapped":
            result = engine("--resume", run_dir, "--accept-data")
            assert result.code == 0
            state, _ = manifest.read_finished(run_dir)
            assert state.accepted_data == ["The test rows of animals were replaced after stage 1 of 2."]
            page = run_page(analysis.load_run(run_dir))
            assert any("The test rows of animals were replaced" in notice for notice in page.notices)
    finally:
        shutil.rmtree(own)
        shutil.copytree(kept, own)


def test_the_commands_on_a_finished_run_look_at_the_rows_too(
    finished: Path, tmp_path: Path, base_tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    state, _ = manifest.read(run_dir)
    state.data["animals"]["test"] = "0" * 64
    state.commit(run_dir)
    before = every_byte(run_dir)
    for command, words in ((ablate.main, [str(run_dir)]), (rescore.main, [str(run_dir)])):
        capsys.readouterr()
        assert command(words) == 2
        assert "stages.animals: its test rows are not those that the run began with" in capsys.readouterr().err
    assert every_byte(run_dir) == before


# -- one process at a time ---------------------------------------------------------------------------------------------


def test_a_second_process_is_told_of_the_first(
    halves: dict[str, Path], forks: Forks, tmp_path: Path, engine: Callable
) -> None:
    run_dir = Path(shutil.copytree(halves["replay"], tmp_path / "run"))
    held = tmp_path / "held"
    holder = forks.start("integrity:hold", str(run_dir), str(held))
    while not held.exists():
        pass
    before = every_byte(run_dir)
    result = engine("--resume", run_dir)
    assert result.code == 2 and f"another process ({holder} on " in result.err and result.err.count("\n") == 1
    assert every_byte(run_dir) == before
    forks.kill(holder)  # and its lock with it
    assert engine("--resume", run_dir).code == 0
    assert not list(run_dir.glob(".*"))


def test_of_two_new_runs_in_one_directory_one_goes_on(base_tree: Tree, forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(base_tree))
    words = [str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--no-report"]
    errors = [tmp_path / "one", tmp_path / "other"]
    both = [forks.start("continual.run:main", words, errors=path) for path in errors]
    codes = [forks.wait(each) for each in both]
    assert sorted(codes) == [0, 2]
    scores = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    assert not scores.duplicated(["stage", "task", "metric"]).any()
    said = errors[codes.index(2)].read_text()
    assert "another process" in said or "holds a run already" in said


def test_within_a_process_a_lock_passes_to_the_last_and_forked_ones_do_not_hold_it(tmp_path: Path) -> None:
    one, other = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    one.acquire()
    one.acquire()
    other.acquire()
    one.release()  # holds it no more
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        other.release()
        assert not list(tmp_path.iterdir())
        with DirectoryLock(tmp_path) as third:
            third.acquire()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_rows_that_are_there_twice_are_told_of(finished: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    rows = pd.read_parquet(run_dir / "answers.parquet")
    records.append(run_dir, "answers", rows.head(3).to_dict(orient="records"))
    problem = analysis.load_run(run_dir).problems["answers"]
    assert "3 rows are there twice, the first of stage 0, task animals" in problem

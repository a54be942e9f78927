"""Bad input, as a newcomer gives it to ``python -m analysis.report``: one clear line, and the rest of the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_files as files

from analysis.report.command import main
from analysis.runs.load import RunReadError, load, load_run
from continual.storage import records

MakeRun = Callable[..., Path]
TINY = {"names": ["one", "two"], "num_atoms": 4, "num_blocks": 2, "num_rows": 20, "num_steps": 6}
pytestmark = pytest.mark.usefixtures("sketched")


def refused(where: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that the command leaves for ``where``, after checking that it wrote nothing."""
    existed = where.is_dir() and (where / "report").exists()
    assert main([str(where)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and printed.err.startswith(f"error: {where}")
    assert existed or not (where.is_dir() and (where / "report").exists())
    return printed.err


def reported(where: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """Return the lines that the command warns with, and report.md."""
    assert main([str(where)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(where / "report" / "report.html")]
    return printed.err.splitlines(), (where / "report" / "report.md").read_text(encoding="utf-8")


def edit(run: Path, **facts: Any) -> None:
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


# ---- no run


def test_a_place_that_is_neither_a_run_nor_a_sweep(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    assert "no such directory" in refused(tmp_path / "missing", capsys)
    assert "not a directory" in refused(tmp_path / "notes.txt", capsys)
    assert "it has no manifest.json and no sweep.json)" in refused(tmp_path / "empty", capsys)
    make_run("b", **TINY)
    shutil.copytree(tmp_path / "b", tmp_path / "a")
    assert "name one of those in it: a, b)" in refused(tmp_path, capsys)


@pytest.mark.parametrize("content", [b"", b"name: run\n", b'{"stages": [', b"\xa1\xff\x00", b"[]", b"null", b'"run"'])
def test_a_manifest_that_is_no_json_object(
    content: bytes, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(**TINY)
    (run / "manifest.json").write_bytes(content)
    assert "manifest.json: not a" in refused(run, capsys)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"stages": "one, two"}, "stages is a list of names"),
        ({"stages": ["one", 2]}, "stages is a list of names"),
        ({"stages": ["one", "one"]}, "named twice"),
        ({"finished_stage": 3}, "from -1 to 2, the number of stages, not 3"),
        ({"finished_stage": True}, "not True"),
        ({"finished_stage": "2"}, "not '2'"),
        ({"tasks": ["one", "two"]}, "tasks is an object"),
        ({"tasks": {"one": "accuracy"}}, "tasks.one is an object"),
        ({"model": "SmolLM2"}, "model is an object"),
        ({"stage_seconds": [1.0]}, "stage_seconds is an object"),
        ({"scoring_seconds": 1.0}, "scoring_seconds is an object"),
    ],
)
def test_a_manifest_of_another_shape(
    facts: dict[str, Any], said: str, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(**TINY)
    edit(run, **facts)
    assert said in refused(run, capsys)


def test_a_report_that_cannot_be_written(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(**TINY)
    (run / "report").write_text("a file in its place")
    assert "report: the report cannot be written (Not a directory)" in refused(run, capsys)


# ---- a run that lacks something


def test_one_stage_of_plain_lora_says_what_cannot_be_shown_and_why(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    warned, text = reported(make_run(routes=False, **TINY | {"names": ["one"]}), capsys)
    assert warned == []
    assert "**Cannot be shown:** the run recorded no routes (LoraConfig does not route over atoms" in text
    assert "forgetting: – (it needs two finished stages)" in text
    assert all(part in text for part in ("## Scores", "### The score matrix", "## Training", "## Details"))


@pytest.mark.parametrize("how", ["half", "head", "empty", "text", "middle"])
@pytest.mark.parametrize("table", ["scores", "routing", "separation", "drift", "gradients", "answers"])
def test_a_damaged_table_is_one_line_and_the_rest_is_as_it_was(table: str, how: str, make_run: MakeRun) -> None:
    run = make_run(**TINY)
    whole = load_run(run)
    path = run / f"{table}.parquet"
    content = path.read_bytes()
    size = len(content)
    damaged = {"half": content[: size // 2], "head": content[:10], "empty": b"", "text": b"stage,task\n1,one\n"}
    damaged["middle"] = content[:4] + bytes(size - 20) + content[-16:]
    path.write_bytes(damaged[how])
    found = load_run(run)
    assert set(found.problems) == {table} and found.tables[table].empty
    line = found.problems[table]
    assert line.startswith(f"{table}.parquet: not a readable parquet file (") and "\n" not in line
    assert all(found.tables[name].equals(whole.tables[name]) for name in records.SCHEMAS if name != table)


def test_every_table_cut_short_still_leaves_a_report(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(**TINY)
    cut = sorted(path.name for path in run.glob("*.parquet"))
    for name in cut:
        (run / name).write_bytes((run / name).read_bytes()[:40])
    warned, text = reported(run, capsys)
    assert sorted(line.removeprefix(f"warning: {run}/").split(":")[0] for line in warned) == cut
    assert "The scores cannot be read" in text and "## Details" in text


def test_rows_of_no_width_are_no_certainty(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Where every row earned the same, redrawing rows shows no spread: the report says what that is worth."""
    run = make_run(routes=False, **TINY)
    answers, scores = (records.read(run, table).assign(value=0.0) for table in ("answers", "scores"))
    for table, rows in (("answers", answers), ("scores", scores)):
        (run / f"{table}.parquet").unlink()
        records.append(run, table, rows.to_dict("records"))
    _, text = reported(run, capsys)
    assert "| 0.00 to 0.00 " in text and "may still lie 3/n away" in text
    _, usual = reported(make_run("usual", routes=False, **TINY | {"num_rows": 200}), capsys)
    assert "3/n" not in usual


# ---- sweeps


@pytest.mark.parametrize("content", ["", "name: sweep", "[]", "{}", '{"methods": [], "cells": []}'])
def test_a_sweep_file_that_cannot_be_read(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text(content)
    assert "sweep.json: " in refused(tmp_path, capsys)


def test_a_sweep_of_one_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.plausible_sweep(tmp_path, ("alone",), 3, ("first", "second"), num_rows=20, baseline="alone")
    warned, text = reported(tmp_path, capsys)
    assert warned == [] and "it is the sweep's one method" in text
    assert "**Cannot be shown:** the sweep has one method, and a difference takes two" in text
    assert "Intervals are rough" in text and "### Every measure" in text


def test_a_sweep_with_damaged_cells_compares_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.plausible_sweep(tmp_path, ("lora", "ewc"), 3, ("first", "second"), num_rows=20, baseline="lora")
    (tmp_path / "cells/ewc/first-seed0/manifest.json").write_text("not json")
    scores = tmp_path / "cells/lora/second-seed0/scores.parquet"
    scores.write_bytes(scores.read_bytes()[: scores.stat().st_size // 2])
    warned, text = reported(tmp_path, capsys)
    assert len(warned) == 2
    assert any("cells/ewc/first-seed0: manifest.json: not a readable manifest" in line for line in warned)
    assert any("cells/lora/second-seed0: scores.parquet: not a readable parquet file" in line for line in warned)
    assert "2 of 4 cells" in text and "| lora " in text and "| ewc " in text


def test_a_run_among_others_that_cannot_be_read_is_named(make_run: MakeRun) -> None:
    good, bad = make_run("good", **TINY), make_run("bad", **TINY)
    (bad / "manifest.json").write_text("{")
    with pytest.raises(RunReadError, match=f"^{bad}/manifest.json: not a readable manifest"):
        load(good.parent / "*")

"""Runs of the code before its modules moved, kept as they were left: they resume, and their reports say the same."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from analysis import load, summarise
from analysis.report import write_report
from continual.storage import manifest

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests" / "old_runs"
DERIVED = ("separation", "drift")


@pytest.mark.parametrize("name", ["plain", "growing"])
def test_a_half_finished_run_goes_on_to_what_the_old_code_ended_with(
    name: str, engine: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the configuration names its tables from there
    run_dir, finished = Path(shutil.copytree(OLD / f"{name}-half", tmp_path / "run")), OLD / f"{name}-finished"
    result = engine("--resume", run_dir)
    assert result.code == 0 and "begun by an older version, without digests" in result.out
    state, _ = manifest.read_finished(run_dir)
    assert state.format == 2 and {table: set(found) for table, found in state.tables.items()}["scores"] == set("0123")
    tables = {path.name for path in finished.glob("*.parquet")} - {f"{table}.parquet" for table in DERIVED}
    assert len(tables) == 4
    for table in tables:
        assert pq.read_table(run_dir / table).equals(pq.read_table(finished / table)), table
    weights = [path.relative_to(finished) for path in finished.rglob("*.safetensors")]
    assert len(weights) >= 4
    for path in weights:
        assert (run_dir / path).read_bytes() == (finished / path).read_bytes(), path
    then, now = load(finished), load(run_dir)
    for table in DERIVED:  # old stages from the old file, the new one derived
        assert set(now[table]["stage"]) == set(then[table]["stage"])
        pd.testing.assert_frame_equal(now[table], then[table], check_exact=False, rtol=0, atol=1e-12)
    assert not list(run_dir.glob("known-answers*"))


@pytest.mark.parametrize("name", ["plain", "growing"])
def test_a_finished_run_is_read_as_it_was(name: str) -> None:
    found = summarise(load(OLD / f"{name}-finished").runs[0]).values
    assert found["forgetting"] is not None and found["js_separation"] is not None


def test_the_report_of_a_finished_run_says_what_the_old_code_s_did(tmp_path: Path, sketched: None) -> None:
    run_dir = Path(shutil.copytree(OLD / "plain-finished", tmp_path / "run"))
    then = json.loads((run_dir / "report" / "summary.json").read_text())
    write_report(run_dir)
    now = json.loads((run_dir / "report" / "summary.json").read_text())
    assert _rounded(now) == _rounded(then)


def _rounded(value: object) -> object:
    """Return nested values with numbers to twelve places."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 12) if isinstance(value, float) and math.isfinite(value) else value

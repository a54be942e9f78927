"""The benchmarks work, at sizes that take seconds; how fast anything is, no test says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"suite", "case", "measure", "value", "unit", "low", "high", "rounds", "goal", "met", "detail", "tiny", "seed"}
MACHINE = {"hardware", "cores", "device", "threads", "torch", "peft", "python"}


@pytest.mark.slow
def test_every_figure_comes_with_all_that_it_depends_on(tmp_path: Path) -> None:
    command = [sys.executable, "tests/benchmarks", "--tiny", "--seed", "3", "--out", str(tmp_path / "out")]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out").read_text().splitlines()
    assert done.stdout.splitlines()[: len(lines)] == lines
    assert len(done.stdout.splitlines()) == 2 * len(lines) + 1  # the table, with a heading
    figures = [json.loads(line) for line in lines]
    expected = 39 + 4 * (importlib.util.find_spec("bitsandbytes") is not None)
    assert len(figures) == expected == len({(f["suite"], f["case"], f["measure"]) for f in figures})
    for figure in figures:
        assert set(figure) >= KEYS
        assert set(figure["environment"]) >= MACHINE
        assert (figure["seed"], figure["tiny"], figure["met"]) == (3, True, None)
        assert isinstance(figure["value"], float)

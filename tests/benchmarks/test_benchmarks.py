"""The benchmarks work, at sizes that take seconds; how fast anything is, no test says."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"suite", "case", "measure", "value", "unit", "low", "high", "rounds", "goal", "met", "detail", "tiny", "seed"}
MACHINE = {"hardware", "cores", "device", "threads", "torch", "peft", "python"}


@pytest.mark.slow
def test_every_figure_comes_with_all_that_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--tiny", "--seed", "3", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path("tests/benchmarks", run_name="__main__")  # as python tests/benchmarks
    assert end.value.code == 0
    lines, printed = (tmp_path / "out").read_text().splitlines(), capsys.readouterr().out.splitlines()
    assert printed[: len(lines)] == lines
    assert len(printed) == 2 * len(lines) + 1  # the table, with a heading
    figures = [json.loads(line) for line in lines]
    expected = 39 + 4 * (importlib.util.find_spec("bitsandbytes") is not None)
    assert len(figures) == expected == len({(f["suite"], f["case"], f["measure"]) for f in figures})
    for figure in figures:
        assert set(figure) >= KEYS
        assert set(figure["environment"]) >= MACHINE
        assert (figure["seed"], figure["tiny"], figure["met"]) == (3, True, None)
        assert isinstance(figure["value"], float)

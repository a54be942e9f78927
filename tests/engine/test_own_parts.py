"""A recorder and a strategy from a package of one's own, named by their class paths, in a few lines each."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

import continual.strategies.base as base_file
from analysis import load
from continual.engine.stage_loop import StageLoop
from continual.strategies import Strategy

Tree = dict[str, Any]

RECORDER = '''
import torch
from continual.callbacks import Recorder


class LongestAnswers(Recorder):
    """The longest answer of each batch, and how far the adapter has come from zero."""

    def begin(self, context):
        self.context, self.rows = context, []

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        task = self.context.scored[dataloader_idx].name
        longest = float(max(map(len, outputs.predictions)))
        measured = {"metric": "characters", "direction": "none", "value": longest, "count": len(outputs.rows)}
        self.rows.append(self.context.keys | {"task": task, "batch": batch_idx} | measured)

    def tables(self):
        return {"longest_answers": self.rows}
'''

STRATEGY = '''
import torch
import continual.strategies.base as base_file
from continual.strategies import Strategy


class Halve(Strategy):
    """After each stage, whatever was trained is halved; the loss is pulled to zero while it trains."""

    def __init__(self, weight: float = 0.5) -> None:
        self.weight, self.stages = weight, []

    def penalty(self, module, batch, outputs):
        return self.weight * sum(p.square().sum() for p in module.parameters() if p.requires_grad)

    @torch.no_grad()
    def end_stage(self, module, data, stage):
        self.stages.append(data.name)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)

    def write(self, folder):
        (folder / "stages.txt").write_text("\\n".join(self.stages))

    def read(self, module, folder):
        self.stages = (folder / "stages.txt").read_text().splitlines()
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of one's own."""
    folder = tmp_path / "mine_parts"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name, text in (("recorder", RECORDER), ("strategy", STRATEGY)):
        assert len(text.strip().splitlines()) < 30
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_recorder_of_ones_own_finds_its_table_in_the_run_and_its_frame(
    mine: None, tree: Tree, write: Callable, engine: Callable, tmp_path: Path
) -> None:
    plain = engine(write(tree), "--out", tmp_path / "plain")
    tree["recorders"] = [{"class_path": "mine_parts.recorder.LongestAnswers"}]
    config = write(tree)
    assert engine(config, "--out", tmp_path / "run").code == plain.code == 0
    frame = load(tmp_path / "run")["longest_answers"]
    assert set(frame.columns) >= {"run", "seed", "stage", "task", "batch", "metric", "direction", "value", "count"}
    assert set(frame["stage"]) == {0, 1, 2} and list(frame["task"].cat.categories) == ["animals", "colours"]
    assert frame.groupby(["stage", "task"], observed=True)["count"].sum().eq(6).all()
    answers = load(tmp_path / "run").answers
    longest = answers.assign(length=answers["prediction"].str.len()).groupby(["stage", "task"], observed=True)["length"]
    pd.testing.assert_series_equal(
        frame.groupby(["stage", "task"], observed=True)["value"].max(), longest.max().astype(float), check_names=False
    )
    # A run without it has the name that it had before there were any, and the same tables otherwise.
    for table in (tmp_path / "plain").glob("*.parquet"):
        one, other = (pq.read_table(folder / table.name).drop(["run"]) for folder in (table.parent, tmp_path / "run"))
        assert one.equals(other), table.name


def test_its_table_is_cut_back_with_the_others(
    mine: None, tree: Tree, write: Callable, engine: Callable, tmp_path: Path, contents: Callable
) -> None:
    tree["recorders"] = [{"class_path": "mine_parts.recorder.LongestAnswers"}]
    config = write(tree)
    assert engine(config, "--out", tmp_path / "whole").code == 0
    save = Strategy.save

    def fail(self: Strategy, folder: Path) -> None:
        if self.stage == 2:
            raise RuntimeError("the power is gone")
        save(self, folder)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="the power is gone"):
        patch.setattr(Strategy, "save", fail)
        engine(config, "--out", tmp_path / "killed")
    assert set(pd.read_parquet(tmp_path / "killed" / "longest_answers.parquet")["stage"]) == {0, 1, 2}
    assert engine("--resume", tmp_path / "killed").code == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("recorders", "line"),
    [
        ([{"class_path": "mine_parts.recorder.Longest"}], "LongestAnswers"),
        ([{"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}}], "recorders"),
        ("mine", "recorders"),
    ],
)
def test_what_is_no_recorder_is_one_line(
    mine: None, tree: Tree, write: Callable, engine: Callable, tmp_path: Path, recorders: Any, line: str
) -> None:
    result = engine(write(tree | {"recorders": recorders}), "--out", tmp_path / "run")
    assert (result.code, result.err.count("\n")) == (2, 1) and line in result.err
    assert not (tmp_path / "run").exists()


def test_a_strategy_of_ones_own_is_called_and_goes_on_after_a_kill(
    mine: None, tree: Tree, write: Callable, engine: Callable, tmp_path: Path, contents: Callable
) -> None:
    tree["model"]["strategy"] = {"class_path": "mine_parts.strategy.Halve", "init_args": {"weight": 0.1}}
    config = write(tree)
    assert engine(config, "--out", tmp_path / "whole").code == 0
    assert (tmp_path / "whole" / "strategy" / "stage-02" / "stages.txt").read_text() == "animals\ncolours"
    fit = StageLoop._fit

    def fail(self: StageLoop, index: int) -> Any:
        if index == 2:
            raise RuntimeError("the power is gone")
        return fit(self, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="the power is gone"):
        patch.setattr(StageLoop, "_fit", fail)
        engine(config, "--out", tmp_path / "killed")
    assert engine("--resume", tmp_path / "killed").code == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_the_list_of_hooks_names_every_hook_that_a_shipped_strategy_uses() -> None:
    """The docstring of strategies/base.py is what a newcomer reads."""
    listed = str(base_file.__doc__)
    base = {name for name in vars(Strategy) if not name.startswith("_")}
    used = set[str]()
    for path in Path(base_file.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name != "Strategy":
                names = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                used |= {name for name in names if name in base or name.startswith("on_")}
    assert len(used) > 15
    assert sorted(name for name in used if name not in listed) == []

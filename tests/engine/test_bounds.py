"""Bounds beside a run: ordinary runs under another strategy, resumed with it and set beside it in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis import load_run
from analysis.summaries.bounds import joint_scores
from continual.commands.run import run as go_on
from continual.commands.run import run_text
from continual.commands.terminal import guarded
from continual.errors import ConfigError, RunError
from continual.storage import manifest
from continual.training.module import ContinualModule

CONFIG = Path(__file__).parents[2] / "configs" / "regression.yaml"
NAMES = ["zero_shot", "per_task", "joint", "per_instruction_lookup"]


def configuration(bounds: list[str]) -> str:
    """Return two stages of regression, of a second each."""
    tree: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    tree |= {"bounds": bounds, "stages": tree["stages"][:2]}
    tree["trainer"]["max_epochs"] = 2
    tree["model"]["backbone"]["init_args"] |= {"hidden_size": 8, "num_layers": 2}
    tree["model"]["adapter"]["init_args"] |= {"num_blocks": 2, "r": 2, "lora_alpha": 2}
    for stage in tree["stages"]:
        stage["task"]["init_args"] |= {"train_rows": 64, "test_rows": 20}
    return yaml.safe_dump(tree)


@pytest.mark.usefixtures("sketched")
def test_bounds_stand_beside_the_run_and_go_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    step = ContinualModule.training_step

    def die(self: Any, *arguments: Any) -> Any:
        if type(self.strategy).__name__ == "Joint" and self.strategy.stage == 2:
            raise RunError("killed")
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualModule, "training_step", die)
        with pytest.raises(RunError, match="killed"):
            run_text(configuration(NAMES), "bounded", run_dir)
    assert manifest.read(run_dir)[0].complete
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert summary["intransigence"] is None and "bounds" in (run_dir / "report" / "report.md").read_text()

    before = {path: path.read_bytes() for path in (run_dir / "bounds" / "per_task").glob("*.parquet")}
    go_on(None, resume=run_dir)
    assert before and all(path.read_bytes() == content for path, content in before.items())
    assert sorted(path.name for path in (run_dir / "bounds").iterdir()) == sorted(NAMES[1:])
    joint, run = load_run(run_dir / "bounds" / "joint"), load_run(run_dir)
    scores = joint.tables["scores"]
    r2 = scores[scores["metric"] == "r2"].set_index(["stage", "task"])["value"]
    assert joint_scores(run) == [r2[1, "friedman"], r2[2, "borehole"]]
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert summary["intransigence"] == pytest.approx(r2[2, "borehole"] - summary["score_matrix"][2][1])
    text = (run_dir / "report" / "report.md").read_text()
    assert all(f"| {name.replace('_', ' ')} " in text for name in NAMES)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [(["joiny"], "did you mean joint"), (["everything"], "there are zero_shot"), (["joint", "joint"], "given twice")],
)
def test_unknown_bound_is_one_line(
    bounds: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_text(configuration(bounds), "bounded", tmp_path / "run")
    assert guarded(lambda: run_text(configuration(bounds), "bounded", tmp_path / "run")) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "run").exists()

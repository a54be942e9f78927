"""The mixtures of experts through ``continual.run``: trained, scored with their routes, resumed, under a strategy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from continual.adapters.experts.experts import ExpertTuner
from continual.adapters.tuner import is_routed
from continual.config import experiment

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = {"r": 2, "num_experts": 3, "top_k": 2, "target_modules": ["q_proj", "v_proj"]}
KINDS = {"MoeLoraConfig": {"balance_weight": 0.1}, "CoMoLConfig": {}}
each_kind = pytest.mark.parametrize("kind", KINDS)


def with_experts(tree: dict[str, Any], kind: str, **fields: Any) -> dict[str, Any]:
    """Return the experiment with one of the mixtures as its adapter."""
    init_args = EXPERTS | KINDS[kind] | fields
    tree["model"]["adapter"] = {"class_path": f"continual.adapters.{kind}", "init_args": init_args}
    return tree


@each_kind
def test_a_run_learns_records_routes_and_resumes_to_the_same_bytes(
    tree: dict[str, Any], write: Callable[..., str], engine: Callable, contents: Callable, tmp_path: Path, kind: str
) -> None:
    path, whole, cut = write(with_experts(tree, kind)), tmp_path / "whole", tmp_path / "cut"
    assert (result := engine(path, "--out", whole)).code == 0, result.err
    routing = pd.read_parquet(whole / "routing.parquet")
    usage = routing[routing["metric"] == "usage"]
    assert set(usage["block"]) == {0, 1, 2, 3} and set(usage["atom"]) == {0, 1, 2}  # q and v of two layers
    sums: Any = usage.groupby(["stage", "task", "block"])["value"].sum()
    assert list(sums) == pytest.approx([1.0] * 3 * 2 * 4)
    weights = [load_file(whole / "adapters" / f"stage-0{s}" / "adapter_model.safetensors") for s in (0, 2)]
    assert all(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.cat([t.flatten() for n, t in weights[0].items() if "expert_B" in n]).abs().max() == 0

    shutil.copytree(whole, cut)
    state = json.loads((cut / "manifest.json").read_text())
    (cut / "manifest.json").write_text(json.dumps(state | {"finished_stage": 1, "complete": False}))
    assert (result := engine("--resume", cut)).code == 0, result.err
    assert contents(cut) == contents(whole)


@each_kind
def test_a_regression_sequence_runs_and_routes(engine: Callable, tmp_path: Path, kind: str) -> None:
    init_args = "{r: 4, num_experts: 4, top_k: 2, target_modules: [linear, head]}"
    result = engine(
        ROOT / "configs" / "regression.yaml",
        "--out",
        tmp_path / "run",
        "trainer.max_epochs=2",
        f"model.adapter={{class_path: continual.adapters.{kind}, init_args: {init_args}}}",
        "stages.*.task.init_args.train_rows=32",
        "stages.*.task.init_args.test_rows=16",
    )
    assert result.code == 0, result.err
    usage: Any = pd.read_parquet(tmp_path / "run" / "routing.parquet").query("metric == 'usage'")
    assert usage["block"].nunique() >= 4 and usage["atom"].nunique() == 4


@pytest.mark.parametrize("strategy", ["LwF", "DERPlusPlus", "AGEM", "EWC"])
def test_strategies_run_with_a_balance_loss(
    tree: dict[str, Any], write: Callable[..., str], engine: Callable, tmp_path: Path, strategy: str
) -> None:
    """Each of them makes forward passes of its own within a step or a stage."""
    tree = with_experts(tree, "MoeLoraConfig")
    tree["model"]["strategy"] = {"class_path": f"continual.strategies.{strategy}"}
    result = engine(write(tree), "--out", tmp_path / "run")
    assert result.code == 0, result.err


@each_kind
def test_the_auxiliary_loss_is_added_to_the_step_and_not_to_the_datas_loss(
    tree: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = experiment.parse(yaml.safe_dump(with_experts(tree, kind, balance_weight=0.5)), "tiny").model
    module.configure_model()
    assert module.model is not None and is_routed(module.model)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "_weight_in_step", lambda index: 1.0)  # no trainer: a step of one batch
    ids = torch.randint(1, 90, (2, 6))
    labels = ids[:, 3:]
    batch = {"forward": {"input_ids": ids}, "labels": labels, "rows": [0, 1], "weight": 1.0}
    tuner = module.tuner
    assert isinstance(tuner, ExpertTuner)
    data = module.loss(batch, module.outputs(batch))
    auxiliary = tuner.auxiliary_loss()
    assert auxiliary is not None and auxiliary > 0.4
    torch.testing.assert_close(module.training_step(batch, 0), data + auxiliary)

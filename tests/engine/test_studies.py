"""The studies compare like with like: equal trainable parameters, and ablations that take one part away."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from analysis.summaries.studies import ABLATIONS, ablated, whole_adapter
from continual.adapters import QueryableLoraConfig
from continual.backbones import MLPRegressor
from continual.storage import manifest, records
from continual.sweeps import plan as sweep_plan

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "studies"
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a reader of studies that leaves the slow check of every method to test_configs."""
    monkeypatch.setattr(sweep_plan, "_check_configurations", lambda *_: None)
    return lambda name: sweep_plan.load(FOLDER / f"{name}.yaml")


def adapters(plan: sweep_plan.Plan) -> dict[str, Any]:
    found = {}
    for method, settings in plan.methods.items():
        tree = yaml.safe_load(plan.configuration(method, settings, plan.stages, 0))["model"]["adapter"]
        module, _, name = tree["class_path"].rpartition(".")
        found[method] = getattr(importlib.import_module(module), name)(**tree["init_args"])
    return found


def trained(model: nn.Module, adapter: PeftConfig) -> int:
    return sum(p.numel() for p in get_peft_model(model, adapter).parameters() if p.requires_grad)  # type: ignore[arg-type]


def test_noisy_regression_is_of_equal_parameters_within_a_tenth(plan) -> None:
    study = plan("regression")
    sizes = {method: trained(MLPRegressor().build(), adapter) for method, adapter in adapters(study).items()}
    assert set(sizes) == {"lora", "dora", "lily", "moe_lora", "queryable", "instruction_queryable"}
    assert max(sizes.values()) <= 1.1 * min(sizes.values()), sizes
    stages = [stage["task"]["init_args"] for stage in study.base["stages"]]
    assert len({stage["function"] for stage in stages}) == 8 and len({stage["noise"] for stage in stages}) == 3
    assert len(stages) == 24 and len(study.orders["base"].seeds) == 5


def test_the_language_model_study_is_of_equal_parameters_within_a_twentieth(plan) -> None:
    sizes = {}
    for method, adapter in adapters(plan("llm")).items():
        adapter.task_type = "CAUSAL_LM"
        with torch.device("meta"):
            sizes[method] = trained(LlamaForCausalLM(SMOLLM2), adapter)
    assert (sizes["lora"], sizes["queryable"], sizes["instruction_queryable"]) == (921_600, 924_456, 933_928)
    assert max(sizes.values()) <= 1.05 * min(sizes.values()), sizes


@pytest.mark.parametrize(("name", "whole"), [("llm", "instruction_queryable"), ("ablations", "whole")])
def test_ablations_take_every_part_away_once(plan, name: str, whole: str) -> None:
    study = plan(name)
    assert whole_adapter(study.methods) == whole
    changed = {method: ablated(study.methods, whole, method) for method in study.methods if method != whole}
    parts = [tuple(fields.items()) for fields in changed.values() if fields]
    assert len(parts) == len(set(parts)) == 9
    assert all(len(part) == 1 for part in parts)
    assert {field for ((field, _),) in parts} == set(ABLATIONS)
    built = adapters(study)
    default = QueryableLoraConfig()
    for method, fields in changed.items():
        for field, value in fields.items():
            assert getattr(built[method], field) == value != getattr(built[whole], field)
            if field in ("query_source", "detach_query", "use_depth_summary"):
                assert value != getattr(default, field)
    all_atoms = next(method for method, fields in changed.items() if "top_k" in fields)
    assert built[all_atoms].top_k == built[all_atoms].num_atoms


def tables(folder: Path, stages: list[dict[str, Any]]) -> None:
    """Write a miniature of each text table that the stages read, with the tables' own columns and labels."""
    for stage in stages:
        arguments = stage["task"]["init_args"]
        for split in ("train", "test") if "labels" in arguments else ():
            labels = arguments["labels"]
            rows = [
                {"instruction": f"Sort by {stage['name']}.", "input": f"{split} text {index}", "target": target}
                for index, target in enumerate(labels * 3)
            ]
            pd.DataFrame(rows).to_parquet(folder / arguments[f"{split}_file"])


@pytest.mark.parametrize(
    ("name", "method"), [("llm", "instruction_query"), ("gradients", "queryable"), ("reuse", "reuse")]
)
def test_a_study_made_for_a_gpu_runs_on_a_tiny_backbone(
    plan, engine: Callable[..., Any], write: Callable[..., str], tmp_path: Path, name: str, method: str
) -> None:
    study = plan(name)
    order = next(iter(study.orders.values()))
    tree = yaml.safe_load(study.configuration(method, study.methods[method], order.stages, 0))
    tree["model"]["backbone"] = {
        "class_path": "continual.backbones.TinyCausalLM",
        "init_args": {"hidden_size": 16, "num_layers": 2},
    }
    tree["model"]["adapter"]["init_args"] |= {"num_blocks": 2}
    tree["trainer"] = {"max_epochs": 1, "accelerator": "cpu"}
    tree["data"] = {"batch_size": 4, "max_tokens": 1024}
    for stage in tree["stages"]:
        arguments = stage["task"]["init_args"]
        arguments["train_rows"] = 6
        stage["max_epochs"] = 1
        if "labels" in arguments:
            arguments["folder"] = str(tmp_path)
        else:
            arguments["test_rows"] = 6
    tables(tmp_path, tree["stages"])
    assert engine(write(tree), "--out", tmp_path / "run").code == 0
    state, _ = manifest.read(tmp_path / "run")
    assert state.complete and state.milliseconds_a_row and state.model["accounting"]["total"]["parameters"] > 0
    scores: Any = records.read(tmp_path / "run", "scores")
    theory: Any = records.read(tmp_path / "run", "theory")
    chosen = {metric for metric in scores["metric"] if metric.endswith("_best_training")}
    assert bool(chosen) is (name == "llm")
    assert bool(len(theory)) is (name == "gradients")
    assert (theory["value"] <= 1 + 1e-5).all()

"""A two-task experiment of seconds, as text and as a module with its data, that the strategy tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from continual.config import experiment
from continual.data.stage_data import StageData
from continual.engine.stage_loop import StageLoop
from continual.training.module import ContinualModule

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {
        "class_path": "peft.LoraConfig",
        "init_args": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    },
    "queryable": {
        "class_path": "continual.adapters.QueryableLoraConfig",
        "init_args": {"r": 2, "num_atoms": 4, "top_k": 2, "num_blocks": 2, "prior_dim": 4,
                      "target_modules": ["q_proj", "v_proj"]},
    },
    "experts": {
        "class_path": "continual.adapters.MoeLoraConfig",
        "init_args": {"r": 2, "num_experts": 4, "top_k": 2, "balance_weight": 0.5,
                      "target_modules": ["q_proj", "v_proj"]},
    },
    "regressor": {
        "class_path": "peft.LoraConfig",
        "init_args": {"r": 2, "lora_alpha": 4, "target_modules": ["linear", "head"]},
    },
    "queryable_regressor": {
        "class_path": "continual.adapters.QueryableLoraConfig",
        "init_args": {"r": 2, "num_atoms": 4, "top_k": 2, "num_blocks": 2, "prior_weight": 0.0,
                      "target_modules": ["linear", "head"]},
    },
}  # fmt: skip

WORDS = ["red", "blue", "green", "black", "white"]


def _text_task(folder: Path, name: str, labels: list[str], num_rows: int) -> dict[str, Any]:
    for split, count in (("train", num_rows), ("test", 8)):
        lines = ["text,label"]
        # Two thirds of the rows carry the first label.
        lines += [f"{WORDS[(i * 3 + len(name)) % 5]} {name} {split} {i},{labels[i % 3 % 2]}" for i in range(count)]
        (folder / f"{name}_{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "class_path": "tasks.TextTask",
        "init_args": {
            "train_file": str(folder / f"{name}_train.csv"),
            "test_file": str(folder / f"{name}_test.csv"),
            "columns": {"question": "text", "answer": "label"},
            "labels": labels,
            "instruction": f"Sort by {name}.",
        },
    }


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., str]:
    """Return a maker of configurations, as YAML: a strategy, an adapter of ``ADAPTERS``, more of ``model``'s keys."""

    def make(strategy: str, adapter: str = "lora", num_stages: int = 2, rows: int = 8, **init_args: Any) -> str:
        regression = adapter.endswith("regressor")
        folder = tmp_path / "tables"
        folder.mkdir(exist_ok=True)
        labels = [["yes", "no"], ["up", "down"], ["left", "right"]]
        tasks: list[dict[str, Any]] = [
            _text_task(folder, name, own, rows) for name, own in zip(["sign", "way", "side"], labels, strict=True)
        ]
        if regression:
            shape = {"train_rows": 3 * rows, "test_rows": 8}
            tasks = [
                {"class_path": "tasks.RegressionTask", "init_args": {"function": function, **shape}}
                for function in ("friedman", "piston", "borehole")
            ]
        backbone = "MLPRegressor" if regression else "TinyCausalLM"
        sizes = {"hidden_size": 8, "num_layers": 2} if regression else {"hidden_size": 16, "num_layers": 2}
        tree = {
            "threads": 1,
            "model": {
                "backbone": {"class_path": f"continual.backbones.{backbone}", "init_args": sizes},
                "adapter": ADAPTERS[adapter],
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02, "weight_decay": 0.0}},
                "warmup_steps": 0,
                "strategy": {"class_path": f"continual.strategies.{strategy}", "init_args": init_args},
            },
            "data": {"batch_size": 4, "max_tokens": 128},
            "trainer": {"max_epochs": 2, "accelerator": "cpu"},
            "stages": [{"name": f"task{i}", "task": task} for i, task in enumerate(tasks[:num_stages])],
        }
        return yaml.safe_dump(tree)

    return make


@pytest.fixture
def sequence(configure: Callable[..., str], tmp_path: Path) -> Callable[..., StageLoop]:
    """Return a maker of prepared runs; it takes what ``configure`` takes, and the run's folder."""

    def make(strategy: str, *args: Any, run: str = "run", **kwargs: Any) -> StageLoop:
        made = StageLoop(experiment.parse(configure(strategy, *args, **kwargs), "strategy"), tmp_path / run)
        made.prepare()
        return made

    return make


@pytest.fixture
def prepared(sequence: Callable[..., StageLoop]) -> Callable[..., tuple[ContinualModule, list[StageData]]]:
    """Return a maker of a module with its strategy and the data of its stages."""

    def make(strategy: str, *args: Any, **kwargs: Any) -> tuple[ContinualModule, list[StageData]]:
        made = sequence(strategy, *args, **kwargs)
        return made.module, made.data

    return make

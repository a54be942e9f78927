"""What the callbacks' tests share: tasks of random rows, tiny adapted modules, and Trainers that write nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import pytest
import torch
from datasets import Dataset
from peft import PeftConfig
from torch import nn

from continual.adapters import QueryableLoraConfig
from continual.backbones import MLPRegressor, TinyCausalLM
from continual.data.stage_data import StageData
from continual.training.module import ContinualModule
from tasks import Task
from tasks.base import Split, text_rows

Kind = Literal["labels", "free", "regression"]


class MemoryTask(Task):
    """A task of random rows."""

    def __init__(self, kind: Kind, num_rows: int, instruction: str, seed: int) -> None:
        self.kind, self.num_rows, self.instruction, self.seed = kind, num_rows, instruction, seed
        self.labels = ["no", "no way", "yes"] if kind == "labels" else None

    def _build(self) -> dict[Split, Dataset]:
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "regression":
            x = torch.randn(self.num_rows, 3, generator=generator)
            rows = Dataset.from_list(
                [{"x": row.tolist(), "y": row.sum().item(), "row": index} for index, row in enumerate(x)]
            )
        else:
            lengths = torch.randint(1, 30, (self.num_rows,), generator=generator).tolist()
            answers = self.labels or ["one", "three hundred"]
            rows = text_rows(
                [
                    (chr(97 + index % 26) * length, f"row {index}?", answers[length % len(answers)], index)
                    for index, length in enumerate(lengths)
                ]
            )
        return {"train": rows, "test": rows}


class Tasks(L.LightningDataModule):
    """The test rows of several tasks, one loader each."""

    def __init__(self, stages: list[StageData]) -> None:
        super().__init__()
        self.stages = stages

    def test_dataloader(self) -> list[Any]:
        """Return a loader for each task."""
        return [data.test_dataloader() for data in self.stages]


@pytest.fixture(scope="session")
def make_data() -> Callable[..., StageData]:
    """Return a maker of one task's data, prepared for a module."""

    def make(
        module: ContinualModule,
        kind: Kind = "labels",
        name: str = "one",
        num_rows: int = 9,
        instruction: str = "Say yes or no.",
        seed: int = 0,
        **arguments: Any,
    ) -> StageData:
        data = StageData(MemoryTask(kind, num_rows, instruction, seed), **arguments)
        data.name = name
        data.prepare(module)
        return data

    return make


@pytest.fixture(scope="session")
def make_module() -> Callable[..., ContinualModule]:
    """Return a maker of tiny adapted modules; ``spread`` is the standard deviation that B starts with."""

    def make(kind: str = "causal_lm", adapter: PeftConfig | None = None, spread: float = 0.3) -> ContinualModule:
        torch.manual_seed(0)
        if kind == "causal_lm":
            backbone: Any = TinyCausalLM()
            fields: dict[str, Any] = {}
        else:
            backbone = MLPRegressor(num_inputs=3, hidden_size=8, num_layers=4)
            fields = {"target_modules": ["linear", "head"], "prior_weight": 0.0}
        default = QueryableLoraConfig(r=4, num_atoms=5, top_k=2, num_blocks=2, prior_dim=4, **fields)
        module = ContinualModule(backbone, default if adapter is None else adapter)
        module.configure_model()
        for name, parameter in module.named_parameters():
            if "lora_B" in name or "queryable_B" in name or "summary_queries" in name:
                nn.init.normal_(parameter, std=spread)
        return module

    return make


@pytest.fixture(scope="session")
def make_trainer() -> Callable[..., L.Trainer]:
    """Return a maker of Trainers that write nothing and show nothing."""

    def make(*callbacks: L.Callback, **arguments: Any) -> L.Trainer:
        off: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        return L.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **(off | arguments))

    return make


@pytest.fixture(scope="session")
def run_test(make_trainer: Callable[..., L.Trainer]) -> Callable[..., None]:
    """Return what scores tasks with some callbacks, as a run does after a stage."""

    def run(module: ContinualModule, stages: list[StageData], *callbacks: L.Callback) -> None:
        make_trainer(*callbacks).test(module, datamodule=Tasks(stages), verbose=False)

    return run

"""Gradients of several batches added up are those of one larger batch: the mean over all answer tokens of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from continual.config import experiment
from continual.engine.stage_loop import StageLoop
from continual.runtime.parameters import trainable

STRATEGIES: dict[str, dict[str, Any]] = {
    "Sequential": {},
    "ExperienceReplay": {"size": 6, "replay_fraction": 0.5},
    "DERPlusPlus": {"size": 6},
    "AGEM": {"size": 6},
    "EWC": {"weight": 10.0},
    "LwF": {},
}


@pytest.fixture
def trained(configure: Callable[..., str], tmp_path: Path) -> Callable[..., list[Tensor]]:
    """Trains stages on rows whose answers have 2 and 60 tokens; returns the adapter."""

    def trained(strategy: str, batch_size: int, num_accumulated: int, rows: int = 8, **data: Any) -> list[Tensor]:
        adapter = data.pop("adapter", "lora")
        trainer = {"accumulate_grad_batches": num_accumulated, **data.pop("trainer", {})}
        text = configure(strategy, adapter, rows=rows, **STRATEGIES[strategy])
        for path in (tmp_path / "tables").glob("*.csv"):
            path.write_text(path.read_text().replace(",yes", f",{LONG}").replace(",down", f",{LONG}"))
        tree = yaml.safe_load(text.replace("- 'yes'", f"- {LONG}").replace("- down", f"- {LONG}"))
        tree["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
        tree["data"] |= {"batch_size": batch_size, **data}
        tree["trainer"] |= trainer
        place = tmp_path / f"run-{batch_size}-{num_accumulated}"
        loop = StageLoop(experiment.parse(yaml.safe_dump(tree), "accumulation"), place)
        loop.prepare()
        loop.run()
        return [parameter.detach() for parameter in trainable(loop.module)]

    return trained


LONG = "a" * 59


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_of_several_batches_is_that_of_their_rows(trained: Callable[..., Any], strategy: str) -> None:
    whole = trained(strategy, 8, 1)
    for batch_size, num_accumulated in ((4, 2), (2, 4)):
        torch.testing.assert_close(trained(strategy, batch_size, num_accumulated), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["packed", "regressor"])
def test_other_layouts_count_alike(trained: Callable[..., Any], kind: str) -> None:
    data: dict[str, Any] = {"packing": True} if kind == "packed" else {"adapter": "regressor"}
    rows = 8 if kind == "packed" else 2  # of a regressor there are three times as many
    size = 8 if kind == "packed" else 6
    whole = trained("Sequential", size, 1, rows, **data)
    torch.testing.assert_close(trained("Sequential", size // 2, 2, rows, **data), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["Sequential", "DERPlusPlus", "EWC", "LwF"])
def test_a_step_at_an_epochs_end_may_have_fewer(trained: Callable[..., Any], strategy: str) -> None:
    """One batch an epoch: however many a step might take, it is that one."""
    whole = trained(strategy, 8, 1)
    for num_accumulated in (2, 4):
        torch.testing.assert_close(trained(strategy, 8, num_accumulated), whole, rtol=1e-5, atol=1e-7)


def test_a_limit_on_batches_shortens_the_last_step(trained: Callable[..., Any]) -> None:
    """Of three batches two are trained on: with four to a step both make one, as two to a step do."""
    limited = {"limit_train_batches": 2}
    pairs = trained("Sequential", 2, 2, 6, trainer=limited)
    torch.testing.assert_close(trained("Sequential", 2, 4, 6, trainer=limited), pairs, rtol=1e-5, atol=1e-7)

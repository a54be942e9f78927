"""The epoch of best training accuracy is scored beside the last one, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from continual.callbacks import best_training
from continual.storage import records

EVEN_RATE = ("model.warmup_steps=0", "model.final_lr_fraction=1.0", "best_checkpoint=true")
PER_TASK = "model.strategy={class_path: continual.strategies.PerTask}"


def value(scores: Any, task: str, stage: int, metric: str) -> float:
    rows = scores[(scores["task"] == task) & (scores["stage"] == stage) & (scores["metric"] == metric)]
    (found,) = rows["value"]
    return float(found)


@pytest.mark.parametrize("strategy", [None, PER_TASK])
def test_the_best_epoch_is_scored_as_a_run_that_ends_there(
    tree, write, engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str | None
) -> None:
    tree["stages"] = tree["stages"][:1]
    path, more = write(tree), [] if strategy is None else [strategy]
    assert engine(path, *EVEN_RATE, *more, "trainer.max_epochs=1", "--out", tmp_path / "one").code == 0
    assert engine(path, *EVEN_RATE[:2], *more, "trainer.max_epochs=3", "--out", tmp_path / "plain").code == 0
    falling = iter([0.9, 0.5, 0.9])  # the first epoch is the best; of equal ones the first
    monkeypatch.setattr(best_training, "training_accuracy", lambda module, data: next(falling))
    assert engine(path, *EVEN_RATE, *more, "trainer.max_epochs=3", "--out", tmp_path / "three").code == 0
    one, three, plain = (records.read(tmp_path / name, "scores") for name in ("one", "three", "plain"))
    for metric in ("accuracy", "accuracy_seen"):
        assert value(three, "animals", 1, f"{metric}_best_training") == value(one, "animals", 1, metric)
    assert value(three, "animals", 1, "training_accuracy") == 0.9
    assert value(three, "animals", 1, "training_accuracy_best_training") == 0.9
    # What the run leaves besides is the same as without.
    metrics: Any = plain["metric"]
    kept: Any = three[three["metric"].isin(metrics.unique())].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept.drop(columns="run"), plain.drop(columns="run"))
    first, second = (records.read(tmp_path / name, "answers").drop(columns="run") for name in ("three", "plain"))
    pd.testing.assert_frame_equal(first, second)


def test_training_accuracy_counts_whole_answers(tree, write, engine: Callable[..., Any], tmp_path: Path) -> None:
    """A model that has learnt its rows by heart has them all right, and one that is untrained has not."""
    tree["stages"] = tree["stages"][:1]
    tree["model"]["adapter"]["init_args"]["r"] = 8
    more = ("trainer.max_epochs=60", "model.optimizer.init_args.lr=0.03", "best_checkpoint=true")
    assert engine(write(tree), *more, "--out", tmp_path / "run").code == 0
    scores = records.read(tmp_path / "run", "scores")
    assert value(scores, "animals", 1, "training_accuracy_best_training") > 0.9
    rows = scores[scores["metric"] == "training_accuracy"]
    assert rows["count"].tolist() == [12] and rows["direction"].tolist() == ["higher"]


def test_a_strategy_that_changes_the_adapter_is_refused(
    tree, write, engine: Callable[..., Any], tmp_path: Path
) -> None:
    strategy = "model.strategy={class_path: continual.strategies.EWC, init_args: {weight: 1}}"
    result = engine(write(tree), strategy, "best_checkpoint=true", "--out", tmp_path / "run")
    assert result.code == 2
    assert "best_checkpoint: EWC" in result.err and len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()

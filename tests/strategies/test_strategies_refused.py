"""What a strategy cannot do is refused in one line before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from continual.commands.run import run_text
from continual.commands.terminal import guarded
from continual.config import experiment
from continual.engine.stage_loop import StageLoop
from continual.errors import ConfigError
from continual.strategies import Sequential


@pytest.mark.parametrize(
    ("strategy", "arguments", "message"),
    [
        ("ExperienceReplay", {"size": 0}, "model.strategy.size must be at least 1 row, got 0"),
        ("ExperienceReplay", {"replay_fraction": 1.0}, "replay_fraction must lie between 0 and 1"),
        ("DERPlusPlus", {"size": 0}, "model.strategy.size must be at least 1 row"),
        ("DERPlusPlus", {"alpha": -0.1}, "model.strategy.alpha must be at least 0, got -0.1"),
        ("DERPlusPlus", {"memory_batch_size": 0}, "memory_batch_size must be at least 1"),
        ("AGEM", {"size": -1}, "model.strategy.size must be at least 1 row"),
        ("EWC", {"weight": -1.0}, "model.strategy.weight must be at least 0, got -1"),
        ("EWC", {"weight": float("nan")}, "model.strategy.weight must be at least 0, got nan"),
        ("EWC", {"fisher_rows": 0}, "fisher_rows must be at least 1"),
        ("EWC", {"estimator": "diagonal"}, "estimator"),
        ("OnlineEWC", {"decay": 1.5}, "model.strategy.decay must lie in"),
        ("LwF", {"temperature": 0.0}, "model.strategy.temperature must be above 0"),
        ("LwF", {"weight": -2.0}, "model.strategy.weight must be at least 0"),
        ("SEQR", {"calibration_rows": 0}, "calibration_rows must be at least 1"),
        ("OLoRA", {"weight": -0.5}, "model.strategy.weight must be at least 0"),
        ("NLoRA", {"weight": -0.5}, "model.strategy.weight must be at least 0"),
        ("CLoRA", {"weight": -0.5}, "model.strategy.weight must be at least 0"),
        ("ExperienceReplay", {"sise": 3}, "did you mean size"),
        ("ExperienceReplai", {}, "did you mean ExperienceReplay"),
    ],
)
def test_bad_argument(strategy: str, arguments: dict[str, Any], message: str, configure: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")) as caught:
        experiment.parse(configure(strategy, **arguments), "strategy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "adapter", "overrides", "message"),
    [
        ("OLoRA", "queryable", [], "OLoRA needs the adapter peft.LoraConfig, not QueryableLoraConfig"),
        ("SEQR", "queryable", [], "SEQR needs the adapter peft.LoraConfig, not QueryableLoraConfig"),
        ("NLoRA", "queryable", [], "NLoRA needs the adapter peft.LoraConfig, not QueryableLoraConfig"),
        ("CLoRA", "queryable", [], "CLoRA needs the adapter peft.LoraConfig, not QueryableLoraConfig"),
        ("CLoRA", "lora", ["model.adapter.init_args.use_dora=true"], "leave use_dora of model.adapter out"),
        ("Joint", "lora", ["data.validation_rows=8"], "leaves none of the 8 training rows"),
        ("ExperienceReplay", "lora", ["data.validation_rows=8"], "leaves none of the 8 training rows"),
        ("OLoRA", "lora", ["model.adapter.init_args.use_dora=true"], "leave use_dora of model.adapter out"),
        ("OLoRA", "lora", ["model.adapter.init_args.bias=all"], "leave bias of model.adapter out"),
        ("OLoRA", "lora", ["model.adapter.init_args.target_modules=[embed_tokens]"], "linear layers alone"),
        ("ExperienceReplay", "regressor", ["model.strategy.init_args.class_balanced=true"], "is regression"),
        ("AGEM", "regressor", ["model.strategy.init_args.class_balanced=true"], "'task0' is regression"),
    ],
)
def test_unfit_strategy(
    strategy: str,
    adapter: str,
    overrides: list[str],
    message: str,
    configure: Callable[..., str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match=message) as caught:
        StageLoop(experiment.parse(configure(strategy, adapter), "strategy", overrides), folder).prepare()
    assert "\n" not in str(caught.value) and not folder.exists()


def test_exact_fisher_of_a_large_vocabulary(
    configure: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("continual.strategies.ewc._LARGEST_EXACT", 100)
    run = StageLoop(experiment.parse(configure("EWC", estimator="exact"), "strategy"), tmp_path / "run")
    with pytest.raises(ConfigError, match="take 'sampled'"):
        run.prepare()


def test_exit_status_and_one_line(
    configure: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = configure("ExperienceReplay", size=0)
    assert guarded(lambda: run_text(text, "strategy", tmp_path / "run")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_default_is_plain_training_and_is_written_out(configure: Callable[..., str]) -> None:
    tree = yaml.safe_load(configure("Sequential"))
    del tree["model"]["strategy"]
    parsed = experiment.parse(yaml.safe_dump(tree), "strategy")
    assert type(parsed.model.strategy) is Sequential
    assert "class_path: continual.strategies.Sequential" in parsed.resolved

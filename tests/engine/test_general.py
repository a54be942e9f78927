"""General ability: the passages, their log-likelihood against transformers' own loss, the table, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig

from analysis.runs.frames import Frame
from continual.adapters import QueryableLoraConfig
from continual.backbones import TinyCausalLM
from continual.callbacks import general
from continual.errors import ConfigError
from continual.storage import records
from continual.training.module import ContinualModule

ADAPTERS: list[Any] = [
    QueryableLoraConfig(r=2, num_atoms=3, top_k=2, num_blocks=2, prior_dim=4),
    LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["queryable", "lora"])
@pytest.mark.parametrize("batch_tokens", [1, 2000])
def test_an_untrained_model_has_the_backbones_own_loss(
    adapter: Any, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general, "BATCH_TOKENS", batch_tokens)
    module = ContinualModule(TinyCausalLM(num_layers=2), adapter)
    module.configure_model()
    module.eval()
    rows = general.encode_passages(module.backbone)[:7]
    backbone = TinyCausalLM(num_layers=2).build()
    total, count = 0.0, 0
    with torch.inference_mode():
        value, num_tokens = general.log_likelihood(module, rows)
        for text in general.passages()[:7]:
            ids = TinyCausalLM().tokenizer(text, return_tensors="pt")["input_ids"]
            total += backbone(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert num_tokens == count
    assert value == pytest.approx(-total / count, rel=1e-5)


def test_no_instruction_is_given_and_the_adapter_counts() -> None:
    module = ContinualModule(TinyCausalLM(num_layers=2), ADAPTERS[0])
    module.configure_model()
    module.eval()
    rows = general.encode_passages(module.backbone)[:2]
    assert {row.instruction for row in rows} == {""}
    before, _ = general.log_likelihood(module, rows)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert general.log_likelihood(module, rows)[0] != before


def test_the_passages_are_many_of_a_size_and_no_two_alike() -> None:
    texts = general.passages()
    assert len(texts) >= 60
    assert len({text[:40] for text in texts}) == len(texts)
    assert all(60 <= len(text.split()) <= 120 and "\n" not in text for text in texts)


@pytest.mark.parametrize("strategy", ["Sequential", "SEQR"])
def test_a_run_measures_after_every_stage_and_resumes_to_the_same(
    strategy: str, tree: dict[str, Any], write: Callable[..., str], engine: Callable[..., Any], tmp_path: Path
) -> None:
    tree["general_ability"] = True
    if strategy == "SEQR":
        lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
        tree["model"] |= {"adapter": lora, "strategy": {"class_path": "continual.strategies.SEQR"}}
    assert engine(write(tree), "--out", tmp_path / "run").code == 0
    rows: Frame = records.read(tmp_path / "run", "general")
    assert rows["stage"].tolist() == [0, 1, 2]
    assert set(rows["metric"]) == {"log_likelihood_nats"} and set(rows["direction"]) == {"higher"}
    assert rows["value"].nunique() == 3 and (rows["value"] < 0).all()
    module = ContinualModule(TinyCausalLM(num_layers=2), ADAPTERS[1])
    module.configure_model()
    module.eval()
    with torch.inference_mode():
        untrained = general.log_likelihood(module, general.encode_passages(module.backbone))
    assert (rows["value"][0], rows["count"][0]) == (pytest.approx(untrained[0], rel=1e-6), untrained[1])


def test_a_run_that_does_not_ask_measures_nothing(finished: Path) -> None:
    assert records.read(finished, "general").empty


def test_a_backbone_that_reads_no_text_is_refused(
    write: Callable[..., str], engine: Callable[..., Any], tmp_path: Path
) -> None:
    tree = yaml.safe_load((Path(__file__).resolve().parents[2] / "configs" / "regression.yaml").read_text())
    tree["model"]["adapter"]["init_args"]["prior_weight"] = 0
    tree["general_ability"] = True
    result = engine(write(tree), "--out", tmp_path / "run")
    assert result.code == 2 and len(result.err.strip().splitlines()) == 1
    assert "general_ability: MLPRegressor is no causal language model" in result.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError):
        general.encode_passages(type("Numbers", (), {"kind": "regressor"})())

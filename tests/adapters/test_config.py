"""The configuration: what contradicts itself or the model gives one clear line."""

from __future__ import annotations

from typing import Any

import pytest
from peft import PeftConfig, PeftType, get_peft_model

from continual.adapters import QueryableLoraConfig

BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r must be at least 1, got 0"),
    ({"num_atoms": 0}, "num_atoms must be at least 1, got 0"),
    ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
    ({"key_dim": 0}, "key_dim must be at least 1, got 0"),
    ({"prior_dim": 0}, "prior_dim must be at least 1, got 0"),
    ({"top_k": 9, "num_atoms": 8}, "top_k (9) is larger than num_atoms (8)"),
    ({"lora_dropout": 1.0}, "lora_dropout must lie in [0, 1), got 1.0"),
    ({"prior_weight": -1.0}, "prior_weight must not be negative, got -1.0"),
    ({"prior_temperature": 0.0}, "prior_temperature must be positive, got 0.0"),
    ({"query_source": "instruction_only", "prior_weight": 0}, "query_source 'instruction_only' needs prior_weight"),
    (
        {"query_source": "sate"},
        "query_source must be one of state, frozen_random, instruction_query, instruction_only, uniform",
    ),
    ({"init_atoms": "eye"}, "init_atoms must be one of orthogonal, noise, identity, got 'eye'"),
    ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform needs target_modules as a list"),
    ({"layers_pattern": "h"}, "layers_pattern says nothing without layers_to_transform"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_fields_are_named_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        QueryableLoraConfig(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_more_blocks_than_layers(backbone) -> None:
    config = QueryableLoraConfig(task_type="CAUSAL_LM", num_blocks=5, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"^num_blocks \(5\) is larger than the number of adapted layers \(4\)$"):
        get_peft_model(backbone(), config)


def test_a_prior_without_embeddings_needs_a_width(plain_model) -> None:
    config = QueryableLoraConfig(num_blocks=2, target_modules=["up"])
    with pytest.raises(ValueError, match="set instruction_dim to the width of the encodings that you pass"):
        get_peft_model(plain_model(), config)
    get_peft_model(plain_model(), QueryableLoraConfig(num_blocks=2, target_modules=["up"], prior_weight=0))


def test_round_trips_through_a_file(tmp_path) -> None:
    targets: Any = {"v_proj", "q_proj"}
    config = QueryableLoraConfig(r=3, num_atoms=5, top_k=2, prior_weight=0.5, target_modules=targets)
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, QueryableLoraConfig)
    # PEFT records its version on saving, and marks what it loads as inference.
    unlike = {"inference_mode", "peft_version"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in unlike} == {
        k: v for k, v in config.to_dict().items() if k not in unlike
    }


def test_the_method_is_a_member_of_pefts_enum() -> None:
    member = PeftType("QUERYABLE")
    assert member is PeftType.QUERYABLE  # type: ignore[attr-defined]
    assert member in list(PeftType)
    assert QueryableLoraConfig().peft_type == member == "QUERYABLE"

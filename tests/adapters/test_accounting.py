"""accounting(): counts against the model's own tensors, PyTorch's FLOP counter and plain LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

CASES: list[dict[str, Any]] = [
    {},
    {"num_blocks": 4, "r": 3, "key_dim": 5, "top_k": 6},
    {"num_blocks": 1},
    {"prior_weight": 0, "use_depth_summary": False},
    {"query_source": "frozen_random"},
    {"query_source": "instruction_only"},
    {"query_source": "uniform"},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_parameters_are_those_that_train(backbone, adapt, fields: dict[str, Any]) -> None:
    model = adapt(backbone(), **fields)
    table = model.base_model.accounting()
    assert table["total"]["parameters"] == model.get_nb_trainable_parameters()[0]
    components = {
        "A": ["queryable_A"],
        "B": ["queryable_B"],
        "bank": ["bank.default.atoms"],
        "keys": ["bank.default.keys"],
        "query_maps": ["bank.default.query_maps", "bank.default.summary_queries"],
        "prior": ["bank.default.prior_map", "bank.default.prior_keys"],
    }
    for component, names in components.items():
        counted = sum(p.numel() for n, p in model.named_parameters() if any(name in n for name in names))
        assert table[component]["parameters"] == counted, component
    assert list(table) == [*components, "total", "lora"]
    for key in ("parameters", "flops_per_token", "flops_per_row"):
        assert table["total"][key] == sum(table[component][key] for component in components)


@pytest.mark.parametrize("fields", CASES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_flops_are_those_that_pytorch_counts(
    backbone, adapt, ids, instructions, kind: str, fields: dict[str, Any]
) -> None:
    model = adapt(backbone(kind), **fields)
    table = model.base_model.accounting()["total"]
    counted = {}
    with torch.no_grad():
        for name, network in (("backbone", backbone(kind)), ("adapted", model)):
            kwargs = {"instruction_ids": instructions} if name == "adapted" else {}
            with FlopCounterMode(display=False) as counter:
                network(ids, **kwargs)
            counted[name] = counter.get_total_flops()
    # PyTorch counts no matrix-vector products: the depth summary's scores, w_b . z_j for each j < b, are added here.
    config = model.peft_config["default"]
    if config.uses_summary:
        counted["adapted"] += 2 * config.r * sum(range(1, config.num_blocks)) * ids.numel()
    expected = table["flops_per_token"] * ids.numel() + table["flops_per_row"] * len(ids)
    assert counted["adapted"] - counted["backbone"] == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_plain_lora_beside_it(backbone, adapt, ids, kind: str) -> None:
    model = adapt(backbone(kind))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=model.peft_config["default"].target_modules)
    lora = get_peft_model(backbone(kind), config).eval()
    table = model.base_model.accounting()["lora"]
    assert table["parameters"] == lora.get_nb_trainable_parameters()[0]
    with torch.no_grad():
        with FlopCounterMode(display=False) as base:
            backbone(kind)(ids)
        with FlopCounterMode(display=False) as counter:
            lora(ids)
    assert counter.get_total_flops() - base.get_total_flops() == table["flops_per_token"] * ids.numel()

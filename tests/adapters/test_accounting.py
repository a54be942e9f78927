"""accounting(): counts against the model's own tensors, PyTorch's FLOP counter and plain LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from continual.adapters.queryable.layer import QueryableLinear
from continual.adapters.queryable.router import routed_operator

CASES: list[dict[str, Any]] = [
    {},
    {"num_blocks": 4, "r": 3, "key_dim": 5, "top_k": 6},
    {"num_blocks": 1},
    {"prior_weight": 0, "use_depth_summary": False},
    {"query_source": "frozen_random"},
    {"query_source": "instruction_query", "key_dim": 5, "num_blocks": 3},
    {"query_source": "instruction_only"},
    {"detach_query": True, "top_k": 6},
    {"query_source": "uniform"},
]


def flops_of(network: Any, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs that PyTorch counts; of itself it passes over matrix-vector products (the depth summary's)."""

    def matrix_vector(matrix: Any, vector: Any, *rest: Any, **more: Any) -> int:
        return 2 * matrix[0] * matrix[1]

    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: matrix_vector}) as counter:
        network(*args, **kwargs)
    return counter.get_total_flops()


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
            counted[name] = flops_of(network, ids, **kwargs)
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


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_flops_of_each_component_are_those_that_pytorch_counts(
    backbone, adapt, ids, instructions, fields: dict[str, Any]
) -> None:
    """Each part is run by itself on the tensors of its real shapes; nothing of the accounting's formulas enters."""
    model = adapt(backbone(), **fields)
    table = model.base_model.accounting()
    bank, config = model.base_model.queryable_bank["default"], model.peft_config["default"]
    layers = [module for module in model.modules() if isinstance(module, QueryableLinear)]
    encoding = model.base_model.encode_instruction(instructions) if config.uses_prior else None
    num_tokens, num_rows = ids.numel(), len(ids)
    tokens = torch.randn(*ids.shape, config.r)
    state = bank.begin(encoding)

    def down() -> None:
        for layer in layers:
            torch.nn.functional.linear(torch.randn(*ids.shape, layer.in_features), layer.queryable_A["default"])

    def up() -> None:
        for layer in layers:
            torch.nn.functional.linear(tokens, layer.queryable_B["default"])

    def route() -> None:
        for block in state.blocks:
            bank.route(block, tokens)

    def operators() -> None:
        for block in state.blocks:
            assert block.route is not None
            routed_operator(block.route, bank.atoms)

    def applied() -> None:
        for layer in layers:
            bank.apply_route(state.blocks[layer.blocks["default"]], tokens.unsqueeze(-2))

    def spent(*names: str) -> int:
        return sum(
            table[name]["flops_per_token"] * num_tokens + table[name]["flops_per_row"] * num_rows for name in names
        )

    assert flops_of(down) == spent("A")
    assert flops_of(up) == spent("B")
    asks = ("keys", "query_maps")
    once_a_row = config.query_source == "instruction_query"  # the instruction's queries are made as a pass begins
    assert flops_of(lambda: bank.begin(encoding)) == spent("prior", *asks * once_a_row)
    assert flops_of(route) - flops_of(operators) == spent(*asks) * (not once_a_row)
    assert flops_of(operators) + flops_of(applied) == spent("bank")

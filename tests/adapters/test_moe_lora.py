"""MoE-LoRA: equal to plain LoRA where it has to be, the explicit sum of its experts otherwise."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from continual.adapters import MoeLoraConfig


def lora_with(backbone: Any, pairs: dict[str, tuple[Tensor, Tensor]], model: PeftModel) -> PeftModel:
    """Return plain LoRA on the same targets with the given A and B, by the projection's name."""
    targets = cast(MoeLoraConfig, model.peft_config["default"]).target_modules
    lora = get_peft_model(backbone, LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, (down, up) in pairs.items():
            module: Any = lora.get_submodule(name)
            module.lora_A["default"].weight.copy_(down)
            module.lora_B["default"].weight.copy_(up)
    return lora.eval()


def experts_of(model: PeftModel) -> dict[str, Any]:
    """Return the adapted projections by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "expert_A")}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_expert_is_plain_lora(backbone, mix, ids, family: str) -> None:
    model = mix("moe_lora", backbone(family, torch.float64), num_experts=1, top_k=1, balance_weight=0)
    pairs = {n: (m.expert_A["default"][0], m.expert_B["default"][:, 0]) for n, m in experts_of(model).items()}
    lora = lora_with(backbone(family, torch.float64), pairs, model)
    torch.testing.assert_close(model(ids).logits, lora(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "fields", [{"top_k": 1}, {"top_k": 3}, {"top_k": None, "balance_weight": 0}, {"shared_A": True}]
)
def test_equal_experts_are_plain_lora_whatever_the_routes(backbone, mix, ids, fields: dict[str, Any]) -> None:
    model = mix("moe_lora", backbone(dtype=torch.float64), **fields)
    with torch.no_grad():
        for module in experts_of(model).values():
            module.expert_A["default"][:] = module.expert_A["default"][:1].clone()
            module.expert_B["default"][:] = module.expert_B["default"][:, :1].clone()
    pairs = {n: (m.expert_A["default"][0], m.expert_B["default"][:, 0]) for n, m in experts_of(model).items()}
    lora = lora_with(backbone(dtype=torch.float64), pairs, model)
    torch.testing.assert_close(model(ids).logits, lora(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared_A", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_update_is_the_weighted_sum_of_the_chosen_experts(plain_model, mix, top_k: int, shared_A: bool) -> None:
    options = {"top_k": top_k, "balance_weight": 0, "shared_A": shared_A, "lora_alpha": 6}
    model = mix("moe_lora", plain_model(torch.float64), target_modules=["layers.0.up"], **options)
    layer = model.get_base_model().layers[0].up
    x = torch.randn(7, 6).double()
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with model.base_model.record_routes() as record:
        model(x)
    down, up, router = (getattr(layer, f"expert_{name}")["default"] for name in ("A", "B", "router"))
    for token in range(7):
        logits = router @ x[token]
        chosen = logits.topk(top_k).indices
        weights = logits[chosen].softmax(dim=0)
        torch.testing.assert_close(record[0]["default"][0][token, chosen], weights)
        update = sum(
            w * up[:, e] @ down[0 if shared_A else e] @ x[token] for w, e in zip(weights, chosen.tolist(), strict=True)
        )
        torch.testing.assert_close(outputs[0][token], layer.get_base_layer()(x[token]) + 6 / 4 * update)


def test_a_shared_A_is_one_matrix_and_top_1_trains_no_router_without_the_balance_loss(backbone, mix, ids) -> None:
    model = mix("moe_lora", backbone(), shared_A=True, top_k=1).train()
    layer = next(iter(experts_of(model).values()))
    assert layer.expert_A["default"].shape == (1, 4, 32)
    assert layer.expert_B["default"].shape == (32, 5, 4)
    model(ids, labels=ids).loss.backward(retain_graph=True)
    assert layer.expert_router["default"].grad.abs().max() == 0
    model.base_model.auxiliary_loss().backward()
    assert layer.expert_router["default"].grad.abs().max() > 0


def test_dropout_touches_the_experts_and_not_the_routes(plain_model, mix) -> None:
    model = mix("moe_lora", plain_model(num_layers=1), target_modules=["layers.0.up"], lora_dropout=0.5).train()
    x = torch.randn(9, 6)
    with model.base_model.record_routes() as record:
        first, second = model(x), model(x)
    assert not torch.equal(first, second)
    assert torch.equal(*[entry["default"][0] for entry in record])


def test_defaults_follow_the_paper() -> None:
    config = MoeLoraConfig()
    assert (config.num_experts, config.top_k, config.balance_weight, config.shared_A) == (8, 2, 0.01, False)

"""CoMoL: the merged core equals the sum of the experts' updates, and plain LoRA where the cores are all alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.linalg import matrix_norm

from continual.adapters import CoMoLConfig


def own(layer: Any, name: str) -> Tensor:
    """Return an adapted projection's tensor."""
    return getattr(layer, f"expert_{name}")["default"]


@pytest.mark.parametrize("core_routing", [True, False])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_the_merged_core_is_the_explicit_sum_of_expert_updates(
    plain_model, mix, core_routing: bool, top_k: int | None
) -> None:
    options = {"top_k": top_k, "core_routing": core_routing, "lora_alpha": 6}
    model = mix("comol", plain_model(torch.float64), target_modules=["layers.0.up"], **options)
    layer = model.get_base_model().layers[0].up
    x = torch.randn(7, 6).double()
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with model.base_model.record_routes() as record:
        model(x)
    down, up, router, cores = (own(layer, name) for name in ("A", "B", "router", "core"))
    for token in range(7):
        u = down @ x[token]
        logits = router @ (u if core_routing else x[token])
        chosen = logits.topk(top_k or 5).indices
        weights = torch.zeros(5).double().scatter(0, chosen, logits[chosen].softmax(dim=0))
        torch.testing.assert_close(record[0]["default"][0][token], weights)
        experts = torch.stack([up @ core @ down for core in cores])  # each expert's whole update of the weight
        base = layer.get_base_layer()(x[token])
        summed = torch.einsum("e,eij->ij", weights, experts)
        torch.testing.assert_close(outputs[0][token], base + 6 / 4 * summed @ x[token])
        merged = torch.einsum("e,eij->ij", weights, cores)
        torch.testing.assert_close(outputs[0][token], base + 6 / 4 * up @ merged @ u)


@pytest.mark.parametrize("fields", [{"num_experts": 1, "top_k": 1}, {"num_experts": 5}, {"core_routing": False}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cores_that_are_the_identity_are_plain_lora(backbone, mix, ids, family: str, fields: dict[str, Any]) -> None:
    model = mix("comol", backbone(family, torch.float64), init_cores="identity", **fields)
    targets = model.peft_config["default"].target_modules
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    lora = get_peft_model(backbone(family, torch.float64), config).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "expert_A"):
                plain: Any = lora.get_submodule(name)
                plain.lora_A["default"].weight.copy_(own(module, "A"))
                plain.lora_B["default"].weight.copy_(own(module, "B"))
    torch.testing.assert_close(model(ids).logits, lora(ids).logits, rtol=0, atol=1e-12)


def test_equal_cores_are_one_core_whatever_the_routes(backbone, mix, ids) -> None:
    model = mix("comol", backbone(dtype=torch.float64))
    layers = [module for module in model.modules() if hasattr(module, "expert_core")]
    with torch.no_grad():
        for layer in layers:
            own(layer, "core")[:] = own(layer, "core")[:1].clone()
        expected = model(ids).logits
        for layer in layers:
            own(layer, "router").normal_(std=5)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-12)


def test_parameters_grow_by_a_core_and_a_router_row_an_expert(backbone, mix) -> None:
    tables = [mix("comol", backbone(), num_experts=n).base_model.accounting() for n in (4, 12)]
    small, large = ({part: entry["parameters"] for part, entry in table.items()} for table in tables)
    assert small["A"] + small["B"] == large["A"] + large["B"] == small["lora"]
    assert large["total"] - small["total"] == 8 * 20 * (4 * 4 + 4)  # 20 projections, r = 4
    wide = mix("comol", backbone(), num_experts=4, core_routing=False).base_model.accounting()
    assert wide["router"]["parameters"] == 4 * 20 * 32


def test_a_router_as_wide_as_the_rank_still_reads_what_it_was_told_to(plain_model, mix) -> None:
    x = torch.randn(5, 6)
    routes = []
    for core_routing in (True, False):
        options = {"target_modules": ["layers.0.up"], "r": 6, "core_routing": core_routing}
        model = mix("comol", plain_model(num_layers=1), **options)
        with model.base_model.record_routes() as record:
            model(x)
        routes.append(record[0]["default"][0])
    assert (routes[0] - routes[1]).abs().max() > 0.01


@pytest.mark.parametrize(("start", "scale"), [("identity", 1.0), ("noise", 0.1), ("orthogonal", 1.0)])
def test_cores_start_as_asked(plain_model, mix, start: str, scale: float) -> None:
    model = mix("comol", plain_model(), init_cores=start, init_cores_scale=scale)
    cores = model.get_base_model().layers[0].up.expert_core["default"]
    distance = matrix_norm(cores - torch.eye(4))
    if start == "identity":
        assert distance.max() == 0
    elif start == "noise":
        assert 0 < distance.max() < 0.1 * 4**0.5 * 2.5
    else:
        torch.testing.assert_close(cores @ cores.mT, torch.eye(4).expand(5, 4, 4), rtol=0, atol=1e-5)


def test_an_unknown_start_is_named_and_defaults_follow_the_paper() -> None:
    with pytest.raises(ValueError, match="^init_cores must be one of orthogonal, noise, identity, got 'eye'$"):
        CoMoLConfig(init_cores="eye")  # type: ignore[arg-type]
    config = CoMoLConfig()
    assert (config.num_experts, config.kept, config.core_routing, config.balance_weight) == (8, 8, True, 0.0)

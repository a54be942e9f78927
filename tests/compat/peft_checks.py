"""Checks of continual/compat/peft.py."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from behaviour import checks
from peft import AdaLoraConfig, LoraConfig, PeftType, get_peft_model
from torch import nn

import continual.adapters  # noqa: F401  adds our methods to PEFT's
from continual.compat import peft as compat


def lora(config: Any = None) -> Any:
    """Return a PEFT model of two linear layers, 3 to 4 to 5, both of them adapted with rank 2."""
    config = config or LoraConfig(r=2, target_modules=["0", "1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), config)  # type: ignore[arg-type]


def adalora(init_r: int = 4, target_r: int = 2) -> Any:
    config = AdaLoraConfig(init_r=init_r, target_r=target_r, tinit=1, tfinal=1, total_step=9, target_modules=["0", "1"])
    return lora(config).base_model


@checks(compat.extend_peft_types)
def methods_are_members() -> None:
    for name in ("QUERYABLE", "COMOL", "MOE_LORA", "FULL"):
        member = PeftType[name]
        assert PeftType(name) is member is getattr(PeftType, name)
        assert member in list(PeftType) and member.name == member.value == member == name
        assert f"{member}" == f"{PeftType.LORA}".replace("LORA", name)


@checks(compat.replace_module)
def a_layer_takes_a_modules_place() -> None:
    model = lora()
    parent, layer = model.base_model.model, model.base_model.model[0]
    plain = layer.base_layer
    parent[0] = plain
    compat.replace_module(model.base_model, parent, "0", layer, plain)
    assert parent[0] is layer and layer.base_layer is plain


@checks(compat.is_target)
def targets_are_told() -> None:
    tuner = lora().base_model
    config = LoraConfig(target_modules=["q_proj"], exclude_modules=["layers.1.q_proj"])
    places = ["layers.0.q_proj", "layers.1.q_proj", "layers.0.my_q_proj", "q_proj"]
    assert [compat.is_target(tuner, config, place) for place in places] == [True, False, False, True]


@checks(compat.set_active)
def active_adapters_are_named() -> None:
    layer = lora().base_model.model[0]
    compat.set_active(layer, ["one", "two"])
    assert layer.active_adapters == ["one", "two"]


@checks(compat.move_to_base_layer)
def tensors_take_the_base_layers_dtype() -> None:
    layer = lora().base_model.model[0]
    layer.base_layer.to(torch.float64)
    compat.move_to_base_layer(layer, "default")
    assert layer.lora_A["default"].weight.dtype == torch.float64


@checks(compat.cast_input)
def input_is_cast() -> None:
    layer, x = lora().base_model.model[0], torch.ones(1, dtype=torch.bfloat16)
    assert compat.cast_input(layer, x, torch.float32).dtype == torch.float32
    layer.cast_input_dtype_enabled = False
    assert compat.cast_input(layer, x, torch.float32) is x


@checks(compat.lora_pair, compat.has_lora_pair)
def pairs_are_found() -> None:
    layer = lora().base_model.model[0]
    A, B = compat.lora_pair(layer, "default")
    assert (A.weight.shape, B.weight.shape) == ((2, 3), (4, 2))
    assert compat.has_lora_pair(layer, "default") and not compat.has_lora_pair(layer, "other")
    nn.init.ones_(B.weight)
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + layer.scaling["default"] * B(A(x)))


@checks(compat.resize_lora)
def a_wider_pair_computes() -> None:
    layer = lora().base_model.model[0]
    before = layer.scaling["default"]
    compat.resize_lora(layer, "default", 6, 24)
    A, B = compat.lora_pair(layer, "default")
    assert (A.weight.shape, B.weight.shape) == ((6, 3), (4, 6))
    assert (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]) == (6, 24, before)
    assert A.bias is None and B.bias is None
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + before * B(A(x)))


@checks(compat.adalora_adapter, compat.has_ranks_to_drop)
def adalora_says_what_it_trains() -> None:
    assert compat.adalora_adapter(adalora()) == "default"
    assert compat.has_ranks_to_drop(adalora(4, 2)) and not compat.has_ranks_to_drop(adalora(2, 2))


@checks(compat.forget_importance)
def importance_is_forgotten() -> None:
    tuner = adalora()
    tuner.model(torch.randn(2, 3)).sum().backward()
    tuner.update_and_allocate(1)
    allocator = tuner.rankallocator
    assert allocator.ipt and allocator.exp_avg_ipt
    compat.forget_importance(tuner)
    assert not allocator.ipt and not allocator.exp_avg_ipt and not allocator.exp_avg_unc


@checks(compat.adalora_directions)
def directions_are_rows() -> None:
    shapes = sorted(tuple(weight.shape) for weight in compat.adalora_directions(adalora()))
    assert shapes == [(4, 3), (4, 4), (4, 4), (4, 5)]

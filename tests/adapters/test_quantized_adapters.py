"""Adapters over a backbone in 4 bits: the same forward pass and gradients as over the weights that it stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from continual.adapters import CoMoLConfig, MoeLoraConfig, QueryableLoraConfig
from continual.backbones import TinyCausalLM
from continual.training.module import ContinualModule

pytest.importorskip("bitsandbytes")

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj"]
MAKERS: dict[str, Callable[..., PeftConfig]] = {
    "queryable": lambda **more: QueryableLoraConfig(r=4, num_atoms=6, top_k=2, num_blocks=3, **more),
    "moe_lora": lambda **more: MoeLoraConfig(r=4, num_experts=4, top_k=2, **more),
    "comol": lambda **more: CoMoLConfig(r=4, num_experts=4, **more),
    "lora": lambda **more: LoraConfig(r=4, **more),
}


def nf4_backbone(compute: str = "float32") -> TinyCausalLM:
    """Return a backbone of four layers in double-quantised NF4."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    dtype: Any = compute
    return TinyCausalLM(hidden_size=64, dtype=dtype, quantization=quantization)


def adapted(model: nn.Module, kind: str, spread: float = 0.1) -> PeftModel:
    """Put an adapter in, moved away from its start by ``spread``."""
    torch.manual_seed(1)
    config = MAKERS[kind](target_modules=list(TARGETS), task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return wrapped.train()


def restored() -> nn.Module:
    """Return the plain backbone with the weights that the packed ones stand for."""
    plain: Any = TinyCausalLM(hidden_size=64).build()
    for name, layer in nf4_backbone().build().named_modules():
        if type(layer).__name__ == "Linear4bit":
            plain.get_submodule(name).weight = nn.Parameter(dequantize_bnb_weight(layer.weight))  # type: ignore[arg-type]
    return plain


def gradients(model: PeftModel, ids: Tensor) -> dict[str, Tensor]:
    """Return the logits and the gradient of everything that trains."""
    model.zero_grad()
    keywords = {"instruction_ids": ids[:, :3]} if isinstance(model.active_peft_config, QueryableLoraConfig) else {}
    logits = model(ids, use_cache=False, **keywords).logits
    logits.float().pow(2).mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": logits.detach()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_are_those_over_the_restored_weights(kind: str, ids: Tensor) -> None:
    expected = gradients(adapted(restored(), kind), ids)
    model = adapted(nf4_backbone().build(), kind)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found = gradients(model, ids)
    assert_near(found, expected)
    assert [name for name, value in found.items() if value.abs().max() == 0] == []
    with torch.inference_mode():  # as between two stages
        model.eval()(ids)
    assert_near(gradients(model.train(), ids), expected)
    assert_near(gradients(copy.deepcopy(model), ids), expected)
    checkpointed: Any = model
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed.enable_input_require_grads()
    assert_near(gradients(model, ids), expected)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_loss_falls_in_bfloat16(kind: str, ids: Tensor) -> None:
    model = adapted(nf4_backbone("bfloat16").build(), kind, spread=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", MAKERS)
def test_accounting_and_saving_are_those_of_plain_weights(kind: str, ids: Tensor, tmp_path: Path) -> None:
    config = MAKERS[kind](target_modules=list(TARGETS))
    module, plain = ContinualModule(nf4_backbone(), config), ContinualModule(TinyCausalLM(hidden_size=64), config)
    for built in (module, plain):
        built.configure_model()
    assert module.model is not None and plain.model is not None
    assert module.parameter_counts() == plain.parameter_counts()
    assert module.parameter_counts()["total_parameters"] == plain.model.get_nb_trainable_parameters()[1]
    if module.tuner is not None and plain.tuner is not None:
        tuners: list[Any] = [module.tuner, plain.tuner]
        assert tuners[0].accounting() == tuners[1].accounting()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    module.save_adapter(tmp_path / "adapter")
    again = ContinualModule(nf4_backbone(), config, start_from=str(tmp_path / "adapter"))
    again.configure_model()
    assert again.model is not None
    with torch.inference_mode():
        assert torch.equal(again.model.eval()(ids).logits, module.model.eval()(ids).logits)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert not any(".base_layer." in name or "norm" in name for name in checkpoint["state_dict"])
    assert checkpoint["state_dict"]

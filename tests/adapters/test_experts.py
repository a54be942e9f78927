"""What must hold for both mixtures of experts: start, routing for each token, PEFT's life cycle, routes, balance."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from continual.adapters import CoMoLConfig, MoeLoraConfig
from continual.adapters.experts.experts import balance_loss

KINDS = ["moe_lora", "comol"]
CONFIGS: dict[str, Any] = {"moe_lora": MoeLoraConfig, "comol": CoMoLConfig}
TENSORS = {
    "moe_lora": {"expert_A", "expert_B", "expert_router"},
    "comol": {"expert_A", "expert_B", "expert_router", "expert_core"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def trained_of(model: PeftModel) -> set[str]:
    """Return the names of the adapters that train; each trains whole or not at all, and nothing else does."""
    flags: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        if "expert_" in name:
            flags.setdefault(name.rpartition(".")[2], set()).add(parameter.requires_grad)
        else:
            assert not parameter.requires_grad, name
    assert all(len(values) == 1 for values in flags.values()), flags
    return {name for name, values in flags.items() if True in values}


# -- what is computed -------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_backbone_to_the_bit(backbone, mix, ids, kind: str, family: str, dtype: torch.dtype) -> None:
    model = mix(kind, backbone(family, dtype), spread=0)
    assert torch.equal(model(ids).logits, backbone(family, dtype)(ids).logits)
    changed = mix(kind, backbone(family, dtype))
    assert not torch.equal(changed(ids).logits, backbone(family, dtype)(ids).logits)
    with changed.disable_adapter():
        assert torch.equal(changed(ids).logits, backbone(family, dtype)(ids).logits)


@each_kind
def test_exactly_its_own_tensors_train(backbone, mix, kind: str) -> None:
    model = mix(kind, backbone())
    projections = [f"layers.{i}.{m}" for i in range(4) for m in ("self_attn.q_proj", "mlp.up_proj")]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained} == TENSORS[kind]
    assert len(trained) == 4 * 5 * len(TENSORS[kind])
    prefix = "base_model.model.model."
    assert {f"{prefix}{p}.{t}.default" for p in projections for t in TENSORS[kind]} < trained
    assert trained_of(model) == {"default"}


@each_kind
def test_every_tensor_gets_a_gradient(backbone, mix, ids, kind: str) -> None:
    model = mix(kind, backbone())
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@each_kind
def test_a_row_is_the_same_alone_and_in_any_batch(backbone, mix, ids, kind: str) -> None:
    model = mix(kind, backbone(dtype=torch.float64))
    together = model(ids).logits
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1]).logits[0], together[row], rtol=0, atol=1e-11)
    order = [2, 0, 1]
    torch.testing.assert_close(model(ids[order]).logits, together[order], rtol=0, atol=1e-11)


@each_kind
def test_a_token_changes_nothing_before_it(backbone, mix, ids, kind: str) -> None:
    model = mix(kind, backbone(dtype=torch.float64))
    changed = ids.clone()
    changed[:, 7] = 50
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-12)
    assert ((after - before)[:, 7:].abs().amax(dim=-1) > 1e-6).all()


@each_kind
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(backbone, mix, ids, kind: str, family: str, side: str) -> None:
    model = mix(kind, backbone(family, torch.float64))
    pad, ones = torch.zeros(3, 4, dtype=torch.long), torch.ones_like(ids)
    left = side == "left"
    padded = torch.cat([pad, ids] if left else [ids, pad], dim=1)
    mask = torch.cat([pad, ones] if left else [ones, pad], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    out = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(out[:, 4:] if left else out[:, :11], model(ids).logits, rtol=0, atol=1e-10)


@each_kind
@pytest.mark.parametrize("num_beams", [1, 2])
def test_cached_generation_equals_uncached_and_padded(backbone, mix, ids, kind: str, num_beams: int) -> None:
    model = mix(kind, backbone(dtype=torch.float64))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    cached = model.generate(input_ids=ids, use_cache=True, **options)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), cached)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :4], mask[1, :4] = 0, 0
    together = model.generate(input_ids=padded, attention_mask=mask, **options)
    alone = model.generate(input_ids=ids[1:2, 4:], **options)
    assert torch.equal(together[1, 11:], alone[0, 7:])


@each_kind
@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_under_activation_checkpointing(backbone, mix, ids, kind: str, accumulated: int) -> None:
    found = []
    for checkpointed in (False, True):
        model = mix(kind, backbone(dtype=torch.float64), balance_weight=0.5).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        total = torch.zeros((), dtype=torch.float64)
        for part in range(accumulated):  # two passes before one backward pass
            rows = ids.roll(part, dims=1)
            total = total + model(rows, labels=rows, use_cache=False).loss
            extra = model.base_model.auxiliary_loss()
            assert extra is not None
            total = total + extra
        total.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_balance_loss_refuses_reentrant_checkpointing(backbone, mix, ids) -> None:
    model = mix("moe_lora", backbone()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model(ids, use_cache=False)
    with pytest.raises(ValueError, match="balance_weight needs non-reentrant activation checkpointing"):
        model.base_model.auxiliary_loss()


@each_kind
def test_under_bfloat16_autocast(backbone, mix, ids, kind: str) -> None:
    model = mix(kind, backbone(), balance_weight=0.1).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss + model.base_model.auxiliary_loss()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_compiles_without_a_graph_break_and_keeps_the_balance_loss(backbone, mix, ids) -> None:
    torch._dynamo.reset()
    model = mix("moe_lora", backbone(num_hidden_layers=1), balance_weight=0.1).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    out, expected = (network(input_ids=ids, use_cache=False).logits for network in (compiled, model))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    losses = [network.base_model.auxiliary_loss() for network in (compiled, model)]
    torch.testing.assert_close(*losses)
    for loss, network in zip(losses, (compiled, model), strict=True):
        loss.backward()
        assert all(p.grad is not None for n, p in network.named_parameters() if "expert_router" in n)


# -- routes -----------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_recorded_routes_are_convex_weights_of_every_projection(backbone, mix, ids, kind: str, top_k: int) -> None:
    model = mix(kind, backbone(), top_k=top_k, balance_weight=0)
    with model.base_model.record_routes() as record:
        model(ids)
        model(ids[:, :3])
    model(ids)
    assert [len(entry["default"]) for entry in record] == [20, 20]
    for entry, width in zip(record, (11, 3), strict=True):
        for route in entry["default"]:
            assert route.shape == (3, width, 5)
            torch.testing.assert_close(route.sum(dim=-1), torch.ones(3, width))
            assert ((route > 0).sum(dim=-1) == top_k).all()
    assert (record[0]["default"][0] - record[0]["default"][0][:1, :1]).abs().max() > 0.01  # tokens differ


@each_kind
def test_two_active_adapters_add_up(plain_model, mix, kind: str) -> None:
    model = mix(kind, plain_model(torch.float64, num_layers=2), target_modules=["layers.0.up", "layers.1.up"])
    second = CONFIGS[kind](r=2, num_experts=3, target_modules=["layers.0.up"], top_k=1)
    model.add_adapter("second", second)
    for name, parameter in model.named_parameters():
        if name.endswith("expert_B.second"):
            torch.nn.init.normal_(parameter)
    x, outputs = torch.randn(4, 6).double(), []
    model.get_base_model().layers[0].up.register_forward_hook(lambda m, a, output: outputs.append(output.detach()))
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        model(x)
        assert trained_of(model) == set([active] if isinstance(active, str) else active)
    with model.base_model.record_routes() as record:
        model(x)
    assert {name: len(routes) for name, routes in record[0].items()} == {"default": 2, "second": 1}
    with model.disable_adapter():
        model(x)
    default, both, base = outputs[0], outputs[2], outputs[4]
    torch.testing.assert_close(both - base, (default - base) + (outputs[1] - base))


# -- in PEFT's hands --------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loads_under_another_name_with_every_tensor(
    backbone, mix, ids, tmp_path, kind: str, family: str, low_cpu_mem_usage: bool
) -> None:
    model = mix(kind, backbone(family))
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(99)  # another start: a tensor that was not loaded would differ
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        loaded = PeftModel.from_pretrained(
            backbone(family), str(tmp_path), adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
        )
    saved = {n.replace(".default", ".other"): t for n, t in model.state_dict().items()}
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(t, saved[n]) for n, t in loaded.state_dict().items())
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert trained_of(loaded) == set()
    assert not [n for n in load_file(tmp_path / "adapter_model.safetensors") if "base_layer" in n]


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_set_delete_and_unload(backbone, mix, ids, kind: str, dtype: torch.dtype) -> None:
    model = mix(kind, backbone(dtype=dtype))
    before = model(ids).logits
    model.add_adapter("second", CONFIGS[kind](task_type="CAUSAL_LM", r=2, num_experts=3, target_modules=["q_proj"]))
    assert trained_of(model) == {"default"}
    assert torch.equal(model(ids).logits, before)
    model.set_adapter("second")
    assert trained_of(model) == {"second"}
    assert torch.equal(model(ids).logits, backbone(dtype=dtype)(ids).logits)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert not [n for n in model.state_dict() if "second" in n]
    assert torch.equal(model(ids).logits, before)
    restored = model.unload()
    assert torch.equal(restored(ids).logits, backbone(dtype=dtype)(ids).logits)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in restored.modules())


@each_kind
@pytest.mark.parametrize("name", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_in_one_line(backbone, mix, ids, kind: str, name: str) -> None:
    model = mix(kind, backbone())
    before = model(ids).logits
    with pytest.raises(ValueError, match="cannot be merged into the backbone") as error:
        getattr(model, name)()
    assert "\n" not in str(error.value)
    assert torch.equal(model(ids).logits, before)


@each_kind
def test_a_target_that_matches_nothing_raises_and_leaves_nothing(backbone, mix, ids, kind: str) -> None:
    make = CONFIGS[kind]
    with pytest.raises(ValueError, match="target module 'no_proj' matches nothing"):
        get_peft_model(backbone(), make(task_type="CAUSAL_LM", target_modules=["q_proj", "no_proj"]))
    model = mix(kind, backbone())
    before, names = model(ids).logits, set(model.state_dict())
    with pytest.raises(ValueError, match="target modules must be linear layers, got Embedding"):
        model.add_adapter("second", make(task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"]))
    assert set(model.state_dict()) == names
    assert torch.equal(model(ids).logits, before)


@each_kind
def test_a_copy_in_the_middle_of_training_computes_the_same(backbone, mix, ids, kind: str) -> None:
    model = mix(kind, backbone(), balance_weight=0.1).train()
    expected = model(ids).logits  # its routes wait for auxiliary_loss
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, expected)
    assert twin.base_model.auxiliary_loss().item() == model.base_model.auxiliary_loss().item()


@each_kind
def test_the_method_is_a_member_of_pefts_enum_and_its_file_round_trips(tmp_path, kind: str) -> None:
    targets: Any = {"v_proj", "q_proj"}
    config = CONFIGS[kind](r=3, num_experts=5, top_k=2, target_modules=targets)
    assert config.peft_type is PeftType(kind.upper()) is getattr(PeftType, kind.upper())
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is type(config)
    unlike = {"inference_mode", "peft_version"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in unlike} == {
        k: v for k, v in config.to_dict().items() if k not in unlike
    }


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
import continual.adapters
for kind in ("moe_lora", "comol"):
    backbone = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/backbone")
    model = PeftModel.from_pretrained(backbone, f"{sys.argv[1]}/{kind}").eval()
    torch.save(model(torch.arange(3, 12)[None]).logits, f"{sys.argv[1]}/{kind}.pt")
"""


def test_a_fresh_process_loads_both_by_transformers_and_peft(backbone, mix, tmp_path) -> None:
    backbone().save_pretrained(tmp_path / "backbone")
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    models = {kind: mix(kind, backbone()) for kind in KINDS}
    for kind, model in models.items():
        model.save_pretrained(str(tmp_path / kind))
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path)], env=environment, check=True)
    for kind, model in models.items():
        expected = model(torch.arange(3, 12)[None]).logits
        torch.testing.assert_close(torch.load(tmp_path / f"{kind}.pt"), expected)


# -- configuration and cost -------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r must be at least 1, got 0"),
    ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
    ({"top_k": 0}, "top_k must lie in 1 to num_experts (8), got 0"),
    ({"top_k": 9}, "top_k must lie in 1 to num_experts (8), got 9"),
    ({"lora_dropout": 1.0}, "lora_dropout must lie in [0, 1), got 1.0"),
    ({"balance_weight": -1.0}, "balance_weight must not be negative, got -1.0"),
    ({"top_k": 8, "balance_weight": 0.1}, "balance_weight has no effect where every token uses all experts"),
    ({"layers_pattern": "h"}, "layers_pattern says nothing without layers_to_transform"),
]


@each_kind
@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_fields_are_named_in_one_line(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        CONFIGS[kind](**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("moe_lora", {}),
        ("moe_lora", {"shared_A": True}),
        ("comol", {}),
        ("comol", {"core_routing": False, "top_k": None}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_accounting_is_what_trains_and_what_pytorch_counts(
    backbone, mix, ids, kind: str, family: str, fields: dict[str, Any]
) -> None:
    model = mix(kind, backbone(family), **fields)
    table = model.base_model.accounting()
    assert list(table) == [
        *sorted(n.removeprefix("expert_") for n in TENSORS[kind] - {"expert_core"}),
        *(["core"] if kind == "comol" else []),
        "total",
        "lora",
    ]
    assert table["total"]["parameters"] == model.get_nb_trainable_parameters()[0]
    counted = []
    with torch.no_grad():
        for network in (backbone(family), model):
            with FlopCounterMode(display=False) as counter:
                network(ids)
            counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == table["total"]["flops_per_token"] * ids.numel()
    layers = list(model.base_model._layers("default"))
    assert table["lora"]["parameters"] == sum(4 * (layer.in_features + layer.out_features) for layer in layers)


# -- the balance loss -------------------------------------------------------------------------------------------------


def one_hot_logits(choices: Tensor, num_experts: int) -> Tensor:
    """Return logits that send every token to its choice, as good as surely."""
    return 60.0 * torch.nn.functional.one_hot(choices, num_experts).double()


@settings(max_examples=50, deadline=None)
@given(num_experts=st.integers(2, 6), data=st.data())
def test_balance_loss_is_least_where_experts_are_used_alike(num_experts: int, data: st.DataObject) -> None:
    choices = torch.tensor(data.draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=30)))
    logits = one_hot_logits(choices, num_experts)
    usage = torch.bincount(choices, minlength=num_experts).double() / len(choices)
    loss = balance_loss(logits, logits.softmax(dim=-1).gt(0.5).double())
    torch.testing.assert_close(loss.double(), num_experts * usage.square().sum(), rtol=1e-5, atol=1e-6)
    assert loss >= 1 - 1e-5
    uniform = one_hot_logits(torch.arange(num_experts).repeat(3), num_experts)
    torch.testing.assert_close(balance_loss(uniform, (uniform > 0).double()).item(), 1.0)
    collapsed = one_hot_logits(torch.zeros(7, dtype=torch.long), num_experts)
    assert balance_loss(collapsed, (collapsed > 0).double()).item() == pytest.approx(num_experts)


def test_balance_loss_leaves_padding_out_and_knows_other_masks() -> None:
    logits = torch.randn(2, 5, 4)
    routes = (logits >= logits.topk(2, dim=-1).values[..., -1:]).float()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    kept = mask.bool()
    torch.testing.assert_close(balance_loss(logits, routes, mask), balance_loss(logits[kept], routes[kept]))
    assert balance_loss(logits, routes, mask) != balance_loss(logits, routes)
    assert balance_loss(logits, routes, mask[:, :2]) == balance_loss(logits, routes)


@each_kind
def test_the_balance_loss_alone_spreads_a_collapsed_router(plain_model, mix, kind: str) -> None:
    model = mix(kind, plain_model(num_layers=1), target_modules=["layers.0.up"], top_k=1, balance_weight=1.0).train()
    layer = model.get_base_model().layers[0].up
    with torch.no_grad():  # every token prefers expert 0, some more than others
        layer.expert_router["default"].zero_()[0] = 0.3
        layer.expert_A["default"].abs_()
    x = torch.rand(64, 6)
    router, losses = layer.expert_router["default"], []
    for _ in range(20):
        with model.base_model.record_routes() as record:
            model(x)
        loss = model.base_model.auxiliary_loss()
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, router)
        with torch.no_grad():
            router.sub_(0.02 * gradient)
        if len(losses) == 1:
            assert (record[0]["default"][0][:, 0] == 1).all()
    assert losses[0] > 1.2
    assert all(after < before for before, after in zip(losses, losses[1:], strict=False))


@each_kind
def test_auxiliary_loss_only_after_a_pass_in_training_and_once(backbone, mix, ids, kind: str) -> None:
    tuner = (model := mix(kind, backbone(), balance_weight=0.25)).base_model
    model(ids)
    assert tuner.auxiliary_loss() is None  # evaluating
    model.train()
    with torch.no_grad():
        model(ids)
    assert tuner.auxiliary_loss() is None
    with tuner.record_routes() as record:
        model(ids)
    first = tuner.auxiliary_loss()
    assert first is not None and tuner.auxiliary_loss() is None
    assert len(record[0]["default"]) == 20
    model(ids)
    model.eval()(ids)
    assert tuner.auxiliary_loss() is None  # a later pass has taken its place
    off = mix(kind, backbone(), balance_weight=0.0).train()
    off(ids)
    assert off.base_model.auxiliary_loss() is None

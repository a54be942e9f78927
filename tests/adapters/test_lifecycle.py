"""The adapter in PEFT's hands: save, load, add, set, disable, delete, unload, and which tensors train meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from continual.adapters import QueryableLoraConfig


def trained_of(model: PeftModel) -> set[str]:
    """Return the names of the adapters that have a trainable tensor; each is trainable whole or not at all."""
    groups: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        if "queryable_" in name:
            parts = name.split(".")
            adapter = parts[parts.index("queryable_bank") + 1] if "queryable_bank" in parts else parts[-1]
            groups.setdefault(adapter, set()).add(parameter.requires_grad)
        else:
            assert not parameter.requires_grad, name
    assert all(len(flags) == 1 for flags in groups.values()), groups
    return {name for name, flags in groups.items() if True in flags}


def second_config(**fields: Any) -> QueryableLoraConfig:
    """Return the configuration of a second adapter, unlike the first in everything."""
    defaults: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "num_atoms": 3, "top_k": 1, "num_blocks": 4}
    defaults["target_modules"] = ["q_proj"]
    return QueryableLoraConfig(**(defaults | fields))


def randomise(model: PeftModel, adapter_name: str) -> None:
    """Give an adapter weights that change the outputs."""
    for name, parameter in model.named_parameters():
        if name.endswith(f"queryable_B.{adapter_name}"):
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("source", ["state", "frozen_random"])
def test_loads_under_another_name_with_every_tensor(
    backbone, adapt, ids, instructions, tmp_path, kind: str, low_cpu_mem_usage: bool, source: str
) -> None:
    model = adapt(backbone(kind), query_source=source)
    model.base_model.set_instruction_reference(torch.randn(4, 32))
    expected = model(ids, instruction_ids=instructions).logits
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(99)  # another start: a tensor that was not loaded would differ
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        loaded = PeftModel.from_pretrained(
            backbone(kind), str(tmp_path), adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
        )
    saved = {n.replace(".default", ".other"): t for n, t in model.state_dict().items()}
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(t, saved[n]) for n, t in loaded.state_dict().items())
    assert torch.equal(loaded(ids, instruction_ids=instructions).logits, expected)
    assert trained_of(loaded) == set()
    assert {n for n in load_file(tmp_path / "adapter_model.safetensors") if "base_layer" in n} == set()


def test_load_adapter_reports_no_missing_keys(backbone, adapt, ids, tmp_path) -> None:
    model = adapt(backbone())
    model.save_pretrained(str(tmp_path))
    other = adapt(backbone(), spread=0)
    result = other.load_adapter(str(tmp_path), "again")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert trained_of(other) == {"default"}
    other.base_model.set_adapter("again")
    assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_trainable", [True, False])
def test_is_trainable_decides_what_trains_after_loading(
    backbone, adapt, tmp_path, dtype: torch.dtype, is_trainable: bool
) -> None:
    adapt(backbone(dtype=dtype)).save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(backbone(dtype=dtype), str(tmp_path), is_trainable=is_trainable)
    assert trained_of(loaded) == ({"default"} if is_trainable else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_added_adapter_stays_frozen_until_set(backbone, adapt, ids, dtype: torch.dtype) -> None:
    model = adapt(backbone(dtype=dtype))
    before = model(ids).logits
    model.add_adapter("second", second_config())
    assert trained_of(model) == {"default"}
    assert torch.equal(model(ids).logits, before)
    model.set_adapter("second")
    assert trained_of(model) == {"second"}
    assert torch.equal(model(ids).logits, backbone(dtype=dtype)(ids).logits)  # its own B is still 0
    model.set_adapter("second", inference_mode=True)
    assert trained_of(model) == set()
    model.set_adapter("default")
    assert trained_of(model) == {"default"}
    assert torch.equal(model(ids).logits, before)
    model.set_requires_grad("second", True)
    assert trained_of(model) == {"default", "second"}
    model.set_requires_grad(["default", "second"], False)
    assert trained_of(model) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_an_adapter_leaves_the_flags_of_the_others(backbone, adapt, tmp_path, dtype: torch.dtype) -> None:
    trainable = adapt(backbone(dtype=dtype))
    trainable.add_adapter("second", second_config(inference_mode=True))
    assert trained_of(trainable) == {"default"}
    trainable.save_pretrained(str(tmp_path))
    frozen = PeftModel.from_pretrained(backbone(dtype=dtype), str(tmp_path))
    frozen.add_adapter("second", second_config())
    assert trained_of(frozen) == set()
    frozen.set_adapter("second")
    assert trained_of(frozen) == {"second"}


def test_two_active_adapters_add_up(backbone, adapt, plain_model) -> None:
    model = adapt(plain_model(torch.float64, num_layers=2), target_modules=["layers.0.up", "layers.1.up"])
    model.add_adapter(
        "second", second_config(task_type=None, target_modules=["layers.0.up"], num_blocks=1, instruction_dim=5)
    )
    randomise(model, "second")
    x, encodings = torch.randn(4, 6).double(), torch.randn(4, 5)
    layer = model.get_base_model().layers[0].up
    outputs: list[torch.Tensor] = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        model(x, instruction_encoding=encodings)
        assert trained_of(model) == set([active] if isinstance(active, str) else active)
    with model.disable_adapter():
        model(x)
    default, second, both, base = outputs
    torch.testing.assert_close(both - base, (default - base) + (second - base))
    with model.base_model.record_routes() as record:
        model.base_model.set_adapter(["default", "second"])
        model(x)
    assert {name: len(routes) for name, routes in record[0].items()} == {"default": 2, "second": 1}


def test_disable_adapter_is_the_backbone_and_restores(backbone, adapt, ids, instructions) -> None:
    model = adapt(backbone())
    before = model(ids, instruction_ids=instructions).logits
    with model.disable_adapter():
        assert torch.equal(model(ids, instruction_ids=instructions).logits, backbone()(ids).logits)
        assert trained_of(model) == set()
    assert trained_of(model) == {"default"}
    assert torch.equal(model(ids, instruction_ids=instructions).logits, before)


def test_deleting_adapters(backbone, adapt, ids, tmp_path) -> None:
    model = adapt(backbone())
    before = model(ids).logits
    model.add_adapter("second", second_config(num_blocks=2, target_modules=["q_proj", "v_proj"]))
    model.delete_adapter("second")
    assert not [n for n in model.state_dict() if "second" in n]
    assert trained_of(model) == {"default"}
    model.add_adapter("second", second_config())
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("second")
    assert model.active_adapter == "default" or model.active_adapters == ["default"]
    assert trained_of(model) == {"default"}
    assert torch.equal(model(ids).logits, before)


def test_a_failed_add_leaves_nothing_behind(backbone, adapt, ids) -> None:
    model = adapt(backbone())
    before, names = model(ids).logits, set(model.state_dict())
    for fields, message in (
        ({"num_blocks": 5}, r"num_blocks \(5\) is larger than the number of adapted layers \(4\)"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target modules must be linear layers, got Embedding"),
        ({"target_modules": ["q_proj", "qq_proj"]}, "target module 'qq_proj' matches nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_adapter("second", second_config(**fields))
        assert set(model.state_dict()) == names
        assert trained_of(model) == {"default"}
        assert torch.equal(model(ids).logits, before)


def test_unload_gives_the_backbone_back(backbone, adapt, ids) -> None:
    plain = backbone()
    restored = adapt(backbone()).unload()
    assert type(restored) is type(plain)
    assert torch.equal(restored(ids).logits, plain(ids).logits)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in restored.modules())
    assert "prepare_inputs_for_generation" not in vars(restored)
    # The backbone can be adapted anew.
    again = adapt(restored)
    assert trained_of(again) == {"default"}
    again(ids)


@pytest.mark.parametrize("name", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_in_one_line(backbone, adapt, ids, name: str) -> None:
    model = adapt(backbone())
    before = model(ids).logits
    with pytest.raises(ValueError, match="cannot be merged into the backbone") as error:
        getattr(model, name)()
    assert "\n" not in str(error.value)
    assert torch.equal(model(ids).logits, before)


# -- which modules are adapted ----------------------------------------------------------------------------------------


def adapted_in(model: PeftModel) -> set[str]:
    """Return the names of the adapted projections."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix).partition(".queryable_A")[0] for n in model.state_dict() if "queryable_A" in n}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "no_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "layers.0.self_attn.v_proj"], "layers_to_transform": [1]},
    ],
)
def test_a_target_that_matches_nothing_raises_even_if_others_match(backbone, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"target module '{fields['target_modules'][-1]}' matches nothing"):
        get_peft_model(backbone(), second_config(**fields))


def test_an_expression_that_matches_nothing_raises(backbone) -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(backbone(), second_config(target_modules=r".*\.no_proj"))


def test_expressions_all_linear_and_layer_indices(backbone, adapt, ids) -> None:
    name = "model.layers.{}.self_attn.{}_proj"
    by_expression = adapt(backbone(), target_modules=r".*\.[02]\..*\.(q|v)_proj")
    assert adapted_in(by_expression) == {name.format(i, x) for i in (0, 2) for x in "qv"}
    by_index = adapt(backbone(), target_modules=["q_proj"], layers_to_transform=[1, 3])
    assert adapted_in(by_index) == {name.format(i, "q") for i in (1, 3)}
    everything = adapt(backbone(), target_modules="all-linear")
    assert len(adapted_in(everything)) == 4 * 7
    assert "lm_head" not in adapted_in(everything)
    for model in (by_expression, by_index, everything):
        assert model(ids).logits.isfinite().all()


def test_default_targets_and_saved_order(backbone, adapt, tmp_path) -> None:
    for index, targets in enumerate((None, "all-linear", {"v_proj", "q_proj", "o_proj", "k_proj"})):
        model = adapt(backbone(), target_modules=targets)
        model.save_pretrained(str(tmp_path / str(index)))
        saved = json.loads((tmp_path / str(index) / "adapter_config.json").read_text())["target_modules"]
        assert saved == sorted(saved)
        assert len(saved) >= 4


SAVE = """
import sys
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from continual.adapters import QueryableLoraConfig
sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
for i, targets in enumerate((None, "all-linear", {"q_proj", "v_proj", "up_proj", "down_proj"})):
    config = QueryableLoraConfig(task_type="CAUSAL_LM", num_blocks=3, target_modules=targets,
                                 exclude_modules={"layers.0.self_attn.k_proj", "layers.1.self_attn.o_proj"},
                                 modules_to_save={"lm_head", "embed_tokens"})
    get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config).save_pretrained(f"{sys.argv[1]}/{i}")
"""


def test_saved_configuration_does_not_follow_the_hash_seed(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    seed = "2" if environment.get("PYTHONHASHSEED") == "1" else "1"  # other than here
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAVE, str(tmp_path / "there")],
        env=environment | {"PYTHONHASHSEED": seed},
        check=True,
    )
    exec(SAVE.replace("sys.argv[1]", repr(str(tmp_path / "here"))), {})
    here, there = (
        [(tmp_path / place / str(index) / "adapter_config.json").read_text() for index in range(3)]
        for place in ("here", "there")
    )
    assert here == there


def test_modules_to_save_are_trained_and_saved(backbone, adapt, ids, tmp_path) -> None:
    model = adapt(backbone(), modules_to_save=["lm_head"])
    head = [p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n]
    assert all(p.requires_grad for p in head)
    with torch.no_grad():
        head[0].add_(0.5)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(backbone(), str(tmp_path), adapter_name="other")
    assert torch.equal(loaded(ids).logits, model(ids).logits)

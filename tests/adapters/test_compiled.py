"""Compiled decoder layers: what the plain ones compute, from few graphs, whatever the batch, length or slice."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
import torch.fx.experimental._config as shapes
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, DynamicCache

from continual.adapters import QueryableLoraConfig
from continual.backbones import MLPRegressor, TinyCausalLM
from continual.compat.transformers import CACHE
from continual.errors import ConfigError
from continual.training import compiled
from continual.training.module import ContinualModule

# All shapes differ, and none of them is 1: what is compiled for it is another graph.
SHAPES = [(3, 11), (2, 8), (4, 5), (3, 9)]


@contextmanager
def whole_graphs() -> Iterator[None]:
    """Compile without a code generator, and raise where one graph is not enough for a layer."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled._compiled.cache_clear()
    plain = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **chosen: plain(function, **chosen, **OPTIONS))
        yield
    compiled._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def compiling() -> Iterator[None]:
    with whole_graphs():
        yield


OPTIONS: dict[str, Any] = {"backend": "aot_eager", "fullgraph": True}


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def lora(model: nn.Module) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


def gradients(model: PeftModel, shape: tuple[int, int]) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(shape[1]))
    keywords = {"instruction_ids": ids[:, :3]} if is_ours(model) else {}
    model.train().zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False, **keywords).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed_gradients(model: PeftModel, lengths: list[int]) -> dict[str, Tensor]:
    """Return the gradients of rows that are packed into one."""
    ids = torch.randint(3, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    keywords = {"instruction_ids": ids[0, : 2 * len(lengths)].view(-1, 2), "row_of_token": rows}
    keywords["position_ids"] = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    model.train().zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False, **keywords).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def joint_gradients(model: PeftModel) -> tuple[dict[str, Tensor], int]:
    """Return the gradients of one backward pass through two passes of equal shape, and the bytes kept for it."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    ids = torch.randint(3, 97, (2, *SHAPES[0]), generator=torch.Generator().manual_seed(5))
    model.train().zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = [model(input_ids=part, labels=part, use_cache=False).loss for part in ids]
        num_bytes = sum(kept)
        (losses[0] + 2 * losses[1]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, num_bytes


def assert_equal(found: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def quantized() -> nn.Module:
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return TinyCausalLM(hidden_size=64, num_layers=2, quantization=nf4).build()


def is_ours(model: PeftModel) -> bool:
    return isinstance(model.peft_config["default"], QueryableLoraConfig)


@pytest.mark.parametrize(("kind", "most"), [("lora", 2), ("one block", 2)])
def test_gradients_are_the_plain_ones_from_few_graphs(
    backbone: Callable[..., Any], adapt: Callable[..., PeftModel], kind: str, most: int
) -> None:
    model = backbone(num_hidden_layers=8)
    model = lora(model) if kind == "lora" else adapt(model, num_blocks=1)
    expected = [gradients(model, shape) for shape in SHAPES]
    compiled.compile_layers(model)
    for shape, plain in zip(SHAPES, expected, strict=True):
        assert_equal(gradients(model, shape), plain)
    assert 0 < num_graphs() <= most


@dataclass(frozen=True)
class Blocks:
    """What a model of ours of four blocks gave, compiled once.

    Attributes:
        plain: Gradients for each of ``SHAPES``, not compiled.
        found: The same of the compiled layers.
        num_graphs: Graphs that these took.
        copied: Gradients for the first shape of a deep copy, when the original's weights were zero.
        slices: Then, for the first shape, gradients of the copy's further adapters, by name.
        more_graphs: Graphs that the further adapters took.
    """

    plain: list[dict[str, Tensor]]
    found: list[dict[str, Tensor]]
    num_graphs: int
    copied: dict[str, Tensor]
    slices: dict[str, dict[str, Tensor]]
    more_graphs: int


@pytest.fixture(scope="module")
def blocks(backbone: Callable[..., Any], adapt: Callable[..., PeftModel]) -> Blocks:
    """Compiles a model of four blocks, copies it, and has the copy grow."""
    model = adapt(backbone(num_hidden_layers=8), num_blocks=4)
    plain = [gradients(model, shape) for shape in SHAPES]
    with whole_graphs():
        compiled.compile_layers(model)
        found = [gradients(model, shape) for shape in SHAPES]
        few, clone = num_graphs(), copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        copied, before = gradients(clone, SHAPES[0]), num_graphs()
        slices = {}
        for name in ("stage02", "stage03"):
            clone.add_adapter(name, copy.deepcopy(clone.peft_config["default"]))
            clone.set_adapter(name)
            slices[name] = gradients(clone, SHAPES[0])
        return Blocks(plain, found, few, copied, slices, num_graphs() - before)


def test_gradients_of_blocks_are_the_plain_ones_from_few_graphs(blocks: Blocks) -> None:
    for found, plain in zip(blocks.found, blocks.plain, strict=True):
        assert_equal(found, plain)
    assert 0 < blocks.num_graphs <= 4


def test_another_slice_compiles_nothing_anew(blocks: Blocks) -> None:
    assert list(blocks.slices) == ["stage02", "stage03"]
    for name, found in blocks.slices.items():
        assert found and all(f".{name}" in key for key in found)
    assert blocks.more_graphs == 0 < blocks.num_graphs


def test_a_copy_has_layers_of_its_own(blocks: Blocks) -> None:
    assert all(torch.equal(blocks.copied[name], value) for name, value in blocks.found[0].items())


def test_a_layer_that_is_not_compiled_goes_by_the_routes_of_one_that_is(
    backbone: Callable[..., Any], adapt: Callable[..., PeftModel]
) -> None:
    model = adapt(backbone(), target_modules=["q_proj", "lm_head"], num_blocks=1)
    plain = gradients(model, SHAPES[0])
    assert any("lm_head" in name for name in plain)
    compiled.compile_layers(model)
    assert_equal(gradients(model, SHAPES[0]), plain)
    assert num_graphs() > 0


def test_packed_rows_share_their_graphs_too(backbone: Callable[..., Any], adapt: Callable[..., PeftModel]) -> None:
    model = adapt(backbone(num_hidden_layers=3), num_blocks=1)
    rows = [[3, 6, 5], [4, 4], [7, 2, 5, 9], [3, 3, 2]]
    expected = [packed_gradients(model, lengths) for lengths in rows]
    compiled.compile_layers(model)
    for lengths, plain in zip(rows, expected, strict=True):
        assert_equal(packed_gradients(model, lengths), plain)
    assert 0 < num_graphs() <= 2


def bytes_kept(model: PeftModel) -> int:
    """Return the bytes of what a pass keeps for its backward pass beside the model's own tensors, each counted once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(3, 97, (4, 50), generator=torch.Generator().manual_seed(0))
    keywords = {"instruction_ids": ids[:, :3]} if is_ours(model) else {}
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False, **keywords).loss
    total = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    loss.backward()
    return total


def test_a_pass_keeps_no_more_than_plain_lora_does(
    backbone: Callable[..., Any], adapt: Callable[..., PeftModel]
) -> None:
    def kept(model: PeftModel) -> int:
        compiled.compile_layers(model)
        return bytes_kept(model)

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    ours = kept(adapt(backbone(num_hidden_layers=8), num_blocks=2, target_modules=targets))
    assert ours <= kept(get_peft_model(backbone(num_hidden_layers=8), config))


@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_trained_on_is_not_compiled(
    backbone: Callable[..., Any], adapt: Callable[..., PeftModel], ids: Tensor, training: bool
) -> None:
    model = adapt(backbone())
    expected = model(ids).logits
    compiled.compile_layers(model)
    model.train(training)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected)
    if not training:
        assert torch.equal(model(ids).logits, expected)
    assert num_graphs() == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["queryable", "moe_lora", "over 4 bits"])
def test_checkpointing_and_compiling_give_the_plain_gradients(
    backbone: Callable[..., Any], adapt: Callable[..., PeftModel], mix: Callable[..., PeftModel], kind: str
) -> None:
    """Whole graphs still; two passes before one backward pass, whose routes must not be mistaken for each other's."""
    plain = quantized() if kind == "over 4 bits" else backbone(num_hidden_layers=2)
    model: Any = mix(kind, plain) if kind == "moe_lora" else adapt(plain, num_blocks=2)
    expected, all_bytes = joint_gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, checkpointed_bytes = joint_gradients(model)
    compiled.compile_layers(model)
    found, num_bytes = joint_gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert 0 < num_graphs() <= 3
    assert num_bytes <= checkpointed_bytes < all_bytes / 2  # kept for the backward pass: little but the layers' inputs


def test_a_backbone_without_decoder_layers_is_refused() -> None:
    module = ContinualModule(MLPRegressor(num_inputs=4), LoraConfig(target_modules=["head"]), compile=True)
    with pytest.raises(ConfigError, match=r"^there are no decoder layers to compile: leave model\.compile out$"):
        module.configure_model()


def test_a_checkpointed_layer_fills_no_cache(backbone: Callable[..., Any], adapt: Callable[..., PeftModel]) -> None:
    model: Any = adapt(backbone(num_hidden_layers=1), num_blocks=1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled.compile_layers(model)
    ids, cache = torch.arange(3, 11).view(2, 4), DynamicCache()
    output = model.train()(input_ids=ids, labels=ids, instruction_ids=ids, **{CACHE: cache})
    output.loss.backward()  # computes the layer again
    assert num_graphs() > 0 and cache.get_seq_length() == 0


# -- torch's switches -------------------------------------------------------------------------------------------------


def switches() -> tuple[Any, ...]:
    limits: Any = torch._dynamo.config
    return limits.recompile_limit, limits.specialize_float, shapes.use_duck_shape


class Watch(L.Callback):
    """Notes torch's switches between the steps of a fit."""

    def __init__(self) -> None:
        self.seen: set[tuple[Any, ...]] = set()

    def on_train_batch_end(self, *args: Any) -> None:
        """Note them."""
        self.seen.add(switches())


@pytest.mark.parametrize("fails", [False, True])
def test_a_fit_leaves_torchs_switches_as_they_were(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    inside: set[tuple[Any, ...]] = set()

    def backend(graph: Any, example: Any) -> Any:
        inside.add(switches())
        if fails:
            raise NotImplementedError("no code for this")
        return graph.forward

    monkeypatch.setitem(OPTIONS, "backend", backend)
    module = ContinualModule(TinyCausalLM(num_layers=2), LoraConfig(r=2, target_modules=["q_proj"]), compile=True)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"forward": {"input_ids": ids}, "labels": ids[:, -3:], "weight": 1.0, "rows": [0, 1]}
    quiet: dict[str, Any] = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)
    before, watch = switches(), Watch()
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[watch], **quiet)
    with pytest.raises(Exception, match="no code for this") if fails else nullcontext():
        trainer.fit(module, DataLoader([batch] * 2, batch_size=None))  # type: ignore[arg-type]
    assert inside == {(128, True, False)}
    assert switches() == before not in inside
    assert watch.seen == (set() if fails else {before})

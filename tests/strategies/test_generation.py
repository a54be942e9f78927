"""Free answers over a static cache, step after recorded step: the texts of a cache that grows."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from peft import LoraConfig, get_peft_model
from recording import NoWaiting, capturing
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import CompileConfig, GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from continual.compat import transformers as compat
from continual.compat.transformers import CACHE
from continual.data.stage_data import StageData
from continual.errors import RunError
from continual.scoring import generation
from continual.scoring.generation import generate
from continual.training.module import ContinualModule
from continual.training.recorded_generation import generate_recorded, on_cuda

Prepared = Callable[..., tuple[ContinualModule, list[StageData]]]
CASES = [("Sequential", "lora"), ("Sequential", "queryable"), ("Sequential", "experts"), ("GrowingBank", "queryable")]
NUM_TOKENS = 12


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[StaticCache]]:
    """Let a CPU step as a GPU does; returns the static caches that are made."""
    made: list[weakref.ref[StaticCache]] = []

    class Watched(StaticCache):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self))

    def on_all_devices() -> GenerationConfig:
        compiling: Any = CompileConfig()
        compiling._compile_all_devices = True  # all else that transformers asks before it takes our steps stays asked
        return GenerationConfig(compile_config=compiling)

    monkeypatch.setattr(compat, "StaticCache", Watched)
    monkeypatch.setattr(generation, "GenerationConfig", on_all_devices)
    return made


class Recorder:
    """Stands in for a CUDA graph: a trace repeats tensor operations and runs no Python."""

    def __init__(self, caches: list[weakref.ref[StaticCache]]) -> None:
        self.caches, self.num_traces, self.num_repeats = caches, 0, 0

    def __call__(self, step: Callable[[], Any]) -> Callable[[], Any]:
        cache = self.caches[-1]()
        assert cache is not None
        own = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values", "cumulative_length")]
        before = [tensor.clone() for tensor in own]
        with capturing():
            trace = make_fx(lambda: step().logits)()
            for tensor, value in zip(own, before, strict=True):  # tracing has taken the step, a capture does not
                tensor.copy_(value)
        self.num_traces += 1

        def repeat() -> Any:
            self.num_repeats += 1
            return CausalLMOutputWithPast(**{"logits": trace(), CACHE: cache})

        return repeat


def answering(sequence: Callable[..., Any], strategy: str, adapter: str) -> tuple[ContinualModule, list[StageData]]:
    """Return a module whose answers depend on all that they should, and its stages' data; a bank has learnt them."""
    made = sequence(strategy, adapter, rows=16, **({"background_rows": 0} if strategy == "GrowingBank" else {}))
    module, generator = made.module, torch.Generator().manual_seed(2)
    layers = module.model.get_base_model().get_decoder().layers
    with torch.no_grad():
        for parameter in layers.parameters():  # as it is, it repeats its last token for ever
            if parameter.dim() == 2 and not parameter.requires_grad:
                parameter.mul_(5)
        if strategy == "GrowingBank":
            with torch.enable_grad():
                made.run()
        for name, parameter in module.named_parameters():
            if any(part in name for part in ("lora_B", "queryable_B", "expert_B")):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval(), made.data


def prompts(data: list[StageData], size: int) -> dict[str, Tensor]:
    """Return left-padded prompts of all stages' rows, of different lengths, and what routes are decided by."""
    rows = [row for stage in data for row in stage.scored_rows[:size]]
    batch = data[0]._collator(answers=False)(rows)
    assert (batch["forward"]["attention_mask"] == 0).any()
    return {name: tensor for name, tensor in batch["forward"].items() if name != "position_ids"}


@torch.inference_mode()
def texts(
    module: ContinualModule, inputs: dict[str, Tensor], end: int | None, record: Any = None, most: int = NUM_TOKENS
) -> list[list[int]]:
    """Return the tokens that answer each prompt."""
    tokenizer: Any = module.backbone.tokenizer  # type: ignore[attr-defined]
    given = (module.model, inputs, most, end, tokenizer.pad_token_id)
    return (generate(*given) if record is None else generate_recorded(*given, record)).tolist()


@pytest.mark.parametrize(("strategy", "adapter"), CASES)
def test_a_static_cache_gives_the_same_answers(
    sequence: Callable[..., Any], caches: Any, strategy: str, adapter: str
) -> None:
    module, data = answering(sequence, strategy, adapter)
    record = Recorder(caches)
    for size in (3, 1):
        inputs = prompts(data, size)
        free = texts(module, inputs, None)
        assert [len(row) for row in free] == [NUM_TOKENS] * (2 * size) and len(set(free[0])) > 4
        assert texts(module, inputs, None, record) == free
        assert len({tuple(row) for row in free}) > size
        end = next(token for place, token in enumerate(free[0]) if place > 2 and token not in free[0][:place])
        plain = texts(module, inputs, end)  # that row stops there, and the others where they come to it
        stop = free[0].index(end) + 1
        assert plain[0][:stop] == free[0][:stop] and not any(plain[0][stop:])
        assert texts(module, inputs, end, record) == plain
        growing: Any = module.tuner and module.tuner.growing
        if growing:
            assert len(growing.chosen_B.unique()) > 1
    assert record.num_traces == 4 and record.num_repeats >= 2 * (NUM_TOKENS - 2)


@pytest.mark.parametrize(("strategy", "adapter"), CASES)
def test_nothing_in_a_step_waits_for_the_device_and_nothing_stays(
    sequence: Callable[..., Any], caches: Any, strategy: str, adapter: str
) -> None:
    module, data = answering(sequence, strategy, adapter)
    inputs, base = prompts(data, 3), module.model.get_base_model()  # type: ignore[union-attr]
    num_steps = 0

    def record(step: Callable[[], Any]) -> Callable[[], Any]:
        def repeat() -> Any:
            nonlocal num_steps
            num_steps += 1
            with capturing(), NoWaiting():
                return step()

        return repeat

    before = {*vars(base), *vars(module.model)}
    gc.collect()
    gc.disable()
    try:
        assert texts(module, inputs, None, record) == texts(module, inputs, None)
        assert num_steps == NUM_TOKENS - 2
        assert len(caches) == 1 and caches[0]() is None  # at once, without the collector of cycles
    finally:
        gc.enable()
    assert {*vars(base), *vars(module.model)} == before


def test_a_mask_for_each_kind_of_layer_follows_the_steps(caches: Any) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config: dict[str, Any] = sizes | {"vocab_size": 64, "num_key_value_heads": 2, "initializer_range": 0.5}
    base = cast(PreTrainedModel, Qwen2ForCausalLM(Qwen2Config(**config)))
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    ids = torch.randint(0, 64, (3, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1] * 5])}
    with torch.inference_mode():
        free, record = generate(model, inputs, NUM_TOKENS, None, 0), Recorder(caches)
        assert len(free.unique()) > 6
        assert generate_recorded(model, inputs, NUM_TOKENS, None, 0, record).tolist() == free.tolist()
    assert record.num_traces == 1 and record.num_repeats == NUM_TOKENS - 2


def test_short_answers_and_windows_are_not_recorded(prepared: Prepared, caches: Any) -> None:
    module, data = prepared("Sequential", "lora")
    inputs = prompts(data, 2)

    def record(step: Callable[[], Any]) -> Callable[[], Any]:
        raise AssertionError("recorded")

    texts(module.eval(), inputs, None, record, most=7)
    config: Any = module.model.get_base_model().config  # type: ignore[union-attr]
    config.layer_types = ["full_attention", "sliding_attention"]
    config.sliding_window = 8
    assert compat.static_cache(module.model.get_base_model(), 29) is None  # type: ignore[union-attr]


def test_a_step_that_cannot_be_recorded_is_one_line(prepared: Prepared, caches: Any) -> None:
    def refuse(step: Callable[[], Any]) -> Callable[[], Any]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA")

    module, data = prepared("Sequential", "lora")
    with pytest.raises(RunError, match=r"^model\.cuda_graphs cannot record .* free answer \(.*\): set it to false$"):
        texts(module.eval(), prompts(data, 2), None, refuse)
    assert "get_compiled_call" not in vars(module.model.get_base_model())  # type: ignore[union-attr]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("strategy", "adapter"), CASES)
def test_a_cuda_graph_gives_the_same_answers(sequence: Callable[..., Any], strategy: str, adapter: str) -> None:
    module, data = answering(sequence, strategy, adapter)
    module.cuda()
    for size in (3, 1, 3):
        inputs = move_data_to_device(prompts(data, size), module.device)
        assert texts(module, inputs, None, on_cuda) == texts(module, inputs, None)

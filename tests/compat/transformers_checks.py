"""Checks of continual/compat/transformers.py."""

from __future__ import annotations

from typing import Any

import torch
from behaviour import checks
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Cache,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from continual.compat import transformers as compat

SIZES: dict[str, Any] = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.5)).eval()


@checks(compat.cache_of)
def output_has_a_cache() -> None:
    model, ids = llama(), torch.tensor([[3, 4, 5]])
    cache = compat.cache_of(model(ids[:, :2], use_cache=True))
    assert isinstance(cache, Cache) and cache.get_seq_length() == 2
    stepped = model(ids[:, 2:], **{compat.CACHE: cache}).logits
    torch.testing.assert_close(stepped[:, -1], model(ids).logits[:, -1])


@checks(compat.static_cache)
def static_layers_keep_all_that_they_saw() -> None:
    cache: Any = compat.static_cache(llama(), 7)
    assert [layer.max_cache_len for layer in cache.layers] == [7]
    sliding = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    assert compat.static_cache(sliding, 7) is None


@checks(compat.stepping_by)
def steps_go_by_another_call() -> None:
    model = llama()
    with compat.stepping_by(model, print):
        assert model.get_compiled_call(None) is print
    assert "get_compiled_call" not in vars(model)
    greedy: Any = GenerationMixin
    assert "get_compiled_call" in greedy._sample.__code__.co_names


@checks(compat.nothing_packed)
def packed_rows_are_not_told_apart() -> None:
    model, ids = llama(), torch.tensor([[3, 4, 5, 6]])
    keywords = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": False}
    alone = model(ids[:, 2:]).logits
    torch.testing.assert_close(model(**keywords).logits[:, 2:], alone)
    with compat.nothing_packed():
        assert not torch.allclose(model(**keywords).logits[:, 2:], alone)
    torch.testing.assert_close(model(**keywords).logits[:, 2:], alone)


@checks(compat.attention_of)
def attention_is_found() -> None:
    layer = llama().model.layers[0]
    assert compat.attention_of(layer) is layer.self_attn
    other: Any = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=8, n_layer=1, n_head=2)).transformer.h[0]
    assert compat.attention_of(other) is other.attn
    assert compat.attention_of(layer.mlp) is None


@checks(compat.checkpointing_of)
def checkpointing_is_found() -> None:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = compat.checkpointing_of(model.model.layers[0])
    assert found.func is checkpoint and found.keywords == {"use_reentrant": False}
    assert compat.checkpointing_of(nn.Linear(1, 1)) is None


@checks(compat.forward_inside_checkpointing)
def forward_is_found_inside_of_checkpointing() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layer: Any = model.model.layers[0]
    calls: list[Any] = []
    layer._gradient_checkpointing_func = lambda *given: calls.append(given) or torch.zeros(1)
    x = torch.randn(1, 3, 8)
    positions = model.model.rotary_emb(x, torch.arange(3).unsqueeze(0))
    layer(x, position_embeddings=positions)
    assert len(calls) == 1
    inside = compat.forward_inside_checkpointing(layer)
    assert inside(layer, x, position_embeddings=positions).shape == x.shape and len(calls) == 1

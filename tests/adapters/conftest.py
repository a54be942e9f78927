"""Small backbones and adapters that the adapter tests share; every fixture is a factory, so that tests stay apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from continual.adapters import CoMoLConfig, MoeLoraConfig, QueryableLoraConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


class Residual(nn.Module):
    """A layer without keywords: h + down(tanh(up(h)))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return h + self.down(torch.tanh(self.up(h)))


class PlainModel(nn.Module):
    """A backbone without keywords, embeddings or a config, for inputs (B, width) or (B, T, width)."""

    def __init__(self, width: int = 6, inner: int = 9, num_layers: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Residual(width, inner) for _ in range(num_layers)])
        self.head = nn.Linear(width, 2)

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., width) to (..., 2)."""
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: these models are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def backbone() -> Callable[..., PreTrainedModel]:
    """Return a maker of tiny language models, the same weights at every call."""

    def make(kind: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        fields: dict[str, Any] = {**SIZES, "initializer_range": 0.1, **sizes}
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**fields))
        elif kind == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**fields))
        else:
            special = {name: fields[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
            model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, **special))
        model.to(dtype)  # type: ignore[arg-type]
        return model.eval()

    return make


@pytest.fixture(scope="session")
def plain_model() -> Callable[..., PlainModel]:
    """Return a maker of plain residual networks, the same weights at every call."""

    def make(dtype: torch.dtype = torch.float32, **sizes: int) -> PlainModel:
        torch.manual_seed(0)
        return PlainModel(**sizes).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def adapt() -> Callable[..., PeftModel]:
    """Return a maker of adapted models; ``spread`` is the standard deviation that B starts with (0: as trained)."""

    def make(model: nn.Module, spread: float = 0.3, adapter_name: str = "default", **fields: Any) -> PeftModel:
        torch.manual_seed(1)
        defaults: dict[str, Any] = {"r": 4, "num_atoms": 6, "top_k": 2, "num_blocks": 2}
        if isinstance(model, PreTrainedModel):
            defaults |= {"task_type": "CAUSAL_LM", "target_modules": TARGETS[model.config.model_type]}
        else:
            defaults |= {"target_modules": ["up", "down"], "instruction_dim": 5}
        adapted = get_peft_model(model, QueryableLoraConfig(**(defaults | fields)), adapter_name=adapter_name)  # type: ignore[arg-type]
        for name, parameter in adapted.named_parameters():
            if spread and ("queryable_B" in name or "summary_queries" in name):
                nn.init.normal_(parameter, std=spread)
        return adapted.eval()

    return make


@pytest.fixture(scope="session")
def mix() -> Callable[..., PeftModel]:
    """Return a maker of models with a mixture of experts; ``spread`` as for ``adapt``."""

    def make(
        kind: str, model: nn.Module, spread: float = 0.3, adapter_name: str = "default", **fields: Any
    ) -> PeftModel:
        torch.manual_seed(1)
        defaults: dict[str, Any] = {"r": 4, "num_experts": 5, "top_k": 2}
        if isinstance(model, PreTrainedModel):
            defaults |= {"task_type": "CAUSAL_LM", "target_modules": TARGETS[model.config.model_type]}
        else:
            defaults |= {"target_modules": ["up", "down"]}
        config = (MoeLoraConfig if kind == "moe_lora" else CoMoLConfig)(**(defaults | fields))
        mixed = get_peft_model(model, config, adapter_name=adapter_name)  # type: ignore[arg-type]
        for name, parameter in mixed.named_parameters():
            if spread and "expert_B" in name:
                nn.init.normal_(parameter, std=spread)
            if spread and "expert_router" in name:  # as far apart as trained ones
                with torch.no_grad():
                    parameter.mul_(5)
        return mixed.eval()

    return make


@pytest.fixture
def ids() -> Tensor:
    """Token ids of three rows, (3, 11)."""
    return torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def instructions() -> Tensor:
    """Instructions of three rows, (3, 3): one whole, one padded, one not given."""
    return torch.tensor([[5, 6, 7], [8, 9, -1], [-1, -1, -1]])

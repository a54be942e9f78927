"""A language model of a few thousand random weights, made in memory: for tests and smoke runs only."""

from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.quantization_config import QuantizationConfigMixin

from continual.backbones.causal_lm import CausalLM
from continual.backbones.model_files import random_model

_SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TinyCausalLM(CausalLM):
    """A Llama of random weights and a tokenizer of single bytes: it needs no file, and knows nothing.

    A byte is a token, so that prompts are as many tokens as they are bytes.
    """

    def __init__(
        self,
        seed: int = 0,
        hidden_size: int = 32,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attn_implementation: Literal["sdpa", "eager"] = "sdpa",
        prompt_format: Literal["plain", "chat"] = "plain",
        quantization: QuantizationConfigMixin | None = None,
    ) -> None:
        """Keeps its arguments. The weights depend on `seed` and the sizes alone."""
        super().__init__(
            "tiny-random",
            dtype,
            attn_implementation,
            prompt_format=prompt_format,
            random_init=True,
            quantization=quantization,
        )
        self.seed = seed
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads

    def _random_model(self) -> PreTrainedModel:
        tokenizer = self.tokenizer
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=2048,
            initializer_range=0.1,  # the usual 0.02 leaves blocks this narrow with hardly any effect
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return random_model(config, getattr(torch, self.dtype), self.attn_implementation, self.seed)

    def _load_tokenizer(self) -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate([*_SPECIAL_TOKENS, *alphabet])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        pad, start, end = _SPECIAL_TOKENS
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=pad,
            bos_token=start,
            eos_token=end,
            chat_template=_CHAT_TEMPLATE,
            model_max_length=2048,
        )

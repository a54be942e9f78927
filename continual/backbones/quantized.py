"""Backbones whose frozen weights are kept in a few bits: QLoRA's setting (Dettmers et al., 2023, arXiv 2305.14314).

Any configuration of transformers that quantises while loading will do, where it lets gradients through. For 4-bit
NormalFloat weights, on a GPU and on a CPU alike (`pip install 'continual[quantization]'` brings bitsandbytes):

    quantization:
      class_path: transformers.BitsAndBytesConfig
      init_args:
        load_in_4bit: true
        bnb_4bit_quant_type: nf4
        bnb_4bit_use_double_quant: true      # the blocks' scales in 8 bits
        bnb_4bit_compute_dtype: bfloat16     # products are taken in it; float32 unless given, which is slow
"""

import copy
import math
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from torch import Tensor, nn
from transformers import GgufConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from continual.errors import ConfigError

# A parser takes a dataclass for one closed set of keys, unless it is told that subclasses may stand for it.
set_parsing_settings(subclasses_enabled=[QuantizationConfigMixin])


def quantizing(quantization: QuantizationConfigMixin, model: str, stored: Any) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that quantise.

    Args:
        quantization: what was asked for.
        model: the backbone's name, for messages.
        stored: how the checkpoint says that it is quantised already; None where it is not.

    Raises:
        ConfigError: transformers would pass over it without a word.
    """
    kind = type(quantization).__name__
    if isinstance(quantization, GgufConfig):
        raise ConfigError(
            f"quantization: {kind} is not for here: a GGUF file is unpacked into plain weights, which another class, "
            "such as transformers.BitsAndBytesConfig, can quantise"
        )
    if not getattr(quantization, "is_quantizable", lambda: True)():
        raise ConfigError(f"quantization: {kind} quantises nothing so: set load_in_4bit or load_in_8bit")
    if stored is not None:
        raise ConfigError(f"the model {model!r} is stored quantised already: leave quantization out")
    # A copy: transformers writes into it. On the CPU, like all that is loaded: the trainer moves it.
    return {"quantization_config": copy.deepcopy(quantization), "device_map": {"": "cpu"}}


def prepare_quantized(model: nn.Module, name: str) -> None:
    """Makes a quantised model fit for training between scorings.

    Raises:
        ConfigError: gradients do not pass its layers, or this machine would get them wrong.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    if not quantizer.is_trainable:
        method = method_name(quantizer.quantization_config)
        raise ConfigError(f"the model {name!r} as {method}: no adapter can be trained over layers quantised so")
    for place, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        # Where a CPU has AVX512-BF16, bitsandbytes packs weights anew when they are first scored with: rounded once
        # more, and without gradients from then on, so that the next stage would train on wrong ones.
        vars(module)["support_avx512bf16_for_cpu"] = False
        layer: Any = module
        if layer.in_features % (block := layer.weight.quant_state.blocksize) and not torch.accelerator.is_available():
            # bitsandbytes 0.50 unpacks rows that share a block with others by the wrong scales where there is AVX512.
            raise ConfigError(
                f"the model {name!r} cannot be quantised on a CPU: {place} has {layer.in_features} inputs, "
                f"which is no multiple of {block}, and bitsandbytes computes others wrongly there"
            )


def method_name(quantization: Any) -> str:
    """Returns what a report calls a quantisation: nf4, fp4, llm_int8, quanto ..."""
    name = getattr(quantization, "quantization_method", lambda: None)() or quantization.quant_method
    return str(getattr(name, "value", name))


def num_weights(parameter: Tensor) -> int:
    """Returns how many weights a parameter stands for: two of 4 bits share a byte, and its own size says less."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)

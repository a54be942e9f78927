"""What benchmarks measure with: shapes of real models with random weights, tasks of random text, both adapters."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from measuring import Setting
from peft import LoraConfig
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config
from transformers.utils.quantization_config import QuantizationConfigMixin

from continual.adapters import QueryableLoraConfig
from continual.backbones import TinyCausalLM
from continual.backbones.causal_lm import _PACKAGED_SHAPE
from continual.backbones.model_files import random_model
from continual.config.experiment import TRAINER_DEFAULTS, Experiment, Stage
from continual.engine.stage_loop import StageLoop
from continual.training.module import ContinualModule
from tasks import Task
from tasks.base import Split, text_rows

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK = 8

_SHORT: dict[str, Any] = {"num_hidden_layers": 6, "vocab_size": 4096}

TEXT_LENGTHS = (19, 21, 23, 24, 26, 28, 29, 32, 35, 39, 43, 48, 53, 59, 66, 72, 79, 90, 130, 256)
"""Tokens of prompt and answer of the text suite 'mixed' (eight tasks, 12,000 training rows, cut at 256), by SmolLM2's
tokenizer: at the percentiles 2.5, 7.5 ... 97.5, so that each value stands for a twentieth of the rows."""
STAGE_ROWS = 1500
"""Rows that a stage of that suite trains on."""


def shape(name: Literal["qwen2.5-0.5b", "smollm2-135m", "smollm2-short", "tiny", "one-layer"]) -> Any:
    """Return the configuration of a model: real widths; the short one has 6 of 30 layers and a small vocabulary.

    The head costs all subjects the same, so that a small one makes ratios worse, not better.
    """
    if name == "qwen2.5-0.5b":
        return Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    if name in ("tiny", "one-layer"):
        sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
        sizes["num_hidden_layers"] = 6 if name == "tiny" else 1
        return LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return LlamaConfig(**_PACKAGED_SHAPE | (_SHORT if name == "smollm2-short" else {}))


def queryable(**fields: Any) -> QueryableLoraConfig:
    """Return our adapter as the benchmarks have it unless they say otherwise."""
    defaults: dict[str, Any] = {"num_atoms": 16, "top_k": 4, "num_blocks": 6, "target_modules": ATTENTION}
    return QueryableLoraConfig(**{"r": RANK, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | defaults | fields)


def lora(**fields: Any) -> LoraConfig:
    """Return PEFT's LoRA of the same rank and targets."""
    defaults: dict[str, Any] = {"r": RANK, "lora_alpha": 16, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    return LoraConfig(**defaults | fields)


def backbone_dtype(setting: Setting) -> Literal["float32", "bfloat16"]:
    """Return the dtype of the product's backbones: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if setting.cuda else "float32"


class ShapedLM(TinyCausalLM):
    """A language model of a real shape and random weights, with a tokenizer of single bytes: a byte is a token."""

    def __init__(
        self,
        shape_name: Any,
        seed: int,
        dtype: Literal["float32", "bfloat16"] = "float32",
        quantization: QuantizationConfigMixin | None = None,
    ) -> None:
        super().__init__(seed, dtype=dtype, quantization=quantization)
        self.shape_name = shape_name

    def _random_model(self) -> PreTrainedModel:
        return copy.deepcopy(_built(self.shape_name, self.dtype, self.seed, self.tokenizer.eos_token_id))


@functools.lru_cache(maxsize=1)
def _built(shape_name: Any, dtype: str, seed: int, end_mark: int) -> PreTrainedModel:
    """Return a model to copy: to draw half a billion weights takes longer than most of what is measured with them."""
    config = shape(shape_name)
    config.eos_token_id = end_mark
    return random_model(config, getattr(torch, dtype), "sdpa", seed)


class RandomText(Task):
    """Rows of random letters.

    Args:
        lengths: Tokens of each row's prompt.
        labels: The labels; without them answers are free, of ``answer_length`` letters.
        answer_length: Letters of a free answer.
        seed: Decides the letters.
    """

    def __init__(
        self, lengths: Sequence[int], labels: list[str] | None = None, answer_length: int = 1, seed: int = 0
    ) -> None:
        self.kind = "labels" if labels else "free"
        self.labels, self.instruction = labels, "Go."
        self.lengths, self.answer_length, self.seed = lengths, answer_length, seed

    def _build(self) -> dict[Split, Dataset]:
        generator, rows = random.Random(self.seed), []
        for index, length in enumerate(self.lengths):
            question = _letters(generator, max(1, length - len("Go.\n\nAnswer:")))
            answer = self.labels[index % len(self.labels)] if self.labels else _letters(generator, self.answer_length)
            rows.append(("", question, answer, index))
        return {"train": text_rows(rows), "test": text_rows(rows)}


def _letters(generator: random.Random, count: int) -> str:
    return "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=count))


def sequence(
    setting: Setting,
    folder: Path,
    module: ContinualModule,
    tasks: Sequence[Task],
    data: dict[str, Any],
    trainer: dict[str, Any] | None = None,
) -> StageLoop:
    """Return a run of the product, prepared: what a configuration file would come to."""
    chosen = TRAINER_DEFAULTS | {"accelerator": "gpu" if setting.cuda else "cpu"} | (trainer or {})
    stages = [Stage(f"task{index}", task) for index, task in enumerate(tasks)]
    made = StageLoop(Experiment("bench", setting.seed, None, module, data, chosen, stages, "{}"), folder)
    with redirect_stdout(None):
        made.prepare()
    return made

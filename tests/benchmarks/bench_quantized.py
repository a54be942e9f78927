"""A backbone in 4 bits against the same one in bfloat16: bytes of its weights, a training step, memory at its peak."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measuring import Result, Setting, Stand
from peft import PeftConfig
from subjects import ShapedLM, lora, queryable
from transformers import BitsAndBytesConfig

from continual.training.module import ContinualModule


def run(setting: Setting) -> Iterator[Result]:
    """Time both adapters over both backbones; nothing where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    shape, rows, tokens = setting.pick(
        ("qwen2.5-0.5b", 8, 512), ("smollm2-short", 8, 64), ("smollm2-short", 1, 8)
    )  # on a CPU widths have to be multiples of 64
    for name, config in (("queryable", queryable()), ("lora", lora())):
        case = f"{shape} {rows}x{tokens} {name}"
        if setting.wants(case):
            yield from compare(case, shape, (rows, tokens), config, setting)


def compare(case: str, shape: str, size: tuple[int, int], config: PeftConfig, setting: Setting) -> Iterator[Result]:
    """Time one adapter over both backbones, in turn."""
    stand, num_bytes = Stand(setting.device), dict[str, int]()
    for kept in ("bf16", "nf4"):
        build = partial(step_of, kept, shape, size, config, setting, num_bytes)
        stand.add(kept, build, warm_up=setting.pick(3, 1, 1))
    timings = stand.run(setting.num_rounds(setting.pick(15, 9, 1)), repeats=setting.pick(5, 1, 1), peaks=True)
    detail = {"backbone_bytes": num_bytes, "double_quant": True} | timings.detail()
    weights = num_bytes["nf4"] / num_bytes["bf16"]
    yield Result("quantized", case, "nf4: backbone's bytes / bf16's", weights, detail=detail)
    yield Result("quantized", case, "nf4: seconds / bf16's", **timings.ratio("nf4", "bf16"), detail=detail)
    if setting.cuda:
        peak = timings.peak_bytes["nf4"] / timings.peak_bytes["bf16"]
        yield Result("quantized", case, "nf4: peak memory / bf16's", peak, detail=detail)


def step_of(
    kept: str, shape: str, size: tuple[int, int], config: PeftConfig, setting: Setting, num_bytes: dict[str, int]
) -> Callable[[], None]:
    """Return a function that makes one training step, and note the bytes of the backbone's weights and scales."""
    torch.manual_seed(setting.seed)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    module = ContinualModule(ShapedLM(shape, setting.seed, "bfloat16", nf4 if kept == "nf4" else None), config)
    module.configure_model()
    module.to(setting.device).train()
    tensors = module.state_dict()
    module.on_save_checkpoint(adapter := {"state_dict": tensors})
    frozen = {t.data_ptr(): t for name, t in tensors.items() if name not in adapter["state_dict"]}  # tied ones once
    num_bytes[kept] = sum(tensor.numel() * tensor.element_size() for tensor in frozen.values())
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)
    ids = torch.randint(0, 256, size, device=setting.device)
    forward = {"input_ids": ids} | ({"instruction_ids": ids[:, :12]} if module.uses_instructions else {})

    def step() -> None:
        module.training_pass({"forward": forward, "labels": ids[:, 1:]})[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

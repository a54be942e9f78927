"""A training step of the queryable adapter against PEFT LoRA's of the same rank, targets and dtype, in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from measuring import Result, Setting, Stand
from peft import PeftConfig, PeftModel, get_peft_model
from subjects import ShapedLM, lora, queryable

from continual.adapters import QueryableLoraModel
from continual.adapters.growing.bank import SlicedBank
from continual.adapters.growing.gate import StageGate
from continual.training.compiled import compile_layers
from continual.training.cuda_graphs import GraphedPasses
from continual.training.module import ContinualModule

MODES = {
    "eager": (),
    "compiled": ("compile",),
    "graphs": ("cuda_graphs",),
    "compiled graphs": ("compile", "cuda_graphs"),
}
"""Ways to train, by the arguments of ContinualModule that they set."""

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        shape: The backbone's shape; its weights are bfloat16.
        rows: Rows a batch.
        tokens: Tokens a row.
        dtype: Of the adapters' weights.
        variant: "base", "all-linear" (every linear layer is targeted), "64 atoms" or "10 slices" (the last of ten).
        modes: Of ``MODES``.
    """

    shape: str
    rows: int
    tokens: int
    dtype: Dtype = "float32"
    variant: Literal["base", "all-linear", "64 atoms", "10 slices"] = "base"
    modes: tuple[str, ...] = ("eager",)

    @property
    def title(self) -> str:
        """The case in few words."""
        return f"{self.shape} {self.rows}x{self.tokens} {self.dtype} {self.variant}"


def cases(setting: Setting) -> list[Case]:
    """Return what is compared on a setting's device."""
    if setting.tiny:
        variants = [Case("tiny", 2, 16, "float32", v) for v in ("base", "all-linear", "64 atoms", "10 slices")]
        return [*variants, Case("tiny", 2, 16, "bfloat16")]
    shapes: Any = setting.pick(
        [("qwen2.5-0.5b", 8, 512), ("qwen2.5-0.5b", 16, 128), ("smollm2-135m", 16, 256)],
        [("smollm2-short", 8, 64)],
        None,
    )
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32")
    base_modes = setting.pick(tuple(MODES), ("eager", "compiled"), None)
    found = [Case(s, rows, tokens, d, "base", base_modes) for s, rows, tokens in shapes for d in dtypes]
    modes = setting.pick(("eager", "compiled", "compiled graphs"), ("eager",), None)
    shape, rows, tokens = shapes[0]
    return found + [
        Case(shape, rows, tokens, dtype, variant, modes)
        for variant in ("all-linear", "64 atoms", "10 slices")
        for dtype in dtypes
    ]


def run(setting: Setting) -> Iterator[Result]:
    """Time every case."""
    for case in cases(setting):
        if setting.wants(case.title):
            yield from compare(case, setting)


def compare(case: Case, setting: Setting) -> Iterator[Result]:
    """Time both adapters in every mode of a case, all in turn."""
    stand = Stand(setting.device)
    for mode in case.modes:
        for name, config in (("ours", _ours(case)), ("lora", _lora(case))):
            prepare = partial(grow, num_slices=10) if (name, case.variant) == ("ours", "10 slices") else None
            build = partial(step_of, case, config, setting, mode, prepare)
            stand.add(f"{name} {mode}", build, warm_up=setting.pick(3, 1, 1))
    timings = stand.run(setting.num_rounds(setting.pick(15, 9, 1)), repeats=setting.pick(5, 1, 1), peaks=True)
    detail = {"rows": case.rows, "tokens": case.tokens, "backbone": case.shape, "backbone_dtype": "bfloat16"}
    detail |= {"adapter_dtype": case.dtype, "variant": case.variant} | timings.detail()
    usual = "<= 1.10" if case.variant == "base" else "<= 1.25"

    def result(measure: str, first: str, second: str, goal: str | None) -> Result:
        return Result("training", case.title, measure, **timings.ratio(first, second), goal=goal, detail=detail)

    for mode in case.modes:
        eager_on_gpu = setting.cuda and mode == "eager" and case.variant == "base"
        yield result(f"{mode}: seconds / LoRA's", f"ours {mode}", f"lora {mode}", "<= 1.15" if eager_on_gpu else usual)
        if setting.cuda and "graphs" not in mode:  # a graph's memory is a pool of its own
            peak = timings.peak_bytes[f"ours {mode}"] / timings.peak_bytes[f"lora {mode}"]
            yield Result("training", case.title, f"{mode}: peak memory / LoRA's", peak, goal="<= 1.00", detail=detail)
        if mode != "eager" and "eager" in case.modes:
            goal = "<= 0.45" if setting.cuda and case.variant == "base" else None
            yield result(f"{mode}: seconds / eager LoRA's", f"ours {mode}", "lora eager", goal)


def step_of(
    case: Case,
    config: PeftConfig,
    setting: Setting,
    mode: str = "eager",
    prepare: Callable[[PeftModel], None] | None = None,
) -> Callable[[], None]:
    """Return a function that makes one training step of the product's module: forward, backward, AdamW.

    Args:
        case: The backbone, the batch and the adapter's dtype.
        config: The adapter.
        setting: Device and seed.
        mode: One of ``MODES``.
        prepare: Makes the adapted model ready.
    """
    torch.manual_seed(setting.seed)
    backbone = ShapedLM(case.shape, setting.seed, "bfloat16")
    module = ContinualModule(backbone, config)
    # PEFT's default is float32 adapters on a bfloat16 backbone.
    casts = case.dtype == "float32"
    module.model = model = cast(PeftModel, get_peft_model(backbone.build(), config, autocast_adapter_dtype=casts))
    if prepare is not None:
        prepare(model)
    if "compile" in MODES[mode]:
        compile_layers(model)
    module.to(setting.device).train()
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {getattr(torch, case.dtype)}
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)
    batch = _batch(case, setting, isinstance(model.base_model, QueryableLoraModel))
    passes = GraphedPasses(module) if "cuda_graphs" in MODES[mode] else module.training_pass

    def step() -> None:
        passes(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _batch(case: Case, setting: Setting, instructed: bool) -> dict[str, Any]:
    """Return a batch of random tokens, each of which has to be predicted."""
    ids = torch.randint(0, 256, (case.rows, case.tokens), device=setting.device)
    forward = {"input_ids": ids} | ({"instruction_ids": ids[:, :12]} if instructed else {})
    return {"forward": forward, "labels": ids[:, 1:]}


def grow(model: PeftModel, num_slices: int) -> None:
    """Make the adapter the last slice of a growing bank, the earlier ones frozen, as in training's last stage."""
    tuner = cast(QueryableLoraModel, model.base_model)
    width = cast(Any, tuner.model).config.hidden_size
    tuner.growing = bank = SlicedBank(tuner, StageGate(width, width), depth=1)
    casts = next(p.dtype for p in model.parameters() if p.requires_grad) == torch.float32
    for index in range(2, num_slices + 1):
        config = copy.deepcopy(model.peft_config["default"])
        model.add_adapter(f"stage{index:02d}", config, autocast_adapter_dtype=casts)
    tuner.set_adapter(bank.names)
    bank.train_only(bank.names[-1])
    bank.in_use = bank.names[-1:]


def _ours(case: Case) -> PeftConfig:
    fields: dict[str, Any] = {"num_atoms": 64} if case.variant == "64 atoms" else {}
    return queryable(**fields | ({"target_modules": "all-linear"} if case.variant == "all-linear" else {}))


def _lora(case: Case) -> PeftConfig:
    return lora(**({"target_modules": "all-linear"} if case.variant == "all-linear" else {}))

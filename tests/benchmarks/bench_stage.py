"""A stage of training by the product, through Lightning, against a bare loop of the same steps and a naive recipe."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measuring import Result, Setting, Stand, Timings, spread
from peft import get_peft_model
from subjects import STAGE_ROWS, TEXT_LENGTHS, RandomText, ShapedLM, backbone_dtype, lora, queryable, sequence
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from continual.data.batch import IGNORED, Row
from continual.data.stage_data import StageData
from continual.engine.stage_loop import StageLoop
from continual.training.module import ContinualModule

BATCH_SIZE = 8


def run(setting: Setting) -> Iterator[Result]:
    """Measure what Lightning and our callbacks cost a step, what packing is worth, and what a naive recipe costs."""
    with tempfile.TemporaryDirectory() as folder:
        shape = setting.pick("qwen2.5-0.5b", "smollm2-short", "tiny")
        steps = setting.pick(60, 6, 3)
        for compiles in setting.pick((False, True), (False,), (False,)):
            title = f"{shape} {'compiled' if compiles else 'eager'}"
            if setting.wants(f"{title} through Lightning"):
                yield from through_lightning(setting, Path(folder) / title, shape, steps, compiles)
        if not setting.tiny and setting.wants("one-layer eager through Lightning"):  # so short that the rest shows
            yield from through_lightning(setting, Path(folder) / "one-layer", "one-layer", 200, False)
        for compiles in setting.pick((False, True), (False,), (False,)):
            title = f"{shape} {'compiled' if compiles else 'eager'} packed"
            if setting.wants(title):
                yield from packed_rows(setting, Path(folder) / title, title, shape, steps, compiles)
        if setting.wants(f"{shape} against a naive recipe"):
            steps = setting.pick(math.ceil(STAGE_ROWS / BATCH_SIZE), steps, steps)
            yield from against_naive(setting, Path(folder) / "naive", shape, steps)


def through_lightning(setting: Setting, folder: Path, shape: str, steps: int, compiles: bool) -> Iterator[Result]:
    """Time the product's stage and a bare loop over the same batches; the trained weights have to be the same."""
    made: list[ContinualModule] = []
    fields = {"compile": compiles, "cuda_graphs": False}  # a bare loop records nothing

    def product() -> Callable[[], Any]:
        stages = _sequence(setting, folder / "product", shape, steps, fields)
        made.append(stages.module)
        stages.begin(1, stages.data)
        return lambda: stages._fit(1)

    def bare() -> Callable[[], Any]:
        stages = _sequence(setting, folder / "bare", shape, steps, fields)
        made.append(stages.module)
        return lambda: bare_stage(stages.module, stages.data[0], setting.device)

    stand = Stand(setting.device)
    stand.add("product", product, warm_up=1)
    stand.add("bare", bare, warm_up=1)
    weights = [[p.detach().cpu() for p in module.parameters() if p.requires_grad] for module in made]
    apart = max((a - b).abs().max().item() for a, b in zip(*weights, strict=True))
    timings = stand.run(setting.num_rounds(7))
    detail = {"shape": shape, "steps": steps, "rows": BATCH_SIZE, "compiled": compiles, "weights_apart": apart}
    detail |= {"adapter": "float32", "backbone_dtype": backbone_dtype(setting)} | timings.detail()
    case = f"{shape} {'compiled' if compiles else 'eager'} through Lightning"
    ratio, goal = timings.ratio("product", "bare"), "<= 1.03" if shape != "one-layer" else None
    yield Result("stage", case, "seconds / bare loop's", **ratio, goal=goal, detail=detail)
    yield Result("stage", case, "cost a step over the bare loop", **_cost(timings, steps), unit="us", detail=detail)


def _cost(timings: Timings, steps: int) -> dict[str, Any]:
    pairs = zip(timings.seconds["product"], timings.seconds["bare"], strict=True)
    return spread([1e6 * (a - b) / steps for a, b in pairs])


def _sequence(setting: Setting, folder: Path, shape: str, steps: int, way: dict[str, bool], **data: Any) -> StageLoop:
    # The learning rate stays as it is, so that the bare loop needs no schedule of its own.
    fields: dict[str, Any] = way | {"warmup_steps": 0, "final_lr_fraction": 1.0}
    adapter = lora(target_modules=["q_proj"]) if shape == "one-layer" else queryable()
    module = ContinualModule(ShapedLM(shape, setting.seed, backbone_dtype(setting)), adapter, **fields)
    task = RandomText(_lengths(steps), seed=setting.seed)
    return sequence(setting, folder, module, [task], {"batch_size": BATCH_SIZE, "max_tokens": 512} | data)


def _lengths(steps: int) -> list[int]:
    """Return the tokens of ``steps`` batches' rows."""
    return [TEXT_LENGTHS[index % len(TEXT_LENGTHS)] for index in range(steps * BATCH_SIZE)]


def bare_stage(module: ContinualModule, data: StageData, device: torch.device) -> None:
    """Train one epoch of ``data``: what the product computes and nothing around it."""
    module.to(device).train()
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = module.make_optimizer(trainable)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    for batch in data.train_dataloader():
        forward = {name: tensor.to(device) for name, tensor in batch["forward"].items()}
        batch = batch | {"forward": forward, "labels": batch["labels"].to(device)}
        module.loss(batch, module.outputs(batch)).backward()
        clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def packed_rows(setting: Setting, folder: Path, case: str, shape: str, steps: int, compiles: bool) -> Iterator[Result]:
    """Time the product's stage with the rows of a batch packed into one sequence and padded to the longest."""
    made: dict[str, StageLoop] = {}

    def stage(name: str) -> Callable[[], Any]:
        made[name] = _sequence(setting, folder / name, shape, steps, {"compile": compiles}, packing=name == "packed")
        made[name].begin(1, made[name].data)
        return lambda: made[name]._fit(1)

    stand = Stand(setting.device)
    for name in ("padded", "packed"):
        stand.add(name, lambda name=name: stage(name), warm_up=1)
    timings = stand.run(setting.num_rounds(7))
    columns = {
        name: [batch["forward"]["input_ids"].numel() for batch in stages.data[0].train_dataloader()]
        for name, stages in made.items()
    }
    detail = {"shape": shape, "steps": steps, "rows": BATCH_SIZE, "compiled": compiles} | timings.detail()
    detail |= {"backbone_dtype": backbone_dtype(setting), "tokens": {name: sum(each) for name, each in columns.items()}}
    yield Result("stage", case, "seconds / padded's", **timings.ratio("packed", "padded"), detail=detail)


# -- a naive recipe ---------------------------------------------------------------------------------------------------


class NaiveModule(L.LightningModule):
    """PEFT LoRA as its first examples have it: the model's own loss, a logged value, AdamW."""

    def __init__(self, backbone: ShapedLM) -> None:
        super().__init__()
        self.model = get_peft_model(backbone.build(), lora())

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Lightning's hook."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Lightning's hook."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def padded_batch(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Return rows padded to the longest, with an attention mask and labels of the answers."""
    width = max(row.length for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for place, row in enumerate(rows):
        ids[place, : row.length] = torch.tensor(row.prompt_ids + row.answer_ids)
        mask[place, : row.length] = 1
        labels[place, len(row.prompt_ids) : row.length] = torch.tensor(row.answer_ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def against_naive(setting: Setting, folder: Path, shape: str, steps: int) -> Iterator[Result]:
    """Time the product's stage, compiled or recorded on a GPU, against PEFT LoRA in shuffled and padded batches."""
    tokens = sum(_lengths(steps))
    compiled = {"compile": True, "cuda_graphs": False}
    on_gpu = {"compiled": compiled, "graphs": {"cuda_graphs": True}, "compiled graphs": {"compile": True}}
    ways: dict[str, dict[str, bool]] = setting.pick(on_gpu, {"eager": {}}, {"eager": {}})

    def product(way: str) -> Callable[[], Any]:
        stages = _sequence(setting, folder / way, shape, steps, ways[way])
        stages.begin(1, stages.data)
        return lambda: stages._fit(1)

    def naive() -> Callable[[], Any]:
        rows = _sequence(setting, folder / "rows", shape, steps, {}).data[0].train_rows
        module = NaiveModule(ShapedLM(shape, setting.seed, backbone_dtype(setting)))
        # Lightning's defaults but for files and the bar's own output: what these cost would count against it.
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        device = "gpu" if setting.cuda else "cpu"

        def stage() -> None:
            loader = DataLoader(rows, BATCH_SIZE, shuffle=True, collate_fn=padded_batch)  # type: ignore[arg-type]
            L.Trainer(max_epochs=1, devices=1, accelerator=device, enable_model_summary=False, **quiet).fit(
                module, train_dataloaders=loader
            )

        return stage

    stand = Stand(setting.device)
    stand.add("naive", naive, warm_up=1)
    for way in ways:
        stand.add(way, lambda way=way: product(way), warm_up=1)
    timings = stand.run(setting.num_rounds(5))
    detail = {"shape": shape, "steps": steps, "rows": BATCH_SIZE, "backbone_dtype": backbone_dtype(setting)}
    detail |= timings.detail()
    detail["tokens_a_second"] = {name: tokens / timings.median(name) for name in ("naive", *ways)}
    case, goal = f"{shape} against a naive recipe", ">= 3" if setting.cuda else None
    for way in ways:
        measure = f"tokens a second / naive's ({way})"
        yield Result("stage", case, measure, **timings.ratio("naive", way), goal=goal, detail=detail)

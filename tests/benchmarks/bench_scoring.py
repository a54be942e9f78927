"""Scoring test rows: all labels from one pass against a pass a label, what recording routes costs, and generation."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
from bench_training import grow
from lightning.fabric.utilities import move_data_to_device
from measuring import Result, Setting, Stand
from peft import PeftConfig
from subjects import TEXT_LENGTHS, RandomText, ShapedLM, backbone_dtype, lora, queryable, sequence
from torch import Tensor

from continual.callbacks import RouteRecorder, TokenRecorder
from continual.data import stage_data
from continual.data.batch import Row
from continual.data.batch_order import scoring_size, token_batches
from continual.data.label_tree import LabelTree
from continual.engine.stage_loop import StageLoop
from continual.scoring import evaluate
from continual.scoring.evaluate import label_log_likelihoods, score_batch
from continual.training import module as module_file
from continual.training.module import ContinualModule
from continual.training.recorded_generation import generate_recorded
from tasks import Task

LABELS = ["a", "on", "cat", "sky", "to", "green", "it", "up", "moon", "be", "salt", "we", "iron", "no"]


def run(setting: Setting) -> Iterator[Result]:
    """Measure all of it."""
    shape = setting.pick("qwen2.5-0.5b", "smollm2-short", "tiny")
    with tempfile.TemporaryDirectory() as folder:
        if setting.wants(f"{shape} {len(LABELS)} labels"):
            yield from labels(setting, Path(folder), shape)
        if setting.wants(f"{shape} recording routes"):
            yield from recording(setting, Path(folder), shape)
        if setting.wants(f"{shape} ten tasks"):
            yield from ten_tasks(setting, Path(folder), shape)
        if setting.wants(f"{shape} rows of ten stages"):
            yield from rows_of_ten_stages(setting, Path(folder), shape)
        if setting.wants(f"{shape} free answers"):
            yield from free_answers(setting, Path(folder), shape)


def _scoring(
    setting: Setting, folder: Path, shape: str, adapter: PeftConfig, task: Task, dtype: Any = None
) -> tuple[StageLoop, list[dict[str, Any]]]:
    """Return a run of the product on one task, ready to score, and the task's batches on the device."""
    backbone = ShapedLM(shape, setting.seed, dtype or backbone_dtype(setting))
    stages = sequence(setting, folder, ContinualModule(backbone, adapter), [task], {})
    stages.module.to(setting.device).eval()
    batches = list(stages.data[0].test_dataloader())
    return stages, [move_data_to_device(batch, setting.device) for batch in batches]


def _lengths(setting: Setting, usual: int, on_gpu: int) -> list[int]:
    count = setting.pick(on_gpu, usual, 3)
    return [TEXT_LENGTHS[(7 * index) % len(TEXT_LENGTHS)] for index in range(count)]  # 7: long and short in any few


# -- labels -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def labels(setting: Setting, folder: Path, shape: str) -> Iterator[Result]:
    """Time all labels from one pass against a full forward a label, and compare their scores in float32."""
    task = RandomText(_lengths(setting, 6, 480), LABELS, seed=setting.seed)
    stages, batches = _scoring(setting, folder / "labels", shape, queryable(), task)
    model, rows = cast(Any, stages.module.model), stages.data[0]._encoded["test"].rows
    instruction = _instruction(stages.module, task)
    candidates: LabelTree = batches[0]["label_tree"]
    answers = [candidates.ids_L[candidates.segment_L == index].tolist() for index in range(len(LABELS))]

    def tree() -> dict[int, Tensor]:
        found = [label_log_likelihoods(model, batch["forward"], candidates) for batch in batches]
        places = [row["row"] for batch in batches for row in batch["rows"]]
        return dict(zip(places, torch.cat(found), strict=True))

    def one_by_one(all_logits: bool) -> Callable[[], Tensor]:
        return lambda: _one_by_one(model, rows, answers, instruction, all_logits)

    apart = _apart(setting, folder, shape, task)
    stand = Stand(setting.device)
    stand.add("ours", lambda: tree, warm_up=1)
    stand.add("forward a label", lambda: one_by_one(all_logits=True), warm_up=1)
    stand.add("forward a label, its logits alone", lambda: one_by_one(all_logits=False), warm_up=1)
    timings = stand.run(setting.num_rounds(5))
    counted: list[int] = []
    handle = model.get_base_model().register_forward_pre_hook(_counter(counted), with_kwargs=True)
    tree()
    handle.remove()
    prompt_tokens, columns = sum(len(row.prompt_ids) for row in rows), len(candidates.node_ids_K)
    computed = sum(len(b["rows"]) * (b["forward"]["input_ids"].shape[1] + columns) for b in batches)
    detail = {"shape": shape, "rows": len(rows), "labels": len(LABELS), "label_nodes": columns}
    detail |= {"backbone_dtype": backbone_dtype(setting), "adapter": "ours", "prompt_tokens": prompt_tokens}
    detail |= {"tokens_computed": computed} | timings.detail()
    case = f"{shape} {len(LABELS)} labels"
    for name, goal in (("forward a label", ">= 6"), ("forward a label, its logits alone", None)):
        ratio = timings.ratio(name, "ours")
        yield Result("scoring", case, f"rows a second / {name}", **ratio, goal=goal, detail=detail)
    passes = sum(counted) / len(rows)
    yield Result("scoring", case, "passes over a row's prompt", passes, goal="<= 1.3", detail=detail)
    yield Result("scoring", case, "log-likelihoods apart, float32", apart, "nats", goal="<= 0.001", detail=detail)


def _instruction(module: ContinualModule, task: Task) -> Tensor:
    return torch.tensor(cast(Any, module.backbone).encode_instruction(task.instruction), device=module.device)


def _counter(counted: list[int]) -> Callable[..., None]:
    """Return a hook that notes how many rows each forward pass has."""
    return lambda module, args, kwargs: counted.append(len(kwargs["input_ids"]))


def _one_by_one(model: Any, rows: list[Row], answers: list[list[int]], instruction: Tensor, all_logits: bool) -> Tensor:
    """Return each row's log p(label | prompt), (rows, labels), by a full pass over prompt and label for each label.

    As lm-eval does it: all requests sorted by length and padded on the right, in batches of as many tokens as ours.
    ``all_logits``: of every token, as lm-eval computes them, and not of the label's alone.
    """
    requests = [(row, label) for row in range(len(rows)) for label in range(len(answers))]
    lengths = [len(rows[row].prompt_ids) + len(answers[label]) - 1 for row, label in requests]
    scores = torch.zeros(len(rows), len(answers), dtype=torch.float64)
    size = scoring_size(instruction.device.type, model.config.hidden_size)
    for batch in token_batches(lengths, 0, size.tokens):  # of as many tokens as the product's
        width, most = max(lengths[index] for index in batch), max(len(answers[requests[index][1]]) for index in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for place, index in enumerate(batch):
            row, label = requests[index]
            ids[place, : lengths[index]] = torch.tensor((rows[row].prompt_ids + answers[label])[:-1])
        keep = 0 if all_logits else width - min(lengths[index] for index in batch) + most
        given = instruction.expand(len(batch), -1)
        logits = model(
            input_ids=ids.to(instruction.device), instruction_ids=given, logits_to_keep=keep, use_cache=False
        ).logits
        first = width - logits.shape[1]
        for place, index in enumerate(batch):
            row, label = requests[index]
            end = lengths[index] - first
            own = logits[place, end - len(answers[label]) : end].float().log_softmax(dim=-1)
            wanted = torch.tensor(answers[label], device=own.device).unsqueeze(1)
            scores[row, label] = own.gather(1, wanted).double().sum().item()
    return scores


def _apart(setting: Setting, folder: Path, shape: str, task: Task) -> float:
    """Return the largest difference between the two ways' scores in float32, the adapter's update not zero."""
    stages, batches = _scoring(setting, folder / "float32", shape, queryable(), task, "float32")
    module, rows = stages.module, stages.data[0]._encoded["test"].rows
    for name, parameter in module.named_parameters():
        if "queryable_B" in name:
            parameter.normal_(std=0.02)
    instruction = _instruction(module, task)
    candidates: LabelTree = batches[0]["label_tree"]
    answers = [candidates.ids_L[candidates.segment_L == index].tolist() for index in range(len(LABELS))]
    expected = _one_by_one(module.model, rows, answers, instruction, all_logits=False)
    apart = 0.0
    for batch in batches:
        found = label_log_likelihoods(module.model, batch["forward"], candidates)
        places = [row["row"] for row in batch["rows"]]
        apart = max(apart, (found - expected[places]).abs().max().item())
    return apart


# -- routes -----------------------------------------------------------------------------------------------------------


def recording(setting: Setting, folder: Path, shape: str) -> Iterator[Result]:
    """Time scoring with routes recorded and summed up, as in every run, against scoring alone."""
    task = RandomText(_lengths(setting, 12, 240), LABELS[:4], seed=setting.seed)
    stages, batches = _scoring(setting, folder / "routes", shape, queryable(), task)
    module = stages.module
    recorders = [each for each in stages.recorders if isinstance(each, (RouteRecorder, TokenRecorder))]

    @torch.inference_mode()  # as Lightning tests
    def on() -> None:
        for recorder in recorders:
            recorder.begin(stages.context(1, stages.data))
        for index, batch in enumerate(batches):
            outcome = score_batch(module, task, batch)
            for recorder in recorders:
                recorder.on_test_batch_end(None, module, outcome, batch, index)  # type: ignore[arg-type]

    @torch.inference_mode()
    def off() -> None:
        for batch in batches:
            evaluate._rank_labels(module, task, batch)

    stand = Stand(setting.device)
    stand.add("on", lambda: on, warm_up=1)
    stand.add("off", lambda: off, warm_up=1)
    timings = stand.run(setting.num_rounds(11))
    detail = {"shape": shape, "rows": len(task.lengths), "labels": 4, "backbone_dtype": backbone_dtype(setting)}
    detail |= timings.detail()
    yield Result(
        "scoring", f"{shape} recording routes", "seconds / without", **timings.ratio("on", "off"), goal="<= 1.03",
        detail=detail,
    )  # fmt: skip


# -- several tasks ----------------------------------------------------------------------------------------------------


def ten_tasks(setting: Setting, folder: Path, shape: str) -> Iterator[Result]:
    """Time the product's scoring of ten small label tasks, which share passes, against passes of one task each."""
    lengths = _lengths(setting, 3, 60)
    tasks = [RandomText(lengths, LABELS[:4], seed=setting.seed + index) for index in range(10)]
    module = ContinualModule(ShapedLM(shape, setting.seed, backbone_dtype(setting)), queryable())
    stages = sequence(setting, folder / "tasks", module, tasks, {})

    def score(together: bool) -> Callable[[], None]:
        def run() -> None:
            with patch.object(stage_data, "scoring_size", lambda *of: scoring_size(*of)._replace(shared=together)):
                for recorder in stages.recorders:
                    recorder.begin(stages.context(0, stages.data))
                stages._score(0, stages.experiment.make_trainer(None, folder, stages.recorders), stages.data)

        return run

    stand = Stand(setting.device)
    stand.add("together", lambda: score(True), warm_up=1)
    stand.add("apart", lambda: score(False), warm_up=1)
    timings = stand.run(setting.num_rounds(7))
    detail = {"shape": shape, "tasks": 10, "rows": 10 * len(lengths), "backbone_dtype": backbone_dtype(setting)}
    case, ratio = f"{shape} ten tasks", timings.ratio("together", "apart")
    yield Result("scoring", case, "seconds / tasks' apart", **ratio, detail=detail | timings.detail())


# -- a growing bank ---------------------------------------------------------------------------------------------------


def rows_of_ten_stages(setting: Setting, folder: Path, shape: str) -> Iterator[Result]:
    """Time batches whose rows go to each of ten stages of a growing bank, against one stage for all of them."""
    num_stages = 10
    task = RandomText(_lengths(setting, 20, 240), LABELS[:4], seed=setting.seed)
    stages, batches = _scoring(setting, folder / "stages", shape, queryable(), task)
    model = cast(Any, stages.module.model)
    grow(model, num_stages)
    model.to(setting.device)
    bank = model.base_model.growing
    bank.in_use, bank.gate.stages = None, {name: SimpleNamespace(adapters=[name]) for name in bank.names}

    def score(spread: int) -> Callable[[], None]:
        def choose(features: Tensor, *given: Any) -> Tensor:
            return torch.arange(len(features), device=setting.device) % spread

        @torch.inference_mode()
        def run() -> None:
            with patch.object(bank.gate, "choose", choose):
                for batch in batches:
                    features = torch.zeros(len(batch["rows"]), 1, device=setting.device)
                    label_log_likelihoods(model, batch["forward"] | {"row_features": features}, batch["label_tree"])

        return run

    stand = Stand(setting.device)
    for spread in (1, num_stages):
        stand.add(f"{spread}", lambda spread=spread: score(spread), warm_up=1)
    timings = stand.run(setting.num_rounds(7))
    detail = {"shape": shape, "rows": len(task.lengths), "backbone_dtype": backbone_dtype(setting)} | timings.detail()
    case, ratio = f"{shape} rows of ten stages", timings.ratio(f"{num_stages}", "1")
    yield Result("scoring", case, "seconds / rows' of one stage", **ratio, detail=detail)


# -- free answers -----------------------------------------------------------------------------------------------------


def free_answers(setting: Setting, folder: Path, shape: str) -> Iterator[Result]:
    """Time our free answers, by a cache that grows and by a static one, against ``generate`` with plain LoRA.

    The static cache comes with recorded steps, as ``model.cuda_graphs`` has it; on a CPU, which records none, bare.
    """
    new_tokens = setting.pick(64, 16, 8)
    task = RandomText(_lengths(setting, 4, 80), answer_length=new_tokens - 2, seed=setting.seed)  # a space, an end mark
    ours, batches = _scoring(setting, folder / "ours", shape, queryable(), task)
    theirs, _ = _scoring(setting, folder / "theirs", shape, lora(), task)
    record = None if setting.cuda else lambda step: step  # a CUDA graph by default
    texts: dict[str, list[str]] = {}

    @torch.inference_mode()  # as Lightning tests
    def answer() -> None:
        outcomes = [score_batch(ours.module, task, batch, new_tokens) for batch in batches]
        texts["ours"] = [text for outcome in outcomes for text in outcome.predictions]

    def generate_static(*args: Any, **kwargs: Any) -> Tensor:
        return generate_recorded(*args, **kwargs, record=record)

    def answer_static() -> None:
        with patch.object(module_file, "generate", generate_static):
            answer()
        texts["static"] = texts["ours"]

    @torch.inference_mode()
    def answer_by_lora() -> None:
        model: Any = theirs.module.model
        for batch in batches:
            inputs = {name: batch["forward"][name] for name in ("input_ids", "attention_mask")}
            model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

    stand = Stand(setting.device)
    subjects = {"ours, static cache": answer_static, "ours": answer, "lora": answer_by_lora}
    for name, subject in subjects.items():
        stand.add(name, lambda subject=subject: subject, warm_up=1)
    same = statistics.fmean(a == b for a, b in zip(texts["ours"], texts["static"], strict=True))
    timings = stand.run(setting.num_rounds(9))
    tokens = len(task.lengths) * new_tokens
    detail = {"shape": shape, "rows": len(task.lengths), "new_tokens": new_tokens, "recorded": setting.cuda}
    detail |= {"backbone_dtype": backbone_dtype(setting), "same_answers": same} | timings.detail()
    detail["tokens_a_second"] = {name: tokens / timings.median(name) for name in subjects}
    case = f"{shape} free answers"
    for name, goal in (("ours", ">= 0.9"), ("ours, static cache", ">= 0.9" if setting.cuda else None)):
        kind = name.removeprefix("ours").removeprefix(", ")
        measure = f"tokens a second / generate with LoRA{kind and f' ({kind})'}"
        yield Result("scoring", case, measure, **timings.ratio("lora", name), goal=goal, detail=detail)

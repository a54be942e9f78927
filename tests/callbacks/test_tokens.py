"""The sample of tokens against plain passes over the prompts, and its being the same however it is come by."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contexts import context
from peft import LoraConfig

from continual.adapters import MoeLoraConfig
from continual.callbacks import TokenRecorder
from continual.callbacks.tokens import hashed
from continual.data.stage_data import StageData
from continual.storage import records
from continual.storage.records import SCHEMAS
from continual.training.module import ContinualModule


def record(
    run_test: Any, module: ContinualModule, stages: list[StageData], num_tokens: int, stage: int = 1, last: int = 1
) -> list[dict[str, Any]]:
    """Return the rows of a sample after ``stage`` of ``last``; the tasks were trained in stages 1, 2 ..."""
    recorder = TokenRecorder(num_tokens)
    recorder.begin(context(stage, stages, seed=3, last=last))
    run_test(module, stages, recorder)
    return recorder.rows


def needed(data: StageData, num_tokens: int) -> set[int]:
    """Return the rows that a recorder says it needs, all else unknown."""
    recorder = TokenRecorder(num_tokens)
    recorder.begin(context(1, [data], seed=3))
    return recorder.needed_rows(data)


def test_a_sample_of_all_tokens_is_the_routes_of_plain_passes(make_module, make_data, run_test, tmp_path: Path) -> None:
    module = make_module()
    data = make_data(module, "labels", "one", 7, "Say yes or no.", eval_batch_tokens=200)
    assert len(data.test_dataloader()) > 1
    rows = record(run_test, module, [data], 10_000)
    backbone: Any = module.backbone
    instruction = torch.tensor([backbone.encode_instruction(data.task.instruction)])
    found: dict[tuple[int, ...], float] = {(r["row"], r["place"], r["block"], r["atom"]): r["value"] for r in rows}
    expected: dict[tuple[int, ...], float] = {}
    said = {(row["row"], row["place"]): (row["before"], row["token"]) for row in rows}
    for source in data.task.rows("test").to_list():
        ids, _ = backbone.encode_prompt(data.task.instruction, source["context"], source["question"], data.max_tokens)
        with torch.inference_mode(), module.tuner.record_routes() as passes:  # type: ignore[union-attr]
            module.model.eval()(input_ids=torch.tensor([ids]), instruction_ids=instruction)  # type: ignore[misc]
        routes = torch.stack(passes[0]["default"]).squeeze(1)  # (N, T, M)
        for block, place, atom in routes.nonzero().tolist():
            expected[source["row"], place, block, atom] = routes[block, place, atom].item()
        for place, token in enumerate(ids):
            before, text = said[source["row"], place]
            assert text == backbone.tokenizer.decode([token])
            assert before == backbone.tokenizer.decode(ids[max(0, place - 12) : place])
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), atol=1e-5)
    assert all(set(row) == set(SCHEMAS["tokens"].names) for row in rows)
    records.append(tmp_path, "tokens", rows)
    assert len(records.read(tmp_path, "tokens")) == len(rows)


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_sample_is_as_large_as_asked_for_and_the_same_in_any_batches(
    num_tokens: int, make_module, make_data, run_test
) -> None:
    module = make_module()
    samples = []
    for most in (1, 200, 10_000):
        data = make_data(module, "free", "one", 9, eval_batch_tokens=most)
        rows = record(run_test, module, [data], num_tokens)
        samples.append([(r["row"], r["place"], r["block"], r["atom"], r["token"], r["before"]) for r in rows])
        places = {(row["row"], row["place"]) for row in rows}
        assert len(places) == num_tokens and needed(data, num_tokens) == {row for row, _ in places}
        assert sum(row["value"] for row in rows) == pytest.approx(2 * num_tokens, abs=1e-4)  # two blocks
    assert samples[0] == samples[1] == samples[2]


def test_a_task_is_sampled_after_its_own_stage_and_the_last(make_module, make_data, run_test) -> None:
    module = make_module()
    stages = [make_data(module, "labels", name, 4, seed=seed) for seed, name in enumerate(("one", "two", "three"))]
    seen = {}
    for stage in range(5):
        rows = record(run_test, module, stages, 5, stage, last=4)
        seen[stage] = sorted({row["task"] for row in rows})
        assert {row["stage"] for row in rows} <= {stage}
    assert seen == {0: [], 1: ["one"], 2: ["two"], 3: ["three"], 4: ["one", "three", "two"]}
    again = [record(run_test, module, stages, 5, stage, last=4) for stage in (1, 4)]
    first, last = ({(r["row"], r["place"]) for r in rows if r["task"] == "one"} for rows in again)
    assert first == last  # the same tokens, so that what moved can be seen


@pytest.mark.parametrize("case", ["none", "lora", "experts", "numbers"])
def test_nothing_is_kept_where_there_is_nothing_to_keep(case: str, make_module, make_data, run_test) -> None:
    adapters = {"lora": LoraConfig(target_modules=["q_proj"]), "experts": MoeLoraConfig(target_modules=["q_proj"])}
    kind = "regression" if case == "numbers" else "causal_lm"
    module = make_module(kind, adapters.get(case))
    data = make_data(module, "regression" if case == "numbers" else "labels", "one", 4)
    assert record(run_test, module, [data], 0 if case == "none" else 5) == []
    if case in ("none", "numbers"):
        assert needed(data, 0 if case == "none" else 5) == set()


def test_hashes_are_apart_and_even() -> None:
    row, place = (part.ravel() for part in np.meshgrid(np.arange(200), np.arange(300)))
    hashes = hashed(row, place)
    assert len(np.unique(hashes)) == len(hashes)
    lowest = np.argsort(hashes)[:6000]
    for part, size in ((row, 200), (place, 300)):
        counts = np.bincount(part[lowest], minlength=size)
        assert abs(counts - 6000 / size).max() < 6 * (6000 / size) ** 0.5
    assert max(Counter(hashes % np.uint64(7)).values()) < 1.05 * len(hashes) / 7

"""Recorded routes against plain passes over unpadded prompts, and what is computed from them against numpy."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contexts import context
from peft import LoraConfig

from continual.callbacks import RouteRecorder
from continual.data.stage_data import StageData
from continual.measures.distances import js_divergence, kl_divergence, total_variation
from continual.scoring.outcome import Outcome
from continual.storage import records
from continual.storage.records import SCHEMAS
from continual.training.module import ContinualModule

KEYS = {"run": "r", "seed": 3}
BLOCKS, ATOMS = 2, 5


def plain_routes(module: ContinualModule, data: StageData) -> dict[int, np.ndarray]:
    """Return each test row's routes, row -> (N, T, M), from a pass over its prompt alone, without padding or labels."""
    assert module.model is not None
    assert module.tuner is not None
    backbone: Any = module.backbone
    instruction = torch.tensor([backbone.encode_instruction(data.task.instruction) or [-1]])
    routes = {}
    for row in data.task.rows("test").to_list():
        ids, _ = backbone.encode_prompt(data.task.instruction, row["context"], row["question"], data.max_tokens)
        with torch.inference_mode(), module.tuner.record_routes() as passes:
            module.model.eval()(input_ids=torch.tensor([ids]), instruction_ids=instruction)
        routes[row["row"]] = torch.stack(passes[0]["default"]).squeeze(1).double().numpy()
    return routes


def pooled(routes: dict[int, np.ndarray], rows: Any = None) -> np.ndarray:
    """Return the usage of some rows, (N, M): the mean over their tokens."""
    return np.concatenate([routes[row] for row in (routes if rows is None else rows)], axis=1).mean(axis=1)


def entropies(p: np.ndarray) -> np.ndarray:
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(axis=-1)


def found(recorder: RouteRecorder, table: str, metric: str, **columns: Any) -> list[dict[str, Any]]:
    wanted = columns | {"metric": metric}
    return [row for row in recorder.tables[table] if all(row[name] == value for name, value in wanted.items())]


def by_block(recorder: RouteRecorder, table: str, metric: str, **columns: Any) -> np.ndarray:
    """Return a metric's value in each block, after checking that block -1 holds their mean."""
    rows = found(recorder, table, metric, **columns)
    values = {row["block"]: row["value"] for row in rows}
    assert len(rows) == len(values) == BLOCKS + 1
    blocks = np.array([values[block] for block in range(BLOCKS)])
    np.testing.assert_allclose(values[-1], blocks.mean(), rtol=1e-12)
    return blocks


def start(recorder: RouteRecorder, stage: int, stages: list[StageData]) -> None:
    recorder.begin(context(stage, stages, seed=3))


def move(module: ContinualModule) -> None:
    """Change every adapter weight a little, as training would."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def scored(make_module, make_data, run_test) -> Any:
    """A module, three tasks and a recorder that scored them after stages 0, 1 and 2, with usages by hand; to read."""
    module = make_module()
    stages = [
        make_data(module, "labels", "one", 9, "Say yes or no.", seed=1, eval_batch_tokens=200),
        make_data(module, "free", "two", 7, "", seed=2, eval_batch_tokens=200),
        make_data(module, "labels", "three", 5, "Pick one of the labels.", seed=3),
    ]
    recorder, tables, by_hand, usages = RouteRecorder(), {}, [], {}
    for stage in range(3):
        start(recorder, stage, stages)
        run_test(module, stages, recorder)
        tables[stage], usages[stage] = recorder.tables, recorder.usage[stage]
        by_hand.append([plain_routes(module, data) for data in stages])
        move(module)
    return module, stages, recorder, tables, by_hand, usages


def test_usage_is_that_of_plain_passes_over_the_prompts_alone(scored: Any) -> None:
    _, stages, _, tables, by_hand, usages = scored
    for stage in range(3):
        for data, routes in zip(stages, by_hand[stage], strict=True):
            usage = usages[stage][data.name]
            assert usage.shape == (BLOCKS, ATOMS)
            np.testing.assert_allclose(usage, pooled(routes), atol=1e-5)
            np.testing.assert_allclose(usage.sum(axis=1), 1.0, atol=1e-6)
    assert len(stages[0].test_dataloader()) > 1 < len(stages[1].test_dataloader())
    rows = {row["task"]: row for row in tables[1]["routing"]}
    for data, routes in zip(stages, by_hand[1], strict=True):
        assert rows[data.name]["count"] == sum(route.shape[1] for route in routes.values())


def test_usage_rows(scored: Any) -> None:
    _, stages, recorder, *_ = scored
    for data in stages:
        rows = found(recorder, "routing", "usage", task=data.name)
        assert [(row["block"], row["atom"]) for row in rows] == [(b, m) for b in range(BLOCKS) for m in range(ATOMS)]
        np.testing.assert_array_equal([row["value"] for row in rows], recorder.usage[2][data.name].ravel())
        for block in range(BLOCKS):
            assert sum(row["value"] for row in rows if row["block"] == block) == pytest.approx(1.0, abs=1e-6)


def test_entropies(scored: Any) -> None:
    _, stages, recorder, _, by_hand, _ = scored
    for data, routes in zip(stages, by_hand[2], strict=True):
        tokens = np.concatenate(list(routes.values()), axis=1)
        usage = by_block(recorder, "routing", "usage_entropy_nats", task=data.name, atom=-1)
        np.testing.assert_allclose(usage, entropies(tokens.mean(axis=1)), atol=1e-5)
        token = by_block(recorder, "routing", "token_entropy_nats", task=data.name, atom=-1)
        np.testing.assert_allclose(token, entropies(tokens).mean(axis=1), atol=1e-5)
        assert (token < usage).all()


def test_separation_and_its_split_half_null(scored: Any) -> None:
    _, stages, recorder, _, by_hand, _ = scored
    routes = {data.name: found for data, found in zip(stages, by_hand[2], strict=True)}
    golden = (math.sqrt(5) - 1) / 2
    for task in routes:
        for other in routes:
            pair = {"task": task, "other": other}
            if task != other:
                first, second = recorder.usage[2][task], recorder.usage[2][other]
                expected = {"js": js_divergence(first, second), "kl": kl_divergence(first, second)}
                assert not found(recorder, "separation", "js_split_half", **pair)
            else:
                sides = [[row for row in routes[task] if (row * golden % 1 < 0.5) == side] for side in (False, True)]
                assert min(map(len, sides)) >= 2
                first, second = (pooled(routes[task], rows) for rows in sides)
                expected = {
                    "js_split_half": js_divergence(first, second),
                    "kl_split_half": kl_divergence(first, second),
                }
                assert not found(recorder, "separation", "js", **pair)
            for metric, values in expected.items():
                np.testing.assert_allclose(
                    by_block(recorder, "separation", metric, **pair), values, rtol=1e-3, atol=1e-6
                )
            assert len(recorder.tables["separation"]) == 9 * 2 * (BLOCKS + 1)


def test_drift_against_the_stage_before_and_the_stage_that_trained(scored: Any) -> None:
    _, _, recorder, tables, *_ = scored
    assert tables[0]["drift"] == []
    references = {(row["task"], row["reference"], row["reference_stage"]) for row in tables[1]["drift"]}
    assert references == {(task, "previous", 0) for task in ("one", "two", "three")}
    references = {(row["task"], row["reference"], row["reference_stage"]) for row in tables[2]["drift"]}
    assert references == {("one", "trained", 1)} | {(task, "previous", 1) for task in ("one", "two", "three")}
    for task in ("one", "two", "three"):
        now, then = recorder.usage[2][task], recorder.usage[1][task]
        assert np.abs(now - then).max() > 0.01
        expected = {"js": js_divergence, "kl": kl_divergence, "tv": total_variation}
        for metric, distance in expected.items():
            values = by_block(recorder, "drift", metric, task=task, reference="previous")
            np.testing.assert_array_equal(values, distance(now, then))
            if task == "one":
                np.testing.assert_array_equal(
                    by_block(recorder, "drift", metric, task=task, reference="trained"), values
                )


def test_rows_fit_their_tables(scored: Any, tmp_path: Path) -> None:
    for tables in scored[3].values():
        for table, rows in tables.items():
            assert all(set(row) == set(SCHEMAS[table].names) for row in rows)
            records.append(tmp_path, table, rows)
    assert sorted(records.read(tmp_path, "drift")["stage"].unique()) == [1, 2]


def test_usages_restored_from_parquet_give_the_same_drift(scored: Any, run_test, tmp_path: Path) -> None:
    module, stages, recorder, tables, _, usages = scored
    recorder = copy.deepcopy(recorder)
    for stage in range(3):
        records.append(tmp_path, "routing", tables[stage]["routing"])
    restored = RouteRecorder()
    restored.restore(records.read(tmp_path, "routing"))
    assert set(restored.usage) == {0, 1, 2}
    for stage, task in ((stage, data.name) for stage in range(3) for data in stages):
        np.testing.assert_array_equal(restored.usage[stage][task], usages[stage][task])
    for each in (recorder, restored):
        start(each, 3, stages)
        run_test(module, stages, each)
    assert {row["reference"] for row in restored.tables["drift"]} == {"previous", "trained"}
    assert restored.tables == recorder.tables
    for each in (recorder, restored):  # what no later stage is compared with is gone
        kept = {(stage, task) for stage, usage in each.usage.items() for task in usage}
        assert kept == {(1, "one"), *((stage, task) for stage in (2, 3) for task in ("one", "two", "three"))}


def test_scoring_twice_gives_the_same_bits(scored: Any, run_test) -> None:
    module, stages, *_ = scored
    usages = []
    for _ in range(2):
        recorder = RouteRecorder()
        start(recorder, 0, stages)
        run_test(module, stages, recorder)
        usages.append(recorder.usage[0])
    for task in usages[0]:
        np.testing.assert_array_equal(usages[0][task], usages[1][task])


def test_batches_make_no_difference(scored: Any, make_data, run_test) -> None:
    module, stages, *_ = scored
    usages = []
    for most in (1, 10_000):
        data = make_data(module, "labels", "one", 9, seed=1, eval_batch_tokens=most)
        recorder = RouteRecorder()
        start(recorder, 0, [data])
        run_test(module, [data], recorder)
        usages.append(recorder.usage[0]["one"])
    np.testing.assert_allclose(usages[0], usages[1], atol=1e-6)


def test_routes_come_from_the_pass_that_scores(make_module, make_data, run_test) -> None:
    module = make_module()
    stages = [
        make_data(module, "labels", "one", eval_batch_tokens=200),
        make_data(module, "labels", "two", seed=2, eval_batch_tokens=200),
    ]
    passes = []
    module.model.base_model.model.register_forward_hook(lambda *_: passes.append(1))
    recorder = RouteRecorder()
    start(recorder, 0, stages)
    run_test(module, stages, recorder)
    num_batches = [len(data.test_dataloader()) for data in stages]
    assert min(num_batches) > 1
    assert len(passes) == sum(num_batches)
    assert set(recorder.usage[0]) == {"one", "two"}


def test_a_regression_row_is_one_token(make_module, make_data, run_test) -> None:
    module = make_module("regression")
    data = make_data(module, "regression", "f", 20, eval_batch_tokens=6)
    recorder = RouteRecorder()
    start(recorder, 0, [data])
    run_test(module, [data], recorder)
    x = torch.tensor([row["x"] for row in data.task.rows("test").to_list()])
    with torch.inference_mode(), module.tuner.record_routes() as passes:
        module.model(x=x)
    expected = torch.stack(passes[0]["default"]).mean(dim=1).numpy()
    np.testing.assert_allclose(recorder.usage[0]["f"], expected, atol=1e-6)
    assert {row["count"] for row in recorder.tables["routing"]} == {20}


def test_plain_lora_writes_no_routing_rows(make_module, make_data, run_test) -> None:
    module = make_module(adapter=LoraConfig(target_modules=["q_proj"]))
    stages = [make_data(module, "labels", "one", 3), make_data(module, "free", "two", 3)]
    recorder = RouteRecorder()
    start(recorder, 1, stages)
    run_test(module, stages, recorder)
    assert recorder.tables == {"routing": [], "separation": [], "drift": []}
    assert recorder.usage == {}


def outcome(route: list[list[float]], mask: list[int], row: int) -> Outcome:
    """Return a row's outcome with one block's routes given."""
    return Outcome([row], [1.0], [""], [""], routes=torch.tensor([[route]]), prompt_mask=torch.tensor([mask]))


def test_sums_by_hand() -> None:
    recorder: Any = RouteRecorder()
    task: Any = type("Data", (), {"name": "t"})
    start(recorder, 0, [task])
    # Row 0 and row 1 fall into different halves; the first token of row 1 is padding.
    batches = [
        outcome([[1.0, 0.0], [0.5, 0.5]], [1, 1], 0),
        outcome([[0.0, 1.0], [0.0, 1.0], [0.25, 0.75]], [0, 1, 1], 1),
    ]
    for batch in batches:
        recorder.on_test_batch_end(None, None, batch, None, 0)
    recorder.on_test_epoch_end(None, None)
    np.testing.assert_allclose(recorder.usage[0]["t"], [[1.75 / 4, 2.25 / 4]])
    (null,) = found(recorder, "separation", "js_split_half", block=0)
    assert null["value"] == pytest.approx(float(js_divergence([0.75, 0.25], [0.125, 0.875])), rel=1e-6)
    (token,) = found(recorder, "routing", "token_entropy_nats", block=0)
    expected = (math.log(2) - 0.25 * math.log(0.25) - 0.75 * math.log(0.75)) / 4
    assert token["value"] == pytest.approx(expected, rel=1e-6)
    assert token["count"] == 4


def test_one_row_has_no_split_half() -> None:
    recorder: Any = RouteRecorder()
    start(recorder, 0, [type("Data", (), {"name": "t"})])  # type: ignore[list-item]
    recorder.on_test_batch_end(None, None, outcome([[0.5, 0.5]], [1], 0), None, 0)
    recorder.on_test_epoch_end(None, None)
    assert all(math.isnan(row["value"]) for row in recorder.tables["separation"])
    np.testing.assert_allclose(recorder.usage[0]["t"], [[0.5, 0.5]])


def test_a_bank_that_grew_is_compared_with_absent_atoms_unused() -> None:
    recorder: Any = RouteRecorder()
    task: Any = type("Data", (), {"name": "t"})
    for stage, route in enumerate(([0.5, 0.5], [0.5, 0.25, 0.25])):
        start(recorder, stage, [task])
        recorder.on_test_batch_end(None, None, outcome([route], [1], 0), None, 0)
        recorder.on_test_epoch_end(None, None)
    (row,) = found(recorder, "drift", "tv", block=0)
    assert row["value"] == pytest.approx(0.25)

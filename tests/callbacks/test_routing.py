"""Recorded routes against plain passes over unpadded prompts, and what is computed from them against numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from contexts import context
from peft import LoraConfig

from analysis.runs import distances
from continual.callbacks import RouteRecorder
from continual.data.stage_data import StageData
from continual.measures.distances import js_divergence, kl_divergence, total_variation
from continual.scoring.outcome import Outcome
from continual.storage import records
from continual.storage.records import SCHEMAS
from continual.training.module import ContinualModule

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


class Recording:
    """What a recorder wrote, stage after stage, and the distances that are derived from it."""

    def __init__(self, recorder: RouteRecorder, names: list[str]) -> None:
        self.recorder, self.names = recorder, names
        self.usage: dict[int, dict[str, np.ndarray]] = {}
        self._written: dict[str, list[dict[str, Any]]] = {"routing": [], "usage_halves": []}

    def end(self, stage: int) -> None:
        """Take up the tables of a stage."""
        self.usage[stage] = self.recorder.usage
        for table, rows in self.recorder.tables().items():
            self._written[table] += rows

    def frame(self, table: str) -> pd.DataFrame:
        """Return a table of all stages so far."""
        routing, halves = (pd.DataFrame(self._written[name], columns=SCHEMAS[name].names) for name in self._written)
        derived = {
            "separation": lambda: distances.separation(routing, halves),
            "drift": lambda: distances.drift(routing, self.names),
        }
        return derived[table]() if table in derived else {"routing": routing, "usage_halves": halves}[table]

    def rows(self, table: str, stage: int | None = None) -> list[dict[str, Any]]:
        """Return the rows of a stage, the last one by default."""
        frame = self.frame(table)
        wanted: Any = frame[frame["stage"] == (max(self.usage) if stage is None else stage)]
        return wanted.to_dict("records")


def found(recording: Recording, table: str, metric: str, **columns: Any) -> list[dict[str, Any]]:
    wanted = columns | {"metric": metric}
    return [row for row in recording.rows(table) if all(row[name] == value for name, value in wanted.items())]


def by_block(recording: Recording, table: str, metric: str, **columns: Any) -> np.ndarray:
    """Return a metric's value in each block, after checking that block -1 holds their mean."""
    rows = found(recording, table, metric, **columns)
    values = {row["block"]: row["value"] for row in rows}
    assert len(rows) == len(values) == BLOCKS + 1
    blocks = np.array([values[block] for block in range(BLOCKS)])
    np.testing.assert_allclose(values[-1], blocks.mean(), rtol=1e-12)
    return blocks


def start(recorder: RouteRecorder, stage: int, stages: list[Any]) -> None:
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
    recorder, by_hand = RouteRecorder(), []
    recording = Recording(recorder, [data.name for data in stages])
    for stage in range(3):
        start(recorder, stage, stages)
        run_test(module, stages, recorder)
        recording.end(stage)
        by_hand.append([plain_routes(module, data) for data in stages])
        move(module)
    return module, stages, recording, by_hand


def test_usage_is_that_of_plain_passes_over_the_prompts_alone(scored: Any) -> None:
    _, stages, recording, by_hand = scored
    for stage in range(3):
        for data, routes in zip(stages, by_hand[stage], strict=True):
            usage = recording.usage[stage][data.name]
            assert usage.shape == (BLOCKS, ATOMS)
            np.testing.assert_allclose(usage, pooled(routes), atol=1e-5)
            np.testing.assert_allclose(usage.sum(axis=1), 1.0, atol=1e-6)
    assert len(stages[0].test_dataloader()) > 1 < len(stages[1].test_dataloader())
    rows = {row["task"]: row for row in recording.rows("routing", 1)}
    for data, routes in zip(stages, by_hand[1], strict=True):
        assert rows[data.name]["count"] == sum(route.shape[1] for route in routes.values())


def test_usage_rows(scored: Any) -> None:
    _, stages, recording, _ = scored
    for data in stages:
        rows = found(recording, "routing", "usage", task=data.name)
        assert [(row["block"], row["atom"]) for row in rows] == [(b, m) for b in range(BLOCKS) for m in range(ATOMS)]
        np.testing.assert_array_equal([row["value"] for row in rows], recording.usage[2][data.name].ravel())
        for block in range(BLOCKS):
            assert sum(row["value"] for row in rows if row["block"] == block) == pytest.approx(1.0, abs=1e-6)


def test_entropies(scored: Any) -> None:
    _, stages, recording, by_hand = scored
    for data, routes in zip(stages, by_hand[2], strict=True):
        tokens = np.concatenate(list(routes.values()), axis=1)
        usage = by_block(recording, "routing", "usage_entropy_nats", task=data.name, atom=-1)
        np.testing.assert_allclose(usage, entropies(tokens.mean(axis=1)), atol=1e-5)
        token = by_block(recording, "routing", "token_entropy_nats", task=data.name, atom=-1)
        np.testing.assert_allclose(token, entropies(tokens).mean(axis=1), atol=1e-5)
        assert (token < usage).all()


def test_separation_and_its_split_half_null(scored: Any) -> None:
    _, stages, recording, by_hand = scored
    routes = {data.name: found for data, found in zip(stages, by_hand[2], strict=True)}
    golden = (math.sqrt(5) - 1) / 2
    for task in routes:
        for other in routes:
            pair = {"task": task, "other": other}
            if task != other:
                first, second = recording.usage[2][task], recording.usage[2][other]
                expected = {"js": js_divergence(first, second), "kl": kl_divergence(first, second)}
                assert not found(recording, "separation", "js_split_half", **pair)
            else:
                sides = [[row for row in routes[task] if (row * golden % 1 < 0.5) == side] for side in (False, True)]
                assert min(map(len, sides)) >= 2
                first, second = (pooled(routes[task], rows) for rows in sides)
                expected = {
                    "js_split_half": js_divergence(first, second),
                    "kl_split_half": kl_divergence(first, second),
                }
                assert not found(recording, "separation", "js", **pair)
            for metric, values in expected.items():
                np.testing.assert_allclose(
                    by_block(recording, "separation", metric, **pair), values, rtol=1e-3, atol=1e-6
                )
            assert len(recording.rows("separation")) == 9 * 2 * (BLOCKS + 1)


def test_drift_against_the_stage_before_and_the_stage_that_trained(scored: Any) -> None:
    _, _, recording, _ = scored
    assert recording.rows("drift", 0) == []
    references = {(row["task"], row["reference"], row["reference_stage"]) for row in recording.rows("drift", 1)}
    assert references == {(task, "previous", 0) for task in ("one", "two", "three")}
    references = {(row["task"], row["reference"], row["reference_stage"]) for row in recording.rows("drift", 2)}
    assert references == {("one", "trained", 1)} | {(task, "previous", 1) for task in ("one", "two", "three")}
    for task in ("one", "two", "three"):
        now, then = recording.usage[2][task], recording.usage[1][task]
        assert np.abs(now - then).max() > 0.01
        expected = {"js": js_divergence, "kl": kl_divergence, "tv": total_variation}
        for metric, distance in expected.items():
            values = by_block(recording, "drift", metric, task=task, reference="previous")
            np.testing.assert_array_equal(values, distance(now, then))
            if task == "one":
                np.testing.assert_array_equal(
                    by_block(recording, "drift", metric, task=task, reference="trained"), values
                )


def test_rows_fit_their_tables(scored: Any, tmp_path: Path) -> None:
    recording = scored[2]
    for table in ("routing", "usage_halves"):
        for stage in range(3):
            records.append(tmp_path, table, recording.rows(table, stage))
    for table in ("routing", "usage_halves", "separation", "drift"):
        assert list(recording.frame(table).columns) == SCHEMAS[table].names
    halves = records.read(tmp_path, "usage_halves")
    whole = records.read(tmp_path, "routing").query("metric == 'usage'").set_index(["stage", "task", "block", "atom"])
    counts = halves.groupby(["stage", "task", "block", "atom"], sort=False)
    mean = counts[["value", "count"]].apply(lambda own: np.average(own["value"], weights=own["count"]))
    np.testing.assert_allclose(mean, whole.loc[mean.index, "value"], rtol=1e-12)
    assert (counts["count"].sum() == whole.loc[mean.index, "count"]).all()


def test_a_task_that_was_not_scored_in_between_has_moved_since_its_own_stage() -> None:
    recorder: Any = RouteRecorder()
    first, second = (type("Data", (), {"name": name}) for name in ("a", "b"))
    recording = Recording(recorder, ["a", "b", "c"])
    for stage, (tasks, route) in enumerate([([first], [1.0, 0.0]), ([first], [0.5, 0.5]), ([second], [1.0, 0.0])]):
        start(recorder, stage, tasks)
        recorder.on_test_batch_end(None, None, outcome([route], [1], 0), None, 0)
        recorder.on_test_epoch_end(None, None)
        recording.end(stage)
    assert recording.rows("drift", 2) == []  # b was not scored before
    start(recorder, 3, [first])
    recorder.on_test_batch_end(None, None, outcome([[0.25, 0.75]], [1], 0), None, 0)
    recorder.on_test_epoch_end(None, None)
    recording.end(3)
    moved = {
        (row["reference"], row["reference_stage"]): row["value"] for row in found(recording, "drift", "tv", block=0)
    }
    assert moved == {("trained", 1): pytest.approx(0.25)}


def test_scoring_twice_gives_the_same_bits(scored: Any, run_test) -> None:
    module, stages, *_ = scored
    usages = []
    for _ in range(2):
        recorder = RouteRecorder()
        start(recorder, 0, stages)
        run_test(module, stages, recorder)
        usages.append(recorder.usage)
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
        usages.append(recorder.usage["one"])
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
    assert set(recorder.usage) == {"one", "two"}


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
    np.testing.assert_allclose(recorder.usage["f"], expected, atol=1e-6)
    assert {row["count"] for row in recorder.tables()["routing"]} == {20}


def test_plain_lora_writes_no_routing_rows(make_module, make_data, run_test) -> None:
    module = make_module(adapter=LoraConfig(target_modules=["q_proj"]))
    stages = [make_data(module, "labels", "one", 3), make_data(module, "free", "two", 3)]
    recorder = RouteRecorder()
    start(recorder, 1, stages)
    run_test(module, stages, recorder)
    assert recorder.tables() == {"routing": [], "usage_halves": []}
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
    np.testing.assert_allclose(recorder.usage["t"], [[1.75 / 4, 2.25 / 4]])
    recording = Recording(recorder, ["t"])
    recording.end(0)
    (null,) = found(recording, "separation", "js_split_half", block=0)
    assert null["value"] == pytest.approx(float(js_divergence([0.75, 0.25], [0.125, 0.875])), rel=1e-6)
    (token,) = found(recording, "routing", "token_entropy_nats", block=0)
    expected = (math.log(2) - 0.25 * math.log(0.25) - 0.75 * math.log(0.75)) / 4
    assert token["value"] == pytest.approx(expected, rel=1e-6)
    assert token["count"] == 4


def test_one_row_has_no_split_half() -> None:
    recorder: Any = RouteRecorder()
    start(recorder, 0, [type("Data", (), {"name": "t"})])  # type: ignore[list-item]
    recorder.on_test_batch_end(None, None, outcome([[0.5, 0.5]], [1], 0), None, 0)
    recorder.on_test_epoch_end(None, None)
    recording = Recording(recorder, ["t"])
    recording.end(0)
    rows = recording.rows("separation")
    assert rows and all(math.isnan(row["value"]) for row in rows)
    np.testing.assert_allclose(recorder.usage["t"], [[0.5, 0.5]])


def test_a_bank_that_grew_is_compared_with_absent_atoms_unused() -> None:
    recorder: Any = RouteRecorder()
    task: Any = type("Data", (), {"name": "t"})
    recording = Recording(recorder, ["t"])
    for stage, route in enumerate(([0.5, 0.5], [0.5, 0.25, 0.25])):
        start(recorder, stage, [task])
        recorder.on_test_batch_end(None, None, outcome([route], [1], 0), None, 0)
        recorder.on_test_epoch_end(None, None)
        recording.end(stage)
    (row,) = found(recording, "drift", "tv", block=0)
    assert row["value"] == pytest.approx(0.25)

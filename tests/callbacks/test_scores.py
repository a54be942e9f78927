"""Scores and answers of every task, against values worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from contexts import context

from continual.callbacks import ScoreRecorder
from continual.scoring.outcome import Outcome
from continual.storage.records import SCHEMAS

KEYS = {"run": "r", "seed": 3, "stage": 2}


def stage(name: str, kind: str, metric: str, generates: bool = False) -> Any:
    task = SimpleNamespace(kind=kind, metric=metric, further_scores=lambda rows, answers: {})
    return SimpleNamespace(name=name, task=task, generates=generates)


def batch_of(outcome: Outcome) -> dict[str, Any]:
    return {"rows": [{"row": row, "answer": target} for row, target in zip(outcome.rows, outcome.targets, strict=True)]}


def recorded(stages: list[Any], outcomes: list[tuple[int, Outcome]]) -> ScoreRecorder:
    """Return a recorder after some outcomes, each with its loader's index."""
    recorder: Any = ScoreRecorder()
    recorder.begin(context(2, stages, seed=3))
    for index, (loader, outcome) in enumerate(outcomes):
        recorder.on_test_batch_end(None, None, outcome, batch_of(outcome), index, loader)
    recorder.on_test_epoch_end(None, None)
    return recorder


def values(recorder: ScoreRecorder) -> dict[tuple[str, str], float]:
    return {(row["task"], row["metric"]): row["value"] for row in recorder.rows}


def test_rmse_and_r2_by_hand() -> None:
    # Errors 1, -1, 2, 0 over targets 100, 102, 104, 106: squares 6, spread about the mean 103: 9 + 1 + 1 + 9 = 20.
    outcomes = [
        Outcome([0, 1], [1.0, 1.0], ["101.0", "101.0"], [100.0, 102.0]),
        Outcome([2], [4.0], ["106.0"], [104.0]),  # a batch of one row alone has no R2
        Outcome([3], [0.0], ["106.0"], [106.0]),
    ]
    recorder = recorded([stage("f", "regression", "r2")], [(0, outcome) for outcome in outcomes])
    assert values(recorder) == {
        ("f", "r2"): pytest.approx(1 - 6 / 20, abs=1e-12),
        ("f", "rmse"): pytest.approx(math.sqrt(6 / 4), abs=1e-12),
    }
    assert {row["metric"]: row["direction"] for row in recorder.rows} == {"r2": "higher", "rmse": "lower"}
    assert {row["count"] for row in recorder.rows} == {4}
    assert recorder.headline() == {"f": pytest.approx(0.7)}


def test_label_scores_by_hand() -> None:
    stages = [stage("a", "labels", "accuracy"), stage("b", "labels", "accuracy")]
    outcomes = [
        (0, Outcome([1, 0], [1.0, 0.0], ["x", "x"], ["x", "y"], seen_values=[0.0, 0.0])),
        (0, Outcome([2], [1.0], ["x"], ["x"], seen_values=[1.0])),
        (1, Outcome([0], [1.0], ["z"], ["z"])),
    ]
    recorder = recorded(stages, outcomes)
    assert values(recorder) == {
        ("a", "accuracy"): pytest.approx(2 / 3, abs=1e-15),
        ("a", "accuracy_seen"): pytest.approx(1 / 3, abs=1e-15),
        ("b", "accuracy"): 1.0,
        ("b", "accuracy_seen"): 1.0,  # no label seen but its own
    }
    assert {(row["task"], row["count"]) for row in recorder.rows} == {("a", 3), ("b", 1)}
    assert {row["direction"] for row in recorder.rows} == {"higher"}
    assert recorder.headline() == {"a": pytest.approx(2 / 3), "b": 1.0}
    assert [(answer["task"], answer["row"]) for answer in recorder.answers] == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    assert recorder.answers[0] == KEYS | {"task": "a", "row": 0, "value": 0.0, "prediction": "x"}
    assert all(set(row) == set(SCHEMAS["scores"].names) for row in recorder.rows)
    assert all(set(row) == set(SCHEMAS["answers"].names) for row in recorder.answers)


def test_exact_match_stands_beside_the_accuracy_where_labels_are_generated_too() -> None:
    outcome = Outcome([0, 1, 2, 3], [1.0, 1.0, 1.0, 0.0], list("abcd"), list("abcx"))
    outcome.generated_values = [1.0, 0.0, 0.0, 0.0]
    recorder = recorded([stage("a", "labels", "accuracy", generates=True)], [(0, outcome)])
    assert values(recorder)["a", "exact_match"] == 0.25
    assert recorder.headline() == {"a": 0.75}


def test_free_scores_are_the_mean_of_what_the_scorer_gave() -> None:
    outcomes = [(0, Outcome([0, 1], [0.25, 1.0], ["u", "v"], ["u", "w"])), (0, Outcome([2], [0.1], ["t"], ["s"]))]
    recorder = recorded([stage("a", "free", "score")], outcomes)
    assert values(recorder) == {("a", "score"): pytest.approx(1.35 / 3, abs=1e-15)}


def test_further_scores_see_every_row_of_their_own_task_once() -> None:
    first, second = stage("a", "labels", "accuracy"), stage("b", "free", "score")
    first.task.further_scores = lambda rows, answers: {
        "right": float(sum(row["answer"] == answer for row, answer in zip(rows, answers, strict=True))),
        "rows": float(len(rows)),
    }
    outcomes = [
        (0, Outcome([0, 1], [1.0, 0.0], ["u", "v"], ["u", "w"], seen_values=[1.0, 0.0])),
        (1, Outcome([0], [1.0], ["x"], ["x"])),
        (0, Outcome([2], [1.0], ["t"], ["t"], seen_values=[1.0])),
    ]
    found = values(recorded([first, second], outcomes))
    assert (found["a", "right"], found["a", "rows"]) == (2.0, 3.0)
    assert {metric for task, metric in found if task == "b"} == {"score"}


def test_a_second_start_forgets_the_first() -> None:
    recorder: Any = recorded([stage("a", "free", "score")], [(0, Outcome([0], [1.0], ["u"], ["u"]))])
    recorder.begin(context(3, [stage("a", "free", "score")], seed=3))
    outcome = Outcome([0], [0.0], ["x"], ["u"])
    recorder.on_test_batch_end(None, None, outcome, batch_of(outcome), 0)
    recorder.on_test_epoch_end(None, None)
    assert [(row["stage"], row["value"]) for row in recorder.rows] == [(3, 0.0)]
    assert len(recorder.answers) == 1


def test_a_regression_through_the_trainer(make_module, make_data, run_test) -> None:
    module = make_module("regression")
    data = make_data(module, "regression", "f", num_rows=23, eval_batch_tokens=7)
    recorder = ScoreRecorder()
    recorder.begin(context(2, [data], seed=3))
    run_test(module, [data], recorder)
    target = np.array([row["y"] for row in data.task.rows("test").to_list()])
    predicted = np.array([float(answer["prediction"]) for answer in recorder.answers])
    assert [answer["row"] for answer in recorder.answers] == list(range(23))
    squares = (predicted - target) ** 2
    assert values(recorder) == {
        ("f", "r2"): pytest.approx(1 - squares.sum() / ((target - target.mean()) ** 2).sum(), abs=1e-9),
        ("f", "rmse"): pytest.approx(math.sqrt(squares.mean()), abs=1e-9),
    }
    np.testing.assert_allclose([answer["value"] for answer in recorder.answers], squares, rtol=1e-4, atol=1e-7)


def test_two_tasks_of_unlike_kind_through_the_trainer(make_module, make_data, run_test) -> None:
    module = make_module()
    stages = [make_data(module, "free", "a", 3, seed=1), make_data(module, "labels", "b", 5, eval_batch_tokens=150)]
    recorder = ScoreRecorder()
    recorder.begin(context(2, stages, seed=3))
    run_test(module, stages, recorder)
    assert set(values(recorder)) == {("a", "score"), ("b", "accuracy"), ("b", "accuracy_seen")}
    for data, count in zip(stages, (3, 5), strict=True):
        answers = {answer["row"]: answer for answer in recorder.answers if answer["task"] == data.name}
        rows = data.task.rows("test").to_list()
        assert len(answers) == len(rows) == count
        judged = [data.task.score_answer(row, answers[row["row"]]["prediction"]) for row in rows]
        assert recorder.headline()[data.name] == pytest.approx(sum(judged) / count)

"""The task classes as a config file and a loop over stages see them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

import tasks
from tasks.base import near_names, one_line

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("tasks.ReasoningTask", {"dataset": "aiw", "train_rows": 8, "test_rows": 4, "params": {"max_entities": 4}}),
    ("tasks.RegressionTask", {"function": "piston", "noise": 0.0, "num_inputs": 7}),
    ("tasks.TextTask", {"path": "fancyzhx/ag_news", "label_names": {0: "World", 1: "Sports"}, "train_rows": 5}),
    ("tasks.TextTask", {"train_file": "a.csv", "columns": {"question": "q", "answer": "a"}, "labels": ["x", "y"]}),
    ("tasks.TextTask", {"path": "google/boolq", "label_names": {True: "yes", False: "no"}, "test_split": ""}),
    ("tasks.TextTask", {"path": "nyu-mll/glue", "name": "sst2", "label_names": ["bad", "good"]}),
]


@pytest.mark.parametrize(("class_path", "init_args"), CONFIGS)
def test_every_task_is_built_from_a_class_path_and_round_trips(class_path: str, init_args: dict[str, Any]) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(tasks.Task, "task")
    config = parser.parse_object({"task": {"class_path": class_path, "init_args": init_args}})
    task = parser.instantiate(config).task
    assert isinstance(task, getattr(tasks, class_path.split(".")[1]))
    again = parser.parse_string(parser.dump(config))
    assert again.task.init_args == config.task.init_args
    for name in ("train_rows", "dataset", "function", "path"):
        if name in init_args:
            assert getattr(task, name) == init_args[name]


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, tasks; print([m for m in ('datasets', 'pandas', 'reasoning_gym', 'torch') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


@pytest.mark.parametrize(
    ("task", "kind", "metric"),
    [
        (tasks.ReasoningTask("aiw", train_rows=6, test_rows=3), "free", "score"),
        (tasks.RegressionTask("friedman", train_rows=6, test_rows=3), "regression", "r2"),
    ],
)
def test_description_is_plain_json_with_the_shared_facts(task: tasks.Task, kind: str, metric: str) -> None:
    if kind == "free":
        pytest.importorskip("reasoning_gym", reason="the reasoning tasks need reasoning-gym")
    facts = json.loads(json.dumps(task.description()))
    assert (facts["kind"], facts["metric"], facts["higher_is_better"]) == (kind, metric, True)
    assert (facts["train_rows"], facts["test_rows"]) == (6, 3)
    assert facts["constant_score"] == task.constant_score()
    assert {"instruction", "labels"} <= set(facts)
    first = task.rows("train")
    task.prepare()
    assert task.rows("train") is first


def test_the_same_arguments_give_the_same_rows_in_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym", reason="the reasoning tasks need reasoning-gym")
    file = tmp_path / "table.csv"
    file.write_text("input,target\n" + "".join(f"text {i},answer {i % 5}\n" for i in range(50)))
    code = f"""if True:
        import json, tasks
        names = ["family_relationships", "aiw", "syllogism", "letter_counting"]
        made = [tasks.ReasoningTask(name, train_rows=40, test_rows=20, seed=3) for name in names]
        made += [tasks.RegressionTask("otl_circuit"), tasks.TextTask({str(file)!r}, train_rows=20, test_rows=5)]
        print(json.dumps([task.rows(split).to_list() for task in made for split in ("train", "test")]))
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True
        )
        for seed in ("1", "2")
    ]
    shown = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert shown[0] == shown[1]
    assert len(json.loads(shown[0])) == 12


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(tasks.TaskError, match="no split 'validation'"):
        tasks.RegressionTask("friedman").rows("validation")  # type: ignore[arg-type]


def test_messages_stay_on_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert len(one_line("x" * 999)) == 200
    assert near_names("agnws", ["agnews", "yelp"]) == "; did you mean 'agnews'?"
    assert near_names("zzz", ["agnews"]) == ""

"""The six published orders: each file parses, has the published order, and reads rows with its sets' real columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from continual.config import experiment

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "published"
ORDERS = {
    1: "dbpedia amazon yahoo agnews",
    2: "dbpedia amazon agnews yahoo",
    3: "yahoo amazon agnews dbpedia",
    4: "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo",
    5: "multirc boolq wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo",
    6: "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic",
}
ROWS = 30
# Each set's text columns, its label column, the label's values, and what row 7 must read as: context, question, answer.
SETS: dict[str, tuple[list[str], str, range, tuple[str, str, str]]] = {
    "dbpedia": (["title", "content"], "label", range(14), ("Title: title 7\nText: content 7", "", "Natural Place")),
    "amazon": (
        ["review_title", "review_text"],
        "class_index",
        range(1, 6),
        ("Title: review_title 7\nText: review_text 7", "", "neutral"),
    ),
    "yahoo": (
        ["question_title", "question_content", "best_answer"],
        "topic",
        range(10),
        ("Question: question_title 7 question_content 7\nAnswer: best_answer 7", "", "Entertainment & Music"),
    ),
    "agnews": (["text"], "label", range(4), ("text 7", "", "Science or Technology")),
    "mnli": (
        ["premise", "hypothesis"],
        "label",
        range(3),
        ("sentence 1: premise 7\nsentence 2: hypothesis 7", "", "neutral"),
    ),
    "cb": (
        ["premise", "hypothesis"],
        "label",
        range(3),
        ("sentence 1: premise 7\nsentence 2: hypothesis 7", "", "contradiction"),
    ),
    "wic": (
        ["word", "sentence1", "sentence2"],
        "label",
        range(2),
        ("sentence1 7\nsentence2 7", "word: word 7", "True"),
    ),
    "copa": (
        ["premise", "choice1", "choice2", "question"],
        "label",
        range(2),
        ("premise 7", "Which sentence is the question 7?\nA: choice1 7\nB: choice2 7", "B"),
    ),
    "qqp": (
        ["question1", "question2"],
        "label",
        range(2),
        ("question 1: question1 7\nquestion 2: question2 7", "", "True"),
    ),
    "boolq": (["question", "passage"], "label", range(2), ("passage 7", "question 7", "True")),
    "rte": (
        ["sentence1", "sentence2"],
        "label",
        range(2),
        ("sentence 1: sentence1 7\nsentence 2: sentence2 7", "", "not entailment"),
    ),
    "imdb": (["text"], "label", range(2), ("text 7", "", "Good")),
    "yelp": (["text"], "label", range(5), ("text 7", "", "neutral")),
    "sst2": (["sentence"], "label", range(2), ("sentence 7", "", "Good")),
    "multirc": (
        ["paragraph", "question", "answer"],
        "label",
        range(2),
        ("paragraph 7", "question: question 7\ncandidate answer: answer 7", "True"),
    ),
}


def table(name: str, start: int) -> pd.DataFrame:
    texts, label, values, _ = SETS[name]
    rows = range(start, start + ROWS)
    columns: dict[str, list[Any]] = {text: [f"{text} {row}" for row in rows] for text in texts}
    return pd.DataFrame(columns | {label: [values[row % len(values)] for row in rows], "idx": list(rows)})


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a task, laid out as on the Hub: the configuration's folder, then a shard a split."""
    home = tmp_path_factory.mktemp("hub")
    for name in SETS:
        folder = home / name / name
        folder.mkdir(parents=True)
        for split, start in (("train", 0), ("test", 100), ("validation", 200), ("validation_matched", 300)):
            table(name, start).to_parquet(folder / f"{split}-00000-of-00001.parquet")
            if "name:" not in stage_text(name):
                table(name, start).to_parquet(home / name / f"{split}-00000-of-00001.parquet")
    return home


def stage_text(name: str) -> str:
    """A task as order 4 writes it, which has all fifteen."""
    text = (FOLDER / "order4.yaml").read_text(encoding="utf-8").split("stages:\n")[1]
    return text.split(f"- name: {name}\n")[1].split("\n  - name:")[0]


@pytest.mark.parametrize("number", ORDERS)
def test_a_published_order_parses_and_is_in_order(number: int) -> None:
    found = experiment.load(FOLDER / f"order{number}.yaml")
    assert [stage.name for stage in found.stages] == ORDERS[number].split()
    assert found.name.startswith(f"order{number}-")
    if number == 4:  # all tasks are in it, and defined alike in the others
        assert experiment.parse(found.resolved, "another").resolved == found.resolved
    for stage in found.stages:
        facts = vars(stage.task)
        assert (facts["train_rows"], facts["test_rows"]) == (1000, 500) and facts["instruction"].endswith(".")


def test_a_task_is_defined_alike_in_every_order() -> None:
    defined: dict[str, set[str]] = {}
    for number in ORDERS:
        text = (FOLDER / f"order{number}.yaml").read_text(encoding="utf-8").split("stages:\n  - name: ")[1]
        for stage in text.rstrip().split("\n  - name: "):
            defined.setdefault(stage.split("\n")[0], set()).add(stage)
    assert {name: len(texts) for name, texts in defined.items()} == dict.fromkeys(SETS, 1)


def test_every_column_map_reads_rows_with_the_sets_columns(copies: Path) -> None:
    paths = [f"stages.{name}.task.init_args.path={copies / name}" for name in SETS]
    found = experiment.load(FOLDER / "order6.yaml", paths)
    for stage in found.stages:
        values, expected = SETS[stage.name][2], SETS[stage.name][3]
        train, test = stage.task.rows("train").to_list(), stage.task.rows("test").to_list()
        assert len(train) == len(test) == ROWS
        assert tuple(train[7][key] for key in ("context", "question", "answer")) == expected
        assert stage.task.kind == "labels" and len(stage.task.labels or []) == len(values)
        assert {row["answer"] for row in train} == set(stage.task.labels or [])
        wanted = {"mnli": "300"}.get(stage.name, "200" if "validation" in stage_text(stage.name) else "100")
        assert wanted in test[0]["context"] + test[0]["question"]

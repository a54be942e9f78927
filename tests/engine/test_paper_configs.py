"""The paper's language model tables: every file of configs/paper reads, scores and trains on its sets' real columns.

The miniature copies are laid out as on the Hub, a folder a configuration and a shard a split, with the columns and the
value types of the data set cards.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from continual.config import experiment
from continual.storage import manifest, records
from tasks import TaskError

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "paper"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SUPERGLUE = ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]
LETTERS = "ABCD"
Row = dict[str, Any]


def gpqa(i: int) -> Row:
    wrong = {f"Incorrect Answer {k}": f"wrong {i}.{k}" for k in (1, 2, 3)}
    more = {"Explanation": "because", "Subdomain": "Optics", "High-level domain": "Physics", "Record ID": f"rec{i}"}
    return (
        {"Pre-Revision Question": f"draft {i}", "Question": f"question {i}", "Correct Answer": f"right {i}"}
        | wrong
        | more
    )


def arc(i: int) -> Row:
    keys = (list("ABCD"), list("1234"), list("ABC"), list("ABCDE"))[i % 4]
    texts = [f"choice {i}.{k}" for k in range(len(keys))]
    return {
        "id": f"M_{i}",
        "question": f"question {i}",
        "choices": {"text": texts, "label": keys},
        "answerKey": keys[i % 3],
    }


def race(i: int) -> Row:
    options = [f"option {i}.{k}" for k in range(4)]
    numbered = {"example_id": f"high{i}.txt", "article": f"article {i}", "answer": LETTERS[i % 4]}
    return numbered | {"question": f"question {i}", "options": options}


def numina(i: int) -> Row:
    end = "The claim follows." if i % 4 == 3 else f"so $\\boxed{{\\frac{{{i}}}{{2}}}}$."
    solution = f"We halve {i}, {end}"
    turns = [{"role": "user", "content": f"problem {i}"}, {"role": "assistant", "content": solution}]
    return {"source": "synthetic_math", "problem": f"problem {i}", "solution": solution, "messages": turns}


def mbpp(i: int) -> Row:
    asserts = [f"assert add_{i}({x}) == {x + i}" for x in range(3)]
    setup = "offset = 0" if i % 2 else ""
    code = f"def add_{i}(x):\r\n  return x + {i}"
    numbers = {"task_id": i, "text": f"Write a function to add {i}.", "code": code, "test_list": asserts}
    return numbers | {"test_setup_code": setup, "challenge_test_list": []}


def record(i: int) -> Row:
    names = [f"Alice {i}", f"Bob {i}"]
    spans = {"text": names, "start": [0, 9], "end": [8, 15]}
    texts = {"passage": f"{names[0]} met {names[1]}.\n@highlight\nThey met.", "query": f"@placeholder smiled {i}."}
    return texts | {"entities": names, "entity_spans": spans, "answers": names[:1], "idx": {"passage": i, "query": i}}


def multirc(i: int) -> Row:
    idx = {"paragraph": i // 4, "question": i // 2, "answer": i}
    texts = {"paragraph": f"paragraph {i // 4}", "question": f"question {i // 2}", "answer": f"candidate {i}"}
    return texts | {"idx": idx, "label": i % 2}


def labelled(i: int, num_labels: int, **texts: str) -> Row:
    return {name: f"{text} {i}" for name, text in texts.items()} | {"idx": i, "label": i % num_labels}


def wsc(i: int) -> Row:
    spans = {"span1_index": 0, "span2_index": 3, "span1_text": f"Mark {i}", "span2_text": "he"}
    return spans | labelled(i, 2, text="Mark said that he came")


# Of each table: its folder (set, and configuration where it has one), its splits, a row, and what row 7 of training
# must read as: context, question and answer (None: not checked here).
TABLES: dict[str, tuple[str, str, Callable[[int], Row], tuple[str | None, str | None, str | None]]] = {
    "gpqa_main": ("gpqa/gpqa_main", "train", gpqa, ("question 7", None, None)),
    "gpqa_diamond": ("gpqa/gpqa_diamond", "train", gpqa, (None, None, None)),
    "arc_challenge": (
        "arc_challenge/ARC-Challenge",
        "train test validation",
        arc,
        ("", "question 7\nA: choice 7.0\nB: choice 7.1\nC: choice 7.2\nD: choice 7.3\nE: choice 7.4", "B"),
    ),
    "boolq": (
        "boolq/.",
        "train validation",
        lambda i: {"question": f"is it {i}", "answer": i % 2 == 1, "passage": f"passage {i}"},
        ("passage 7", "is it 7", "Yes"),
    ),
    "race": (
        "race/all",
        "train test validation",
        race,
        ("article 7", "question 7\nA: option 7.0\nB: option 7.1\nC: option 7.2\nD: option 7.3", "D"),
    ),
    "gsm8k": (
        "gsm8k/main",
        "train test",
        lambda i: {"question": f"{i} and one", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"},
        ("7 and one", "", "7 + 1 = <<7+1=8>>8\n#### 8"),
    ),
    "numinamath": ("numinamath/.", "train test", numina, (None, None, None)),
    "mbpp": (
        "mbpp/full",
        "train test validation prompt",
        mbpp,
        (
            "Write a function to add 7.\nYour code should pass these tests:\n"
            "assert add_7(0) == 7\nassert add_7(1) == 8\nassert add_7(2) == 9",
            "",
            "def add_7(x):\r\n  return x + 7",
        ),
    ),
    "superglue_boolq": (
        "superglue/boolq",
        "train validation",
        lambda i: labelled(i, 2, question="is it", passage="passage"),
        ("passage 7", "is it 7", "True"),
    ),
    "superglue_cb": (
        "superglue/cb",
        "train validation",
        lambda i: labelled(i, 3, premise="premise", hypothesis="hypothesis"),
        ("premise: premise 7", "hypothesis: hypothesis 7", "contradiction"),
    ),
    "superglue_copa": (
        "superglue/copa",
        "train validation",
        lambda i: (
            labelled(i, 2, premise="it rained", choice1="one", choice2="two") | {"question": ["cause", "effect"][i % 2]}
        ),
        ("it rained 7", "What was the effect?\nA: one 7\nB: two 7", "B"),
    ),
    "superglue_multirc": (
        "superglue/multirc",
        "train validation",
        multirc,
        ("paragraph 1", "question: question 3\ncandidate answer: candidate 7", "True"),
    ),
    "superglue_record": (
        "superglue/record",
        "train validation",
        record,
        (
            "Alice 7 met Bob 7.\n@highlight\nThey met.",
            "entities: Alice 7; Bob 7\nquery: @placeholder smiled 7.",
            "Alice 7",
        ),
    ),
    "superglue_rte": (
        "superglue/rte",
        "train validation",
        lambda i: labelled(i, 2, premise="premise", hypothesis="hypothesis"),
        ("premise: premise 7", "hypothesis: hypothesis 7", "not entailment"),
    ),
    "superglue_wic": (
        "superglue/wic",
        "train validation",
        lambda i: labelled(i, 2, word="bank", sentence1="A bank.", sentence2="Two banks."),
        ("A bank. 7\nTwo banks. 7", "word: bank 7", "True"),
    ),
    "superglue_wsc": (
        "superglue/wsc.fixed",
        "train validation",
        wsc,
        ("Mark said that he came 7", 'Does "he" stand for "Mark 7"?', "True"),
    ),
}
ROWS = 16


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("hub")
    for name, (place, splits, row, _) in TABLES.items():
        (home / place).mkdir(parents=True, exist_ok=True)
        for number, split in enumerate(splits.split()):
            start = 8 if name == "gpqa_diamond" else 1000 * number  # diamond is a part of main
            table = pd.DataFrame([row(i) for i in range(start, start + (8 if name == "gpqa_diamond" else ROWS))])
            table.to_parquet(home / place / f"{split}-00000-of-00001.parquet")
    return home


def load(name: str, copies: Path, *overrides: str) -> experiment.Experiment:
    return experiment.load(FOLDER / f"{name}.yaml", [f"stages.*.task.init_args.path={copies / name}", *overrides])


RUN_CODE = "stages.mbpp.task.init_args.judge.init_args.run_generated_code=true"


def test_the_tables_of_the_paper_are_all_there() -> None:
    assert NAMES == ["arc_challenge", "boolq", "gpqa", "gsm8k", "mbpp", "numinamath", "race", "superglue"]
    assert [stage.name for stage in experiment.load(FOLDER / "superglue.yaml").stages] == SUPERGLUE


@pytest.mark.parametrize("name", NAMES)
def test_every_column_map_reads_rows_with_the_sets_columns(name: str, copies: Path) -> None:
    found = load(name, copies, *([RUN_CODE] if name == "mbpp" else []))
    for stage in found.stages:
        table = {"gpqa": "gpqa_main", "superglue": f"superglue_{stage.name}"}.get(name, name)
        expected = TABLES[table][3]
        train = {row["row"]: row for row in stage.task.rows("train").to_list()}
        for key, value in zip(("context", "question", "answer"), expected, strict=True):
            assert value is None or train[7][key] == value, stage.name
        assert stage.task.instruction.endswith(".")
        assert 0 <= stage.task.constant_score() <= 1
        rows = [*train.values(), *stage.task.rows("test").to_list()]
        for row in rows[:: 8 if name == "mbpp" else 1]:  # a program takes its time
            assert stage.task.score_answer(row, row["answer"]) == 1.0, (stage.name, row)
            assert stage.task.score_answer(row, "no such thing") == 0.0


def test_gpqa_tests_on_diamond_trains_on_the_rest_of_main_and_hides_the_right_choice(copies: Path) -> None:
    task = load("gpqa", copies).stages[0].task
    train, test = task.rows("train").to_list(), task.rows("test").to_list()
    assert {row["context"] for row in train} == {f"question {i}" for i in range(8)}
    assert {row["context"] for row in test} == {f"question {i}" for i in range(8, 16)}
    assert len({row["answer"] for row in train + test}) > 2
    for row in train + test:
        lines = dict(line.split(": ", 1) for line in row["question"].splitlines())
        assert lines[row["answer"]] == row["context"].replace("question", "right")


def test_a_proof_is_left_out_of_numinamath(copies: Path) -> None:
    task = load("numinamath", copies).stages[0].task
    assert len(task.rows("train")) == len(task.rows("test")) == ROWS * 3 // 4
    row = task.rows("train").to_list()[1]
    assert task.score_answer(row, f"It is \\boxed{{{row['row'] / 2}}}.") == 1.0


def test_mbpp_is_refused_in_one_line_until_it_is_asked_for(
    copies: Path, tmp_path: Path, engine: Callable[..., Any]
) -> None:
    done = engine(
        FOLDER / "mbpp.yaml", f"stages.mbpp.task.init_args.path={copies / 'mbpp'}", *TINY, "--out", tmp_path / "r"
    )
    assert done.code == 2 and not (tmp_path / "r").exists()
    (line,) = done.err.strip().splitlines()
    assert "mbpp" in line and "run_generated_code=true" in line
    with pytest.raises(TaskError, match="has not been asked for"):
        load("mbpp", copies).stages[0].task.rows("test")


def test_mbpp_counts_the_programs_that_pass(copies: Path) -> None:
    task = load("mbpp", copies, RUN_CODE).stages[0].task
    one, other = task.rows("test").to_list()[:2]
    number = one["row"] + 1000
    assert task.score_answer(one, f"```python\ndef add_{number}(x): return {number} + x\n```") == 1.0
    assert task.score_answer(one, f"def add_{number}(x): return {number}") == 0.0
    assert task.score_answer(one, other["answer"]) == 0.0
    assert task.constant_score() == 0.0 and task.description()["isolation"] in ("kernel", "interpreter")


TINY = [
    "model.backbone={class_path: continual.backbones.TinyCausalLM, init_args: {hidden_size: 16, num_layers: 2}}",
    "model.adapter.init_args.num_blocks=2",
    "trainer={accelerator: cpu, max_epochs: 1}",
    "data.max_tokens=768",
    "stages.*.task.init_args.train_rows=6",
    "stages.*.task.init_args.test_rows=4",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_table_runs_to_its_end(name: str, copies: Path, tmp_path: Path, engine: Callable[..., Any]) -> None:
    overrides = [f"stages.*.task.init_args.path={copies / name}", *TINY, *([RUN_CODE] if name == "mbpp" else [])]
    done = engine(FOLDER / f"{name}.yaml", *overrides, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert manifest.read(tmp_path / "run")[0].complete
    scores = records.read(tmp_path / "run", "scores")
    assert scores["value"].between(0, 1).all()
    further = {
        task: set(rows["metric"]) & {"macro_f1", "last_label_f1", "whole_question_accuracy", "exact_match"}
        for task, rows in scores.groupby("task")
    }
    wanted: dict[str, set[str]] = {"cb": {"macro_f1"}, "record": {"exact_match"}}
    wanted["multirc"] = {"last_label_f1", "whole_question_accuracy"}
    assert further == {task: wanted.get(str(task), set()) for task in further}
    assert {stage.name for stage in experiment.load(FOLDER / f"{name}.yaml").stages} == set(further)

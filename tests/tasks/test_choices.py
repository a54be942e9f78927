"""Multiple choice from tables, and how a task's judge, measures and lists in templates go with its rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tasks import Choices, FinalAnswer, TaskError, TextTask, TokenOverlap

LETTERS = ["A", "B", "C", "D"]
FOUR = Choices(["right", "wrong1", "wrong2", "wrong3"], shuffle=True)
Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    pd.DataFrame(rows).to_parquet(path)
    return str(path)


def four(num_rows: int) -> Rows:
    return [
        {"q": f"question {row}", "right": f"right {row}"} | {f"wrong{i}": f"wrong {row}.{i}" for i in (1, 2, 3)}
        for row in range(num_rows)
    ]


def task(path: str, choices: Choices, **arguments: Any) -> TextTask:
    given: dict[str, Any] = {"columns": {"question": "q", "answer": "right"}, "labels": LETTERS} | arguments
    return TextTask(train_file=path, choices=choices, **given)


def all_rows(made: TextTask) -> Rows:
    return made.rows("train").to_list() + made.rows("test").to_list()


def chosen(row: dict[str, Any]) -> str:
    lines = dict(line.split(": ", 1) for line in row["question"].splitlines()[1:])
    return lines[row["answer"]]


def refusal(made: TextTask) -> str:
    with pytest.raises(TaskError) as caught:
        made.prepare()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_right_choice_is_the_answer_wherever_it_is_put(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", four(400))
    shuffled, plain = all_rows(task(path, FOUR)), all_rows(task(path, Choices(FOUR.columns)))
    for row in shuffled + plain:
        assert chosen(row) == f"right {row['row']}" and row["num_choices"] == 4
        assert sorted(row["question"].splitlines()[1:], key=lambda line: line[0])[0].startswith("A: ")
    assert {row["answer"] for row in plain} == {"A"}
    places = Counter(row["answer"] for row in shuffled)
    assert all(70 < places[letter] < 130 for letter in LETTERS)  # 100 expected each, standard deviation 8.7


def test_an_order_depends_on_the_seed_and_the_text_alone(tmp_path: Path) -> None:
    rows = four(60)
    first = {row["row"]: row for row in all_rows(task(write(tmp_path / "a.parquet", rows), FOUR))}
    moved = all_rows(task(write(tmp_path / "b.parquet", rows[::-1]), FOUR))
    assert all(row["question"] == first[59 - row["row"]]["question"] for row in moved)
    other = all_rows(task(str(tmp_path / "a.parquet"), FOUR, seed=1))
    assert any(row["question"] != first[row["row"]]["question"] for row in other)
    # Which of the choices is right must not move them: the order would give it away.
    swapped = [row | {"right": row["wrong1"], "wrong1": row["right"]} for row in rows]
    for row in all_rows(task(write(tmp_path / "c.parquet", swapped), FOUR)):
        assert row["question"] == first[row["row"]]["question"]


@pytest.mark.parametrize(
    ("choices", "answers"),
    [
        (Choices(["{c[text]}"], "key", key_column="{c[label]}"), ["B", "2", "b"]),
        (Choices(["{c[text]}"], "label"), ["B", "B", "B"]),
        (Choices(["{c[text]}"], "index"), [1, 1, 1]),
        (Choices(["{c[text]}"], "text"), ["two", "two", "two"]),
    ],
)
def test_tables_say_in_four_ways_which_choice_is_right(tmp_path: Path, choices: Choices, answers: list[Any]) -> None:
    keys = [["A", "B", "C"], ["1", "2"], ["a", "b", "c", "d"]]
    texts = ["one", "two", "three", "four"]
    rows = [
        {"q": f"q{i}", "c": {"text": texts[: len(own)], "label": own}, "answer": answer}
        for i, (own, answer) in enumerate(zip(keys, answers, strict=True))
    ]
    made = task(write(tmp_path / "a.parquet", rows), choices, columns={"question": "q", "answer": "answer"})
    found = {row["row"]: row for row in all_rows(made)}
    assert [found[row]["num_choices"] for row in range(3)] == [3, 2, 4]
    assert all(row["answer"] == "B" and chosen(row) == "two" for row in found.values())
    assert found[1]["question"] == "q1\nA: one\nB: two"


def test_a_row_whose_choices_do_not_fit_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", four(5))
    assert "row 0: the answer 'question 0' is no text of its 4 choices" in refusal(
        task(path, FOUR, columns={"question": "q", "answer": "q"})
    )
    assert "row 0: 4 choices, and the task has 3 labels" in refusal(task(path, FOUR, labels=["A", "B", "C"]))
    assert "no column 'rong1' (choices.columns)" in refusal(task(path, Choices(["right", "rong1"])))


def test_arguments_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    columns = {"question": "q", "answer": "a"}
    for match, arguments in (
        ("choices need labels", {"choices": FOUR}),
        ("no label_names", {"choices": FOUR, "label_names": ["x", "y"]}),
        ("no column", {"choices": Choices([]), "labels": LETTERS}),
        ("key_column", {"choices": Choices(["c"], "key"), "labels": LETTERS}),
        ("FinalAnswer is for free answers", {"judge": FinalAnswer(), "labels": LETTERS}),
        ("no measure 'macrof1'; did you mean 'macro_f1'", {"measures": ["macrof1"], "labels": LETTERS}),
        ("measure exact_match is for free answers", {"measures": ["exact_match"], "labels": LETTERS}),
        ("measure macro_f1 is for labels", {"measures": ["macro_f1"]}),
        ("needs columns.unit", {"measures": ["whole_question_accuracy"], "labels": LETTERS}),
        ("longest_answer", {"longest_answer": 0}),
        ("name 'x' goes with path", {"test_name": "x"}),
    ):
        with pytest.raises(TaskError, match=match):
            TextTask(train_file="a.parquet", columns=columns, **arguments)  # type: ignore[arg-type]


def test_two_configurations_of_one_set_are_train_and_test_and_share_no_row(tmp_path: Path) -> None:
    for name, rows in (("main", four(30)), ("diamond", four(30)[10:20])):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.parquet", rows)
    made = TextTask(
        str(tmp_path), "main", test_split="train", test_name="diamond",
        columns={"question": "q", "answer": "right"}, choices=FOUR, labels=LETTERS,
    )  # fmt: skip
    train, test = made.rows("train").to_list(), made.rows("test").to_list()
    assert (len(train), len(test)) == (20, 10) and made.description()["dropped_shared_rows"] == 10
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    with pytest.raises(TaskError, match="the test rows would be the training rows"):
        TextTask(str(tmp_path), "main", test_split="train", test_name="main")


def test_rows_that_cannot_be_judged_or_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"q": f"q{i}", "a": "a proof" if i % 3 == 0 else f"{'long ' * (i % 2) * 9}\\boxed{{{i % 2}}}"}
        for i in range(30)
    ]
    files = {name: write(tmp_path / f"{name}.parquet", [row | {"q": name + row["q"]} for row in rows]) for name in "ab"}
    made = TextTask(
        train_file=files["a"], test_file=files["b"], columns={"question": "q", "answer": "a"},
        judge=FinalAnswer(), longest_answer=20, train_rows=8, test_rows=12,
    )  # fmt: skip
    assert (len(made.rows("train")), len(made.rows("test"))) == (8, 12)
    assert all(answer == "\\boxed{0}" for answer in made.rows("train")["answer"][:])
    assert {len(answer) > 20 for answer in made.rows("test")["answer"][:]} == {True, False}  # long ones are tested
    facts = made.description()
    assert facts["judge"] == "FinalAnswer" and all(facts["left_out_rows"][split] > 0 for split in ("train", "test"))
    ones = sum("boxed{0}" in answer for answer in made.rows("test")["answer"][:])
    assert facts["constant_score"] == ones / 12


def test_lists_are_written_into_prompts_and_accepted_as_references(tmp_path: Path) -> None:
    rows = [{"q": f"q{i}", "e": [f"x{i}", "y", "z"], "a": [f"x{i}", "y"]} for i in range(4)]
    made = TextTask(
        train_file=write(tmp_path / "a.parquet", rows), judge=TokenOverlap(), measures=["exact_match"],
        columns={"question": "{q} of {e:; }, first {e[0]}", "answer": "{a[0]}", "references": "a"},
    )  # fmt: skip
    row = made.rows("train").to_list()[0]
    i = row["row"]
    assert (row["question"], row["answer"], row["references"]) == (
        f"q{i} of x{i}; y; z, first x{i}",
        f"x{i}",
        [f"x{i}", "y"],
    )
    assert made.score_answer(row, " Y ") == 1.0 and made.score_answer(row, "z") == 0.0
    assert made.further_scores([row, row], ["y", "z"]) == {"exact_match": 0.5}

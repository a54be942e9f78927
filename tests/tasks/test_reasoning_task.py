"""Reasoning tasks: rows that never leak, the library's scorer, clear refusals."""

import sys
from collections import Counter
from typing import Any

import pytest

from tasks import ReasoningTask, TaskError
from tasks.reasoning import UNUSABLE

pytest.importorskip("reasoning_gym", reason="the reasoning tasks need reasoning-gym")

SHIPPED = ["family_relationships", "aiw", "syllogism", "letter_counting"]


def _refusal(task: ReasoningTask) -> str:
    with pytest.raises(TaskError) as caught:
        task.prepare()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dataset", SHIPPED)
def test_train_and_test_ask_different_questions_with_short_answers(dataset: str) -> None:
    task = ReasoningTask(dataset, train_rows=300, test_rows=100)
    train, test = task.rows("train").to_list(), task.rows("test").to_list()
    assert (len(train), len(test)) == (300, 100)
    assert len({row["question"] for row in train + test}) == 400
    assert all(row["context"] == "" and row["question"] and len(row["answer"].split()) == 1 for row in train + test)
    assert all(task.score_answer(row, f" {row['answer']}\n") == 1.0 for row in train + test)


def test_repeated_questions_are_dropped_before_the_split() -> None:
    import reasoning_gym

    questions = [entry["question"] for entry in reasoning_gym.create_dataset("aiw", seed=0, size=800)]
    assert len(set(questions)) < 800, "this data set was chosen because it repeats itself"
    task = ReasoningTask("aiw", train_rows=500, test_rows=150)
    rows = task.rows("test").to_list() + task.rows("train").to_list()
    assert [row["row"] for row in rows] == list(range(650))
    assert [row["question"] for row in rows] == list(dict.fromkeys(questions))[:650]


@pytest.mark.parametrize("dataset", ["syllogism", "acre"])
def test_more_training_rows_leave_the_test_rows_and_the_first_training_rows(dataset: str) -> None:
    small = ReasoningTask(dataset, train_rows=20, test_rows=30)
    large = ReasoningTask(dataset, train_rows=60, test_rows=30)
    assert small.rows("test").to_list() == large.rows("test").to_list()
    assert small.rows("train").to_list() == large.rows("train").to_list()[:20]


def test_seed_and_params_reach_the_library() -> None:
    def first(seed: int = 0, params: dict[str, Any] | None = None) -> str:
        task = ReasoningTask("letter_counting", train_rows=1, test_rows=1, seed=seed, params=params)
        return task.rows("test")[0]["question"]

    assert first() != first(seed=1)
    words = first(params={"min_words": 2, "max_words": 2}).split('"')[3].split()
    assert len(words) == 2


def test_the_score_is_the_librarys_own_partial_credit_included() -> None:
    task = ReasoningTask("syllogism", train_rows=10, test_rows=10)
    row = next(row for row in task.rows("test").to_list() if row["answer"] == "Yes")
    assert task.score_answer(row, "Yes") == 1.0
    assert task.score_answer(row, "Yes.") == 0.75
    assert task.score_answer(row, "yes") == 0.0
    assert task.score_answer(row, "") == 0.0


def test_a_row_is_judged_by_its_index_also_in_a_new_task_object() -> None:
    row = ReasoningTask("letter_counting", train_rows=20, test_rows=20).rows("train")[3]
    again = ReasoningTask("letter_counting", train_rows=20, test_rows=20)
    assert again.score_answer({"row": row["row"]}, row["answer"]) == 1.0


def test_a_scorer_that_fails_on_a_text_gives_nothing() -> None:
    task = ReasoningTask("prime_factorization", train_rows=4, test_rows=4)
    row = task.rows("test")[0]
    assert task.score_answer(row, "no idea") == 0.0
    assert task.score_answer(row, row["answer"]) == 1.0


def test_constant_score_is_the_best_of_the_common_answers() -> None:
    task = ReasoningTask("family_relationships", train_rows=200, test_rows=100)
    shares = Counter(task.rows("test")["answer"][:])
    assert task.constant_score() == max(shares.values()) / 100
    # The scorer of this data set takes any text for "False": a constant guesser finds that out.
    assert ReasoningTask("game_of_life_halting", train_rows=8, test_rows=8).constant_score() == 1.0


@pytest.mark.parametrize("dataset", sorted(UNUSABLE))
def test_datasets_without_stable_rows_are_refused_by_the_constructor(dataset: str) -> None:
    with pytest.raises(TaskError, match=f"'{dataset}' cannot be used: it"):
        ReasoningTask(dataset)


def test_refusals_of_the_constructor() -> None:
    with pytest.raises(TaskError, match="may not hold 'size'"):
        ReasoningTask("aiw", params={"size": 3})
    with pytest.raises(TaskError, match="test_rows must be at least 1, got 0"):
        ReasoningTask("aiw", test_rows=0)
    with pytest.raises(TaskError, match="seed must be at least 0"):
        ReasoningTask("aiw", seed=-1)


def test_an_unknown_dataset_shows_near_names() -> None:
    message = _refusal(ReasoningTask("sylogism"))
    assert message.startswith("reasoning-gym has no dataset 'sylogism'; did you mean 'syllogism'")


def test_an_unknown_parameter_shows_near_names() -> None:
    message = _refusal(ReasoningTask("letter_counting", params={"max_word": 3}))
    assert message == (
        "reasoning-gym dataset 'letter_counting' has no parameter 'max_word'; did you mean 'max_words' or 'min_words'?"
    )


def test_a_parameter_that_the_library_refuses_is_passed_on() -> None:
    assert "refuses its params: min_words must be positive" in _refusal(
        ReasoningTask("letter_counting", params={"min_words": -1})
    )


def test_too_few_questions_is_one_line_with_the_numbers() -> None:
    task = ReasoningTask("coin_flip", train_rows=3000, test_rows=100, params={"min_trials": 1, "max_trials": 3})
    message = _refusal(task)
    assert "too few different questions: 3100 wanted (train_rows 3000 + test_rows 100)" in message


def test_a_dataset_without_reference_answers_is_refused() -> None:
    assert "'rush_hour' gives no answer to train on" in _refusal(ReasoningTask("rush_hour"))


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    message = _refusal(ReasoningTask("aiw"))
    assert "pip install reasoning-gym" in message
    assert "C compiler" in message


def test_mapped_answers_are_other_words_for_the_same_judgement() -> None:
    swapped = {"Yes": "No", "No": "Yes"}
    plain, mapped = (ReasoningTask("syllogism", train_rows=30, test_rows=20, answer_map=m) for m in (None, swapped))
    for split in ("train", "test"):
        own, other = plain.rows(split).to_list(), mapped.rows(split).to_list()
        assert [row["question"] for row in own] == [row["question"] for row in other]
        assert [swapped[row["answer"]] for row in own] == [row["answer"] for row in other]
    assert {row["answer"] for row in mapped.rows("test").to_list()} == {"Yes", "No"}
    for row in mapped.rows("test").to_list():
        assert mapped.score_answer(row, f" {row['answer']} ") == 1.0
        assert mapped.score_answer(row, swapped[row["answer"]]) == 0.0
        assert mapped.score_answer(row, f"{row['answer']}.") == mapped.score_answer(row, "Perhaps") == 0.0
    assert mapped.description()["answer_map"] == swapped


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"Yes": "A", "No": "A"}, "gives one answer in the place of two"),
        ({"Yes": "A"}, "says nothing of the answer 'No'"),
    ],
)
def test_a_map_that_loses_answers_is_refused(answers: dict[str, str], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        ReasoningTask("syllogism", train_rows=30, test_rows=20, answer_map=answers).prepare()

"""Judges of free answers and the measures beside a headline: hand-worked cases, and what must hold for all."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_f1_score

from tasks import ExactMatch, FinalAnswer, TokenOverlap
from tasks.judges import fenced_code, marked_answer, normalised
from tasks.measures import FOR_LABELS, MEASURES, exact_match, last_label_f1, macro_f1, whole_question_accuracy

JUDGE = FinalAnswer()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("So 40 + 2 = 42.\n#### 42", "#### 42"),
        ("#### $1,234.00", "#### 1234"),
        ("The answer is 42.", "#### 42"),
        ("Answer: -3", "x\n#### -3"),
        ("He pays 3 + 4 = 7 dollars", "#### 7"),
        ("#### 42 apples", "#### 42"),
        ("Thus $\\boxed{\\frac{1}{2}}$.", "\\boxed{0.5}"),
        ("\\boxed{\\dfrac12}", "\\boxed{1/2}"),
        ("\\boxed{-\\frac{3}{4}}", "\\boxed{-0.75}"),
        ("\\boxed{1} or rather \\boxed{2}", "\\boxed{2}"),
        ("\\boxed{x = 5}", "\\boxed{5}"),
        ("\\boxed{10\\text{ cm}^2}", "\\boxed{10}"),
        ("\\boxed{50\\%}", "\\boxed{50}"),
        ("\\boxed{90^\\circ}", "\\boxed{90}"),
        ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "\\boxed{(3,\\frac{\\pi}{2})}"),
        ("\\boxed{\\text{(C)}}", "\\boxed{(C)}"),
        ("\\boxed{x^{2} + 1}", "so \\boxed{x^{2}+1}"),
    ],
)
def test_final_answers_that_are_the_same(text: str, right: str) -> None:
    assert JUDGE.can_judge(right)
    assert JUDGE.score(text, [right]) == 1.0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("#### 41", "#### 42"),
        ("42 and then #### 41", "#### 42"),
        ("", "#### 42"),
        ("I do not know", "#### 42"),
        ("\\boxed{}", "\\boxed{42}"),
        ("\\boxed{2/0}", "\\boxed{2}"),
        ("\\boxed{12}", "\\boxed{1,2}"),
        ("\\boxed{x+1}", "\\boxed{x-1}"),
        ("\\boxed{X}", "\\boxed{x}"),
        ("\\boxed{" + "9" * 50_000 + "}", "\\boxed{9}"),
        ("\\boxed{1e99999999}", "\\boxed{1}"),
        ("\\boxed{" * 5_000, "\\boxed{1}"),
    ],
)
def test_final_answers_that_differ_and_texts_that_mean_harm(text: str, right: str) -> None:
    assert JUDGE.score(text, [right]) == 0.0


def test_a_solution_without_a_final_answer_cannot_be_judged() -> None:
    assert not JUDGE.can_judge("Since 2 divides n^2, 2 divides n. This completes the proof.")
    assert not JUDGE.can_judge("\\boxed{}")
    assert JUDGE.can_judge("42") and JUDGE.can_judge("\\boxed{x}")
    assert marked_answer("nothing") is None
    assert marked_answer("\\boxed{a{b}c} end") == "a{b}c"


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_every_spelling_of_a_number_is_that_number_and_no_other(top: int, bottom: int) -> None:
    right = f"\\boxed{{{top}/{bottom}}}"
    for text in (f"\\frac{{{top}}}{{{bottom}}}", f"{top:,}/{bottom}", str(Fraction(top, bottom))):
        assert JUDGE.score(f"so \\boxed{{{text}}}", [right]) == 1.0
    assert JUDGE.score(f"\\boxed{{{top + 1}/{bottom}}}", [right]) == 0.0


@given(st.text(max_size=60))
def test_any_text_is_judged_and_its_own_reference_is_right(text: str) -> None:
    for judge in (JUDGE, ExactMatch(), TokenOverlap()):
        assert 0.0 <= judge.score(text, ["#### 42"]) <= 1.0
        if judge.can_judge(text):
            assert judge.score(text, [text]) == 1.0
            assert judge.score(judge.constant(text) or "", [text]) == 1.0
    assert normalised(normalised(text)) is not None


def test_overlap_takes_the_best_reference_and_no_word_twice() -> None:
    judge = TokenOverlap()
    assert judge.score("The U.S. Senate!", ["us senate"]) == 1.0
    assert judge.score("Senate Senate", ["Senate"]) == pytest.approx(2 / 3)
    assert judge.score("New York City", ["London", "York"]) == pytest.approx(0.5)
    assert judge.score("Paris", ["London"]) == 0.0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("Sure:\n```python\nx = 1\n```\n```\ny\n```", "x = 1\n"),
        ("```\nx = 1", "x = 1"),
        ("print('```')", "print('```')"),
    ],
)
def test_a_program_is_the_first_fenced_block(text: str, code: str) -> None:
    assert fenced_code(text) == code


# ---- measures


def rows(answers: str, units: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"answer": answer} for answer in answers]
    return [row | {"unit": unit} for row, unit in zip(found, units, strict=True)] if units else found


def test_measures_worked_by_hand() -> None:
    # a: precision 1/2, recall 1; b: precision 1, recall 1/2; c: neither right nor given, so it does not count.
    assert macro_f1(rows("abb"), list("aab"), list("abc")) == pytest.approx(2 / 3)
    # right "TTF", given "TFT": one true answer found, one missed, one made up.
    assert last_label_f1(rows("TTF"), list("TFT"), ["F", "T"]) == pytest.approx(1 / 2)
    assert last_label_f1(rows("FF"), list("FF"), ["F", "T"]) == 0.0
    assert whole_question_accuracy(rows("TTFT", "1122"), list("TTFF"), ["F", "T"]) == 1 / 2
    accepted = [{"answer": "Rome", "references": ["Rome", "the Eternal City"]}, {"answer": "Oslo"}]
    assert exact_match(accepted, ["eternal city", "Bergen"], []) == 1 / 2


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from("FT"), st.sampled_from("FT"), st.sampled_from("12")), min_size=1, max_size=20)
)
def test_measures_lie_in_the_unit_interval_and_are_one_only_for_right_answers(
    cases: list[tuple[str, str, str]],
) -> None:
    right, told, units = ("".join(column) for column in zip(*cases, strict=True))
    for name in FOR_LABELS:
        value = MEASURES[name](rows(right, units), list(told), ["F", "T"])
        assert 0.0 <= value <= 1.0
        assert value < 1.0 or right == told
    accuracy = sum(r == t for r, t in zip(right, told, strict=True)) / len(cases)
    if len(set(units)) == len(units):
        assert whole_question_accuracy(rows(right, units), list(told), ["F", "T"]) == accuracy
    assert macro_f1(rows(right), list(right), ["F", "T"]) == 1.0


def test_macro_f1_agrees_with_torchmetrics() -> None:
    right, told, labels = "aabbccabca", "abbbccaaca", list("abc")
    places = [torch.tensor([labels.index(one) for one in texts]) for texts in (told, right)]
    expected = multiclass_f1_score(*places, num_classes=3, average="macro").item()
    assert macro_f1(rows(right), list(told), [*labels, "d"]) == pytest.approx(expected)

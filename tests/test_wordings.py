"""What words a row is put into: its list of options, what varies in training, and what the prompt and the gate get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from continual.backbones import TinyCausalLM
from continual.data.collate import Collator
from continual.data.encoding import EncodedTask
from continual.data.prompt_variants import TRAINING, Wording, opening, varied
from continual.data.stage_data import StageData
from continual.errors import ConfigError
from tasks import Task
from tasks.base import Split, text_rows

BACKBONE = TinyCausalLM(num_layers=2)
LABELS = ["no", "yes", "perhaps"]


class WordsTask(Task):
    """Rows of a context, a question and one of the labels."""

    kind = "labels"

    def __init__(self, labels: list[str] | None = LABELS, instruction: str = "Judge it.", num_rows: int = 40) -> None:
        self.labels, self.instruction, self.num_rows = labels, instruction, num_rows
        self.kind = "labels" if labels else "free"

    def _build(self) -> dict[Split, Dataset]:
        names = self.labels or LABELS
        rows = [(f"context {i}", f"q{i}?", names[i % len(names)], i) for i in range(self.num_rows)]
        return {"train": text_rows(rows), "test": text_rows(rows)}


class Stub:
    """What StageData asks of a module."""

    backbone, uses_instructions, takes_task_ids, balances_experts = BACKBONE, True, False, False
    instruction_encoder, row_inputs, device, hidden_width = None, None, torch.device("cpu"), 64


def encode(wording: Wording = TRAINING, options: Any = "listed", task: Task | None = None) -> EncodedTask:
    return EncodedTask(task or WordsTask(), BACKBONE, "test", 200, options, wording)


def prompts(encoded: EncodedTask) -> list[str]:
    return [BACKBONE.tokenizer.decode(row.prompt_ids) for row in encoded.rows]


@given(
    labels=st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True),
    seed=st.integers(0, 9),
    row=st.integers(0, 99),
)
def test_a_shuffled_list_is_a_permutation_and_never_the_original(labels: list[str], seed: int, row: int) -> None:
    wording = Wording("shuffled", options="shuffled", seed=seed)
    order = wording.order(labels, row)
    assert sorted(order) == sorted(labels) and order != labels
    assert wording.order(labels, row) == order


def test_rows_are_shuffled_apart_and_seeds_too() -> None:
    by_seed = [
        [tuple(Wording("s", options="shuffled", seed=seed).order(LABELS, row)) for row in range(60)] for seed in (0, 1)
    ]
    assert by_seed[0] != by_seed[1]
    assert all(len(set(orders)) == 5 for orders in by_seed)  # all orders of three labels but their own


def test_the_list_stands_between_instruction_and_context() -> None:
    assert prompts(encode())[7] == "Judge it.\nOptions: no, yes, perhaps\ncontext 7\nq7?\nAnswer:"
    assert prompts(encode(task=WordsTask(instruction="")))[7] == "Options: no, yes, perhaps\ncontext 7\nq7?\nAnswer:"


def test_dropped_options_leave_the_exact_prompt_without_the_line() -> None:
    dropped, without = encode(Wording("d", options="dropped")), encode(options="none")
    assert dropped.rows == without.rows
    assert [text.replace("Options: no, yes, perhaps\n", "") for text in prompts(encode())] == prompts(without)


def test_the_list_is_never_cut_and_the_context_is_in_its_place() -> None:
    task = WordsTask()
    whole = max(row.length for row in encode().rows)
    cut = EncodedTask(task, BACKBONE, "test", whole - 3, "listed")
    assert cut.cut_rows == 40
    assert all("\nOptions: no, yes, perhaps\n" in text for text in prompts(cut))
    with pytest.raises(ConfigError, match="neither is ever cut"):
        EncodedTask(task, BACKBONE, "test", whole - 20, "listed")


def test_a_free_task_lists_nothing() -> None:
    task = WordsTask(labels=None)
    assert encode(task=task).rows == encode(task=task, options="none").rows


def instructions(rows: list[Any]) -> list[list[int]]:
    return Collator(BACKBONE, True, answers=False)(rows)["forward"]["instruction_ids"].tolist()


@pytest.mark.parametrize("words", ["Say what holds.", ""])
def test_a_wording_changes_prompt_and_gate_where_it_says_and_nothing_else(words: str) -> None:
    trained, other = encode().rows, encode(task=WordsTask(instruction=words)).rows
    gate, prompt, both = (encode(Wording("w", words, where)).rows for where in ("gate", "prompt", "both"))
    assert [row.prompt_ids for row in gate] == [row.prompt_ids for row in trained]
    assert instructions(gate) == instructions(other) != instructions(trained)
    assert [row.prompt_ids for row in prompt] == [row.prompt_ids for row in other]
    assert instructions(prompt) == instructions(trained)
    assert both == other


def test_worded_data_differ_in_their_test_rows_alone() -> None:
    data = StageData(WordsTask(), options="listed")
    data.prepare(Stub())
    before = data._encoded["test"].rows
    other = data.worded(Wording("none", ""))
    assert data._encoded["test"].rows is before
    assert other.train_rows == data.train_rows
    assert {row["forward"]["instruction_ids"].max().item() for row in other.test_dataloader()} == {-1}


# -- what varies in training ------------------------------------------------------------------------------------------


@given(num_rows=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 5))
def test_the_share_of_varied_rows_is_as_said_in_equal_parts(num_rows: int, share: float, seed: int) -> None:
    wordings = varied(WordsTask(), True, num_rows, share, seed)
    counts = [
        sum(w.name == name for w in wordings) for name in ("options shuffled", "options dropped", "no instruction")
    ]
    assert len(wordings) == num_rows
    assert sum(counts) == sum(w is not TRAINING for w in wordings) == round(share * num_rows)
    assert max(counts) - min(counts) <= 1
    assert wordings == varied(WordsTask(), True, num_rows, share, seed)


@pytest.mark.parametrize(
    ("task", "listed", "kinds"),
    [
        (WordsTask(), False, {"no instruction"}),
        (WordsTask(instruction=""), True, {"options shuffled", "options dropped"}),
        (WordsTask(labels=["only"]), True, {"options dropped", "no instruction"}),
        (WordsTask(labels=None), True, {"no instruction"}),
        (WordsTask(labels=None, instruction=""), True, set()),
    ],
)
def test_what_does_not_apply_is_not_drawn(task: Task, listed: bool, kinds: set[str]) -> None:
    assert {w.name for w in varied(task, listed, 50, 0.5, 0) if w is not TRAINING} == kinds


def test_varied_training_rows_keep_their_answers_and_every_other_row_its_words() -> None:
    plain, varying = (StageData(WordsTask(), options="listed", vary_prompt=v, validation_rows=10) for v in (0.0, 0.6))
    plain.prepare(Stub())
    varying.prepare(Stub())
    pairs = list(zip(plain.train_rows, varying.train_rows, strict=True))
    assert [(a.source, a.answer_ids) for a, _ in pairs] == [(b.source, b.answer_ids) for _, b in pairs]
    changed = [(a, b) for a, b in pairs if a.prompt_ids != b.prompt_ids]
    assert len(changed) == 18  # 0.6 of the 30 rows that are trained on
    unsaid = [b for _, b in changed if not b.instruction]
    assert len(unsaid) == 6
    assert all(BACKBONE.tokenizer.decode(row.prompt_ids).startswith("Options: no, yes, perhaps\n") for row in unsaid)
    assert len(plain.held_out_rows) == 10 and plain.held_out_rows == varying.held_out_rows
    assert plain._encoded["test"].rows == varying._encoded["test"].rows


def test_two_methods_get_the_same_rows_and_another_seed_others() -> None:
    def rows(seed: int, with_gate: bool) -> list[Any]:
        module: Any = Stub()
        module.uses_instructions = with_gate
        data = StageData(WordsTask(), options="listed", vary_prompt=0.5, seed=seed)
        data.prepare(module)
        return data.train_rows

    assert rows(3, True) == rows(3, False) != rows(4, True)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"^data\.vary_prompt must lie in \[0, 1\], got "):
        StageData(WordsTask(), vary_prompt=share)


def test_an_opening_has_only_the_lines_that_there_are() -> None:
    assert [opening(i, o) for i in ("Do.", "") for o in (["a", "b"], [])] == [
        "Do.\nOptions: a, b",
        "Do.",
        "Options: a, b",
        "",
    ]

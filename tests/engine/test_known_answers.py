"""Rows of a growing bank whose answers are known are not computed again, and come to what computing them would give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from continual.adapters.growing.gate import ABSTAIN, StageGate
from continual.engine.stage_loop import StageLoop
from continual.scoring import answer_cache
from continual.scoring.answer_cache import AnswerCache, Batch
from continual.strategies import GrowingBank

Tree = dict[str, Any]
NUM_ROWS = {"animals": 6, "colours": 6, "counting": 7, "relations": 7}


def reasoning(name: str, dataset: str, instruction: str) -> Tree:
    arguments = {"dataset": dataset, "instruction": instruction, "train_rows": 8, "test_rows": 7}
    return {"name": name, "task": {"class_path": "tasks.ReasoningTask", "init_args": arguments}}


@pytest.fixture
def growing(tree: Tree) -> Tree:
    """Four stages of a growing bank, two of labels and two of free answers."""
    tree["model"]["strategy"] = {
        "class_path": "continual.strategies.GrowingBank",
        "init_args": {"background_rows": 8, "probe_rows": 12, "instruction_encoder": "backbone"},
    }
    tree["data"] |= {"max_tokens": 1024}
    tree["stages"] += [
        reasoning("counting", "letter_counting", "Count how often the letter occurs."),
        reasoning("relations", "aiw", "Work out the family relation and give a number."),
    ]
    return tree


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """How many rows of each task were known, scoring by scoring."""
    found, lookup = list[dict[str, int]](), AnswerCache._lookup

    def counted(self: AnswerCache) -> dict[str, Batch]:
        cached = lookup(self)
        for data in self._context.scored:
            needed = set().union(*(recorder.needed_rows(data) for recorder in self._context.recorders))
            assert not needed & {*cached[data.name][0].rows} if data.name in cached else True
        for outcome, rows in cached.values():
            assert outcome.route_sums is not None
            assert outcome.rows == outcome.route_sums.rows == [row["row"] for row in rows]
        found.append({name: len(rows) for name, (_, rows) in cached.items()})
        return cached

    monkeypatch.setattr(AnswerCache, "_lookup", counted)
    return found


@pytest.fixture
def both_ways(write: Callable, engine: Callable, tmp_path: Path) -> Callable[[Tree], None]:
    """Return what runs a configuration twice, into the folders known and computed: the second one keeps no answers."""

    def run(tree: Tree) -> None:
        config = write(tree)
        assert engine(config, "--out", tmp_path / "known").code == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GrowingBank, "answering_parts", lambda self, module: None)
            assert engine(config, "--out", tmp_path / "computed").code == 0

    return run


def same_table(name: str, folder: Path) -> pd.DataFrame:
    """Hold a table of both ways' runs to one another; returns the one with known answers."""
    known, computed = (pd.read_parquet(folder / run / name) for run in ("known", "computed"))
    pd.testing.assert_frame_equal(known, computed, check_exact=False, rtol=1e-5, atol=1e-6, obj=name)
    return known


@pytest.mark.parametrize("scoring", ["all", "seen"])
def test_known_answers_are_those_that_computing_gives(
    growing: Tree, both_ways: Callable[[Tree], None], tmp_path: Path, found: list[dict[str, int]], scoring: str
) -> None:
    both_ways(growing | {"token_sample": 0, "scoring": scoring})
    known = found[:5]
    assert known[0] == {} and sum(map(len, known)) >= 5
    assert all(count < NUM_ROWS[name] for each in known for name, count in each.items())  # one row at least is left
    assert len(found) == 5  # where no answers are kept, nothing asks for any
    names = sorted(path.name for path in (tmp_path / "computed").glob("*.parquet"))
    assert names == sorted(path.name for path in (tmp_path / "known").glob("*.parquet"))
    assert {"scores.parquet", "answers.parquet", "routing.parquet", "usage_halves.parquet"} <= {*names}
    for name in names:
        same_table(name, tmp_path)


def test_rows_are_computed_where_their_tokens_are_sampled(
    growing: Tree, both_ways: Callable[[Tree], None], tmp_path: Path, found: list[dict[str, int]]
) -> None:
    both_ways(growing | {"token_sample": 3})
    assert sum(found[4].values()) >= 4 * 3  # of a task's six or seven rows, three at most hold the sample
    tokens = same_table("tokens.parquet", tmp_path)
    counts = tokens.drop_duplicates(["stage", "task", "row", "place"]).value_counts(["stage", "task"])
    assert len(counts) == 7 and set(counts) == {3}


@pytest.fixture
def killed(growing: Tree, write: Callable, engine: Callable, tmp_path: Path) -> Path:
    """The directory of a run that ended before its third stage was trained."""
    fit = StageLoop._fit

    def fail(self: StageLoop, index: int) -> Any:
        if index == 3:
            raise RuntimeError("killed")
        return fit(self, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(StageLoop, "_fit", fail)
        engine(write(growing | {"token_sample": 0}), "--out", tmp_path / "killed")
    assert [path.name for path in (tmp_path / "killed").glob("known*")] == ["known-answers-02.parquet"]
    return tmp_path / "killed"


def test_a_killed_run_knows_what_it_knew(
    killed: Path, growing: Tree, write: Callable, engine: Callable, contents: Callable, found: list[dict[str, int]]
) -> None:
    whole = killed.with_name("whole")
    assert engine(write(growing | {"token_sample": 0}), "--out", whole).code == 0
    assert engine("--resume", killed).code == 0
    assert found[5:] == found[3:5] and all(found[3:5])
    assert contents(killed) == contents(whole)
    assert not list(whole.glob("known*")) and not list(killed.glob("known*"))


def test_a_damaged_file_of_known_answers_is_one_line(killed: Path, engine: Callable) -> None:
    (killed / "known-answers-02.parquet").write_bytes(b"PAR1 no more")
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    result = engine("--resume", killed)
    assert result.code != 0 and result.err.count("\n") == 1
    assert "known-answers-02.parquet is not what the run wrote after stage 2" in result.err
    assert {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()} == before


def test_rows_are_computed_again_where_a_label_seen_since_may_win(
    growing: Tree,
    write: Callable,
    engine: Callable,
    tmp_path: Path,
    found: list[dict[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    growing["stages"].insert(1, growing["stages"].pop())  # animals, relations, colours, counting
    config = write(growing | {"token_sample": 0})
    for rounding in (-1e9, 1e9):  # no label might win; every label might
        monkeypatch.setattr(answer_cache, "_ROUNDING", rounding)
        assert engine(config, "--out", tmp_path / f"{rounding}").code == 0
    never, always = found[:5], found[5:]
    assert all("animals" in known for known in (never[2], never[3], never[4], always[2], always[4]))
    assert "animals" not in always[3]  # colours' labels have been seen
    assert [{**known, "animals": 5} for known in always[3:]] == never[3:]


def test_routes_are_the_same_in_any_batches(growing: Tree, write: Callable, engine: Callable, tmp_path: Path) -> None:
    # A margin that half of the rows do not clear: they are left to the backbone, some of them as a whole batch.
    choose = StageGate.choose

    def wavering(self: StageGate, features: Any, lengths: Any, instruction: Any = None) -> Any:
        chosen = choose(self, features, lengths, instruction)
        return chosen.where(features[:, 0] > features[:, 1], ABSTAIN)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageGate, "choose", wavering)
        for tokens in (1, 10_000):
            arguments = [f"data.eval_batch_tokens={tokens}", "token_sample=0", "--out", tmp_path / str(tokens)]
            assert engine(write(growing), *arguments).code == 0
    alone, together = (pd.read_parquet(tmp_path / str(tokens) / "routing.parquet") for tokens in (1, 10_000))
    nowhere = together.query("metric == 'usage' and atom == 0")
    assert nowhere["value"].between(0.01, 0.99).any()
    pd.testing.assert_frame_equal(
        alone.drop(columns="run"), together.drop(columns="run"), check_exact=False, rtol=1e-3, atol=1e-5
    )

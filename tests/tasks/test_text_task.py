"""Text tasks: every way to name a table, the split's promises, and one clear line for every bad input."""

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import TaskError, TextTask

QA = {"context": "passage", "question": "question", "answer": "answer"}
Rows = list[dict[str, Any]]


def _write(path: Path, rows: Rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def _numbered(num_rows: int, start: int = 0) -> Rows:
    return [
        {"passage": f"passage {i // 3}", "question": f"question {i}", "answer": "yes" if i % 3 else "no"}
        for i in range(start, start + num_rows)
    ]


def _refusal(make: Callable[[], TextTask]) -> str:
    with pytest.raises(TaskError) as caught:
        make().prepare()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__cause__ is None
    return message


# ---- reading


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl", ".csv", ".tsv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "passage": row["passage"] + ', "quoted"'} for row in _numbered(9)]
    _write(tmp_path / f"train{suffix}", rows)
    _write(tmp_path / f"test{suffix}", _numbered(3, start=90))
    task = TextTask(
        train_file=f"train{suffix}", test_file=f"test{suffix}", folder=str(tmp_path), columns=QA, labels=["yes", "no"]
    )
    assert task.kind == "labels" and task.metric == "accuracy" and task.labels == ["yes", "no"]
    assert task.rows("train").to_list() == [
        {"context": row["passage"], "question": row["question"], "answer": row["answer"], "row": i}
        for i, row in enumerate(rows)
    ]
    assert task.rows("test")["row"][:] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "q,a\nred, or blue,x\n", "line 2 has 3 fields and the header 2"),
        ("a.csv", 'q,a\n"red\nor blue",x\nred,or,y\n', "line 4 has 3 fields"),
        ("a.csv", "q,a\nred,x\nblue\n", "line 3 has 1 fields"),
        ("a.tsv", "q\ta\nred\tblue\tx\n", "line 2 has 3 fields and the header 2"),
        ("a.csv", 'q,a\n"red,x\nblue,y\n', "unexpected end of data"),
        ("a.csv", "q,q\nred,x\n", "line 1 names the column 'q' twice"),
    ],
)
def test_a_row_of_another_length_than_the_header_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    columns, file = {"question": "q", "answer": "a"}, str(tmp_path / name)
    message = _refusal(lambda: TextTask(train_file=file, columns=columns, labels=["x", "y"]))
    assert str(tmp_path / name) in message and words in message


def test_a_csv_file_keeps_what_quotes_hold(tmp_path: Path) -> None:
    long = "red " * 50_000  # beyond Python's own limit of a field
    before = csv.field_size_limit()
    text = f'\ufeffq,a\n"red, or\nblue",x\n\n"a ""b""",y\n{long.strip()},x\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    task = TextTask(train_file=str(tmp_path / "a.csv"), columns={"question": "q", "answer": "a"}, labels=["x", "y"])
    texts = {text for split in ("train", "test") for text in task.rows(split)["question"][:]}
    assert texts == {"red, or\nblue", 'a "b"', long.strip()} and csv.field_size_limit() == before


def test_texts_of_a_csv_file_are_not_taken_for_missing_values_or_numbers(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.csv", [{"q": "NA", "a": "None"}, {"q": "007", "a": "null"}, {"q": "1.0", "a": "None"}])
    task = TextTask(train_file=file, columns={"question": "q", "answer": "a"}, labels=["None", "null"])
    rows = task.rows("train").to_list() + task.rows("test").to_list()
    assert {row["question"]: row["answer"] for row in rows} == {"NA": "None", "007": "null", "1.0": "None"}


def test_a_folder_of_split_files_stands_in_for_a_hub_id(tmp_path: Path) -> None:
    _write(tmp_path / "plain" / "train.jsonl", _numbered(6))
    _write(tmp_path / "plain" / "test.jsonl", _numbered(3, 90))
    _write(tmp_path / "hub" / "sst2" / "train-00000-of-00002.parquet", _numbered(6))
    _write(tmp_path / "hub" / "sst2" / "train-00001-of-00002.parquet", _numbered(6, 30))
    _write(tmp_path / "hub" / "sst2" / "validation-00000-of-00001.parquet", _numbered(3, 90))
    _write(tmp_path / "suite" / "boolq.train.parquet", _numbered(6))
    _write(tmp_path / "suite" / "boolq.test.parquet", _numbered(3, 90))
    plain = TextTask(path=str(tmp_path / "plain"), columns=QA)
    hub = TextTask(path=str(tmp_path / "hub"), name="sst2", test_split="validation", columns=QA)
    suite = TextTask(path="suite", folder=str(tmp_path), name="boolq", columns=QA)
    assert [len(task.rows("train")) for task in (plain, hub, suite)] == [6, 12, 6]
    assert all(task.rows("test").to_list() == plain.rows("test").to_list() for task in (hub, suite))


def test_columns_may_be_templates_that_reach_into_a_column(tmp_path: Path) -> None:
    rows = [
        {"premise": f"p{i}", "hypothesis": None if i else "h", "answers": {"text": [f"a{i}", "b"]}} for i in range(4)
    ]
    columns = {"context": "Premise: {premise}\nHypothesis: {hypothesis}", "answer": "{answers[text][0]}"}
    task = TextTask(train_file=_write(tmp_path / "a.jsonl", rows), columns=columns)
    found = {row["row"]: row for row in task.rows("train").to_list() + task.rows("test").to_list()}
    assert found[0] == {"context": "Premise: p0\nHypothesis: h", "question": "", "answer": "a0", "row": 0}
    assert found[3]["context"] == "Premise: p3\nHypothesis:" and found[3]["answer"] == "a3"


HUB: dict[str, tuple[dict[str, Any], Rows, tuple[str, str]]] = {
    "fancyzhx/ag_news": (
        {
            "columns": {"context": "text", "answer": "label"},
            "label_names": {0: "World", 1: "Sports", 2: "Business", 3: "Science"},
        },
        [{"text": f"story {i}", "label": i % 4} for i in range(12)],
        ("story 2", "Business"),
    ),
    "google/boolq": (
        {"columns": QA, "label_names": {True: "yes", False: "no"}},
        [{"question": f"is it {i}", "passage": f"text {i}", "answer": i % 2 == 0} for i in range(12)],
        ("text 2", "yes"),
    ),
    "nyu-mll/glue": (
        {
            "name": "sst2",
            "test_split": "validation",
            "columns": {"context": "sentence", "answer": "label"},
            "label_names": ["negative", "positive"],
        },
        [{"sentence": f"film {i}", "label": i % 2, "idx": i} for i in range(12)],
        ("film 2", "negative"),
    ),
}


@pytest.mark.parametrize("hub_id", HUB)
def test_hub_data_sets_and_local_copies_give_the_same_rows(
    hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, rows, (context, answer) = HUB[hub_id]
    second = arguments.get("test_split", "test")
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(path: str, name: str | None = None, *, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list(rows[:8] if split == "train" else rows[8:])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = TextTask(path=hub_id, **arguments)
    found = task.rows("train").to_list()
    assert sorted(asked) == sorted([(hub_id, arguments.get("name"), "train"), (hub_id, arguments.get("name"), second)])
    assert (found[2]["context"], found[2]["answer"]) == (context, answer)
    assert task.labels == list(dict.fromkeys(dict(enumerate_names(arguments["label_names"])).values()))

    home = tmp_path / (arguments.get("name") or "")
    _write(home / "train.parquet", rows[:8])
    _write(home / f"{second}.parquet", rows[8:])
    local = TextTask(path=str(tmp_path), **arguments)
    assert local.rows("train").to_list() == found
    assert local.rows("test").to_list() == task.rows("test").to_list()


def enumerate_names(names: Any) -> Any:
    return names.items() if isinstance(names, dict) else enumerate(names)


# ---- instruction, scoring


def test_the_instruction_comes_from_the_table_unless_given(tmp_path: Path) -> None:
    rows = [{"instruction": "Judge it.", "input": f"text {i}", "target": "good"} for i in range(4)]
    file = _write(tmp_path / "a.parquet", rows)
    task = TextTask(train_file=file)
    assert task.instruction == ""
    task.prepare()
    assert task.instruction == "Judge it." == task.description()["instruction"]
    other = TextTask(train_file=file, instruction="Say whether it is good.")
    other.prepare()
    assert other.instruction == "Say whether it is good."
    bare = TextTask(train_file=_write(tmp_path / "b.jsonl", [{"input": f"{i}", "target": "x"} for i in range(3)]))
    bare.prepare()
    assert bare.instruction == ""


def test_scores_of_labels_and_free_answers(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", [{"input": f"a{i}", "target": "Paris" if i < 3 else "Rome"} for i in range(4)])
    _write(tmp_path / "test.jsonl", [{"input": f"b{i}", "target": "Rome" if i < 3 else "Paris"} for i in range(4)])
    free, labels = (TextTask(path=str(tmp_path), labels=given) for given in (None, ["Rome", "Paris"]))
    assert (free.kind, free.metric, free.labels) == ("free", "score", None)
    row = free.rows("test")[0]
    assert [task.score_answer(row, text) for task in (free, labels) for text in (" Rome\n", "rome", "Rome!")] == [
        *(1.0, 1.0, 0.0),
        *(1.0, 0.0, 0.0),
    ]
    assert free.constant_score() == labels.constant_score() == 0.75


# ---- splits


def test_shared_rows_and_groups_are_dropped_from_training_and_counted(tmp_path: Path) -> None:
    train = _numbered(9) + [{"passage": "passage  30", "question": "question 90", "answer": "no"}]
    test = [*_numbered(1, 90), {"passage": "passage 1", "question": "a new one", "answer": "no"}]
    _write(tmp_path / "train.jsonl", train)
    _write(tmp_path / "test.jsonl", test)
    by_row = TextTask(path=str(tmp_path), columns=QA)
    by_group = TextTask(path=str(tmp_path), columns={**QA, "group": "passage"})
    assert by_row.rows("train")["row"][:] == list(range(9))
    assert by_row.description()["dropped_shared_rows"] == 1
    assert by_group.rows("train")["row"][:] == [0, 1, 2, 6, 7, 8]
    assert by_group.description()["dropped_shared_rows"] == 4
    assert len(by_row.rows("test")) == len(by_group.rows("test")) == 2


SMALL = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3), st.integers(0, 5)), min_size=2, max_size=40)


def _table(cells: list[tuple[int, int, int]], group: bool) -> Rows:
    return [
        {"c": f"context {c}", "q": f"{' ' * (c % 3)}question {q}", "a": "x", "g": f"g{g}" if group and g else None}
        for c, q, g in cells
    ]


@settings(max_examples=60, deadline=None)
@given(train=SMALL, test=SMALL | st.none(), group=st.booleans(), seed=st.integers(0, 3), limit=st.integers(1, 10))
def test_no_row_and_no_group_stands_on_both_sides(
    train: list[tuple[int, int, int]], test: list[tuple[int, int, int]] | None, group: bool, seed: int, limit: int
) -> None:
    tables = {"train": _table(train, group), "test": _table(train if test is None else test, group)}
    columns = {"context": "c", "question": "q", "answer": "a", **({"group": "g"} if group else {})}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train",) if test is None else ("train", "test"):
            _write(Path(folder) / f"{name}.jsonl", tables[name])

        def make(train_rows: int | None) -> TextTask:
            return TextTask(
                train_file="train.jsonl",
                test_file=None if test is None else "test.jsonl",
                folder=folder,
                columns=columns,
                train_rows=train_rows,
                test_rows=limit,
                seed=seed,
            )

        whole, part = make(None), make(limit)
        try:
            whole.prepare()
        except TaskError:
            return  # everything is shared, or there is but one group
        part.prepare()
    chosen = {split: whole.rows(split).to_list() for split in ("train", "test")}
    texts = {split: {(row["context"], row["question"]) for row in rows} for split, rows in chosen.items()}
    groups = {split: {tables[split][row["row"]]["g"] for row in rows} - {None} for split, rows in chosen.items()}
    assert chosen["train"] and chosen["test"]
    assert not texts["train"] & texts["test"]
    assert not groups["train"] & groups["test"]
    for split, rows in chosen.items():
        assert all(tables[split][row["row"]]["c"] == row["context"] for row in rows)
    # Fewer training rows are a part of them, and the test rows stay.
    assert part.rows("test").to_list() == chosen["test"]
    assert len(part.rows("train")) == min(limit, len(chosen["train"]))
    assert {row["row"] for row in part.rows("train").to_list()} <= {row["row"] for row in chosen["train"]}
    if test is not None:
        test_texts = {(row["c"], row["q"].strip()) for row in tables["test"]}
        assert not texts["train"] & test_texts, "the whole test table counts, not only the rows drawn from it"
        assert len(chosen["train"]) + whole.description()["dropped_shared_rows"] == len(train)


def test_the_own_split_keeps_its_share_and_follows_the_seed(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", _numbered(60))
    first, again, other = (TextTask(path=file, columns=QA, test_fraction=0.25, seed=seed) for seed in (0, 0, 1))
    assert (len(first.rows("train")), len(first.rows("test"))) == (45, 15)
    assert first.rows("test").to_list() == again.rows("test").to_list() != other.rows("test").to_list()
    grouped = TextTask(path=file, columns={**QA, "group": "passage"}, test_fraction=0.25)
    assert (len(grouped.rows("train")), len(grouped.rows("test"))) == (45, 15)


def test_more_test_rows_keep_the_ones_drawn_before_and_the_training_rows(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", _numbered(60))
    few, more = (TextTask(path=file, columns=QA, train_rows=10, test_rows=rows) for rows in (3, 9))
    assert set(few.rows("test")["row"][:]) < set(more.rows("test")["row"][:])
    assert few.rows("train").to_list() == more.rows("train").to_list()


# ---- the project's own tables


def test_the_shared_data_read_as_they_are(shared_data: Path) -> None:
    for name, facts in json.loads((shared_data / "text" / "tasks.json").read_text()).items():
        task = TextTask(
            train_file=f"{name}.train.parquet",
            test_file=f"{name}.test.parquet",
            folder=str(shared_data / "text"),
            labels=facts["labels"],
        )
        found = task.description()
        assert (found["train_rows"], found["test_rows"]) == (facts["train"], facts["test"])
        assert found["dropped_shared_rows"] == 0
        assert found["constant_score"] == pytest.approx(facts["majority"], abs=1e-4)
        assert found["instruction"]


def test_the_trial_passages_never_cross_over(shared_data: Path) -> None:
    # The passage follows its tag to the end of the input; as a template cannot cut, it is taken out here.
    tables = {split: pd.read_parquet(shared_data / "text" / f"multirc.{split}.parquet") for split in ("train", "test")}
    joined = pd.concat(tables.values(), ignore_index=True)
    joined["passage"] = joined["input"].str.split("\npassage: ", n=1).str[1]
    with tempfile.TemporaryDirectory() as folder:
        joined.to_parquet(Path(folder) / "multirc.parquet")
        task = TextTask(
            path=folder + "/multirc.parquet",
            columns={"context": "input", "answer": "target", "group": "passage"},
            labels=["False", "True"],
        )
        sides = [set(joined["passage"].iloc[task.rows(split)["row"][:]]) for split in ("train", "test")]
    assert len(sides[0]) > 20 and len(sides[1]) > 5 and not sides[0] & sides[1]


# ---- bad input


def test_a_missing_file_or_folder_is_named_with_near_names(tmp_path: Path) -> None:
    _write(tmp_path / "mnli.train.parquet", _numbered(3))
    message = _refusal(lambda: TextTask(train_file="mnly.train.parquet", folder=str(tmp_path)))
    assert "mnly.train.parquet" in message and "did you mean 'mnli.train.parquet'?" in message
    message = _refusal(lambda: TextTask(train_file="a.csv", folder=str(tmp_path / "nowhere")))
    assert "nowhere/a.csv' (nor a folder" in message
    assert "no file 'data/nothing.json'" in _refusal(lambda: TextTask(path="./data/nothing.json"))


def test_empty_files_are_refused(tmp_path: Path) -> None:
    for name, content in {
        "a.csv": "",
        "b.csv": "input,target\n",
        "c.jsonl": "",
        "d.json": "[]",
        "e.parquet": "",
    }.items():
        (tmp_path / name).write_text(content)
        message = _refusal(lambda name=name: TextTask(train_file=name, folder=str(tmp_path)))
        assert name in message and ("is empty" in message or "holds no rows" in message)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    contents = {
        "a.parquet": "no parquet",
        "b.jsonl": '{"input": "x"}\n{"input": \n',
        "c.json": '["x"]',
        "d.jsonl": '{"input": "x"}\n{"input": 1}\n',
        "e.txt": "x",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        assert name in _refusal(lambda name=name: TextTask(train_file=name, folder=str(tmp_path)))
    assert "line 2 is not JSON" in _refusal(lambda: TextTask(train_file=str(tmp_path / "b.jsonl")))
    assert "known endings: .parquet" in _refusal(lambda: TextTask(train_file=str(tmp_path / "e.txt")))


def test_a_lacking_column_is_named_with_the_columns_there(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", _numbered(3))
    message = _refusal(lambda: TextTask(train_file=file, columns={**QA, "context": "Text: {pasage}"}))
    assert message == (
        f"{file} has no column 'pasage' (columns.context); it has: passage, question, answer; did you mean 'passage'?"
    )
    assert "no column 'input' (columns.context)" in _refusal(lambda: TextTask(train_file=file))
    message = _refusal(lambda: TextTask(train_file=file, columns={**QA, "instruction": "instruction"}))
    assert "no column 'instruction' (columns.instruction)" in message


def test_a_label_outside_the_list_is_named_with_its_file_and_row(tmp_path: Path) -> None:
    rows = _numbered(20)
    rows[13]["answer"] = "maybe"
    train, test = _write(tmp_path / "train.jsonl", _numbered(5)), _write(tmp_path / "test.csv", rows)
    arguments: dict[str, Any] = {"train_file": train, "test_file": test, "columns": QA, "test_rows": 1}
    message = _refusal(lambda: TextTask(**arguments, labels=["yes", "no"]))
    assert message == f"{test} row 13: label 'maybe' is outside the list (labels: yes, no)"
    message = _refusal(lambda: TextTask(**arguments, label_names={"yes": "Yes", "no": "No"}))
    assert "test.csv row 13: label 'maybe'" in message


def test_missing_and_nested_values_are_named(tmp_path: Path) -> None:
    rows = _numbered(4)
    rows[2]["answer"] = None
    file = _write(tmp_path / "a.jsonl", rows)
    assert "a.jsonl row 2 has no answer" in _refusal(lambda: TextTask(train_file=file, columns=QA))
    nested = _write(tmp_path / "b.jsonl", [{"q": f"{i}", "a": {"text": ["x"] * (1 - i)}} for i in range(2)])
    message = _refusal(lambda: TextTask(train_file=nested, columns={"question": "q", "answer": "a"}))
    assert "b.jsonl row 0 does not fit columns.answer 'a': it holds a dict" in message
    columns = {"question": "q", "answer": "{a[text][0]}"}
    assert "b.jsonl row 1 does not fit" in _refusal(lambda: TextTask(train_file=nested, columns=columns))


def test_two_instructions_in_one_table_are_refused(tmp_path: Path) -> None:
    rows = [{"instruction": f"Do {i // 2}.", "input": f"{i}", "target": "x"} for i in range(4)]
    file = _write(tmp_path / "a.jsonl", rows)
    message = _refusal(lambda: TextTask(train_file=file))
    assert f"{file} row 2: column 'instruction' holds a second instruction, 'Do 1.' beside 'Do 0.'" in message


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None = None, *, split: str) -> datasets.Dataset:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = _refusal(lambda: TextTask(path="fancyzhx/ag_news"))
    assert message.startswith(
        "cannot load split 'test' of 'fancyzhx/ag_news' from the Hugging Face Hub (Couldn't reach"
    )
    assert not datasets.are_progress_bars_disabled()


def test_a_table_that_cannot_be_split_or_is_shared_whole_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", _numbered(3))
    _write(tmp_path / "test.jsonl", _numbered(6))
    assert "every training row shares" in _refusal(lambda: TextTask(path=str(tmp_path), columns=QA))
    file = str(tmp_path / "train.jsonl")
    message = _refusal(lambda: TextTask(path=file, columns={**QA, "group": "passage"}))
    assert "holds one 'passage' only: it cannot be split" in message
    _write(tmp_path / "test.csv", _numbered(6))
    assert "holds split 'test' more than once" in _refusal(lambda: TextTask(path=str(tmp_path), columns=QA))
    assert "holds no file of split 'dev'" in _refusal(
        lambda: TextTask(path=str(tmp_path), test_split="dev", columns=QA)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "path or from train_file"),
        ({"path": "a", "train_file": "b.csv"}, "give one of the two"),
        ({"path": "a", "test_file": "b.csv"}, "test_file 'b.csv' goes with a train_file"),
        ({"train_file": "a.csv", "name": "x"}, "name 'x' goes with path"),
        ({"train_file": "a.csv", "test_file": "a.csv"}, "the test rows would be the training rows"),
        ({"path": "a", "test_split": "train"}, "the test rows would be the training rows"),
        ({"path": "a", "test_fraction": 1.0}, "test_fraction must lie between 0 and 1"),
        ({"path": "a", "train_rows": 0}, "train_rows must be at least 1"),
        ({"path": "a", "columns": {"contxt": "a", "answer": "b"}}, "no role 'contxt'; did you mean 'context'"),
        ({"path": "a", "columns": {"context": "a"}}, "must name the answer and a context or a question"),
        ({"path": "a", "columns": {"context": "{a", "answer": "b"}}, "columns.context is not a valid template"),
        ({"path": "a", "columns": {"context": "{}", "answer": "b"}}, "must name its columns"),
        ({"path": "a", "labels": ["x"]}, "two or more different texts"),
        ({"path": "a", "labels": ["x", "x"]}, "two or more different texts"),
        ({"path": "a", "labels": ["x", " y"]}, "without whitespace around them, got ' y'"),
        ({"path": "a", "labels": ["x", "y"], "label_names": ["x", "z"]}, "label_names gives 'z' for '1'"),
    ],
)
def test_contradictions_are_refused_by_the_constructor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        TextTask(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)

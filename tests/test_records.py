"""Rows on disk: appended, cut back, read, and whole whatever happens while they are written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from continual.storage import records
from continual.storage.records import SCHEMAS, RecordError

EXAMPLES: dict[pa.DataType, Any] = {pa.string(): "x", pa.int64(): 1, pa.float64(): 0.5}


def row(table: str = "scores", **columns: Any) -> dict[str, Any]:
    return {field.name: EXAMPLES[field.type] for field in SCHEMAS[table]} | columns


@pytest.mark.parametrize("table", SCHEMAS)
def test_rows_come_back_as_they_went_in(table: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "seed=1" / "run"  # a directory that looks like a partition is only a name
    first, second = [row(table, task="a"), row(table, task="b", value=1 / 3)], [row(table, task="c", stage=2)]
    records.append(run_dir, table, first)
    records.append(run_dir, table, iter(second))
    assert records.read(run_dir, table).to_dict("records") == first + second
    assert [path.name for path in run_dir.iterdir()] == [f"{table}.parquet"]
    assert records.path_of(run_dir, table) == run_dir / f"{table}.parquet"


@pytest.mark.parametrize("table", SCHEMAS)
def test_a_table_never_written_is_empty_with_its_own_types(table: str, tmp_path: Path) -> None:
    empty = records.read(tmp_path, table)
    assert len(empty) == 0
    records.append(tmp_path, table, [row(table)])
    written = records.read(tmp_path, table)
    assert list(empty.columns) == SCHEMAS[table].names
    assert list(empty.dtypes) == list(written.dtypes)
    records.truncate(tmp_path, 0)
    assert list(records.read(tmp_path, table).dtypes) == list(empty.dtypes)
    assert len(records.read(tmp_path, table)) == 0


def test_truncate_drops_later_stages_from_every_table(tmp_path: Path) -> None:
    for table in ("scores", "routing"):
        records.append(tmp_path, table, [row(table, stage=stage) for stage in (0, 1, 2, 1, 3)])
    records.truncate(tmp_path, 1)
    for table in ("scores", "routing"):
        assert records.read(tmp_path, table)["stage"].tolist() == [0, 1, 1]
    assert not records.path_of(tmp_path, "drift").exists()
    records.truncate(tmp_path, -1)
    assert len(records.read(tmp_path, "scores")) == 0


@pytest.mark.parametrize(
    ("changed", "odd"),
    [({"extra": 1}, "extra"), ({"value": None, "valeu": 1.0}, "valeu")],
)
def test_a_row_that_does_not_fit_is_refused_whole(changed: dict[str, Any], odd: str, tmp_path: Path) -> None:
    records.append(tmp_path, "scores", [row()])
    before = records.path_of(tmp_path, "scores").read_bytes()
    wrong = row() | changed
    with pytest.raises(RecordError, match=f"^scores.parquet: a row's columns differ from the schema in {odd}$"):
        records.append(tmp_path, "scores", [row(), wrong])
    assert records.path_of(tmp_path, "scores").read_bytes() == before


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    short = row()
    del short["seed"]
    with pytest.raises(RecordError, match="differ from the schema in seed$"):
        records.append(tmp_path, "scores", [short])
    assert not list(tmp_path.iterdir())


def test_an_unknown_table_is_named(tmp_path: Path) -> None:
    for call in (lambda: records.append(tmp_path, "score", []), lambda: records.read(tmp_path, "score")):
        with pytest.raises(RecordError, match="^no table named 'score'; there are scores, answers, routing"):
            call()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_file_cut_short_gives_one_line_that_names_it(share: float, tmp_path: Path) -> None:
    records.append(tmp_path, "scores", [row()] * 50)
    path = records.path_of(tmp_path, "scores")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    for call in (
        lambda: records.read(tmp_path, "scores"),
        lambda: records.append(tmp_path, "scores", [row()]),
        lambda: records.truncate(tmp_path, 0),
    ):
        with pytest.raises(RecordError) as raised:
            call()
        assert str(raised.value).startswith(f"{path}: not a readable parquet file (")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", ["drop", "rename", "retype"])
def test_a_file_with_other_columns_is_refused(change: str, tmp_path: Path) -> None:
    records.append(tmp_path, "scores", [row()])
    path = records.path_of(tmp_path, "scores")
    table = pq.read_table(path)
    if change == "drop":
        table = table.drop_columns(["count"])
    elif change == "rename":
        table = table.rename_columns([name.replace("count", "rows") for name in table.column_names])
    else:
        table = table.set_column(table.column_names.index("count"), "count", pa.array(["1"]))
    pq.write_table(table, path)
    with pytest.raises(RecordError, match=r"scores.parquet: the file's columns differ from the schema in .*count"):
        records.read(tmp_path, "scores")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.append(tmp_path, "scores", [row()])
    write = pq.write_table

    def killed(table: pa.Table, path: Path, **options: Any) -> None:
        write(table, path, **options)
        Path(path).write_bytes(Path(path).read_bytes()[:40])
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        records.append(tmp_path, "scores", [row(stage=2)])
    with pytest.raises(KeyboardInterrupt):
        records.truncate(tmp_path, 0)
    assert records.read(tmp_path, "scores").to_dict("records") == [row()]
    monkeypatch.undo()
    records.append(tmp_path, "scores", [row(stage=3)])
    assert records.read(tmp_path, "scores")["stage"].tolist() == [1, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_importing_records_imports_no_torch() -> None:
    code = (
        "import sys, continual.storage.records; "
        "print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root())
    assert done.stdout.strip() == "[]"


def _root() -> Path:
    return Path(__file__).resolve().parents[1]


def test_replace_takes_the_place_of_the_same_rows_alone(tmp_path: Path) -> None:
    same = ["stage", "task"]
    records.replace(tmp_path, "scores", [row(task="a", value=1.0), row(task="b", value=2.0)], same)
    records.replace(tmp_path, "scores", [row(task="b", value=3.0), row(task="c"), row(task="b", stage=2)], same)
    found = records.read(tmp_path, "scores")[["task", "stage", "value"]].to_numpy().tolist()
    assert found == [["a", 1, 1.0], ["b", 1, 3.0], ["c", 1, 0.5], ["b", 2, 0.5]]
    records.replace(tmp_path, "scores", [], same)
    assert len(records.read(tmp_path, "scores")) == 4

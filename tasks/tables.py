"""Tables of text: read from local files or the Hugging Face Hub, and the columns or templates taken from them."""

from __future__ import annotations

import csv
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.base import TaskError, near_names, one_line

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")

_BATCH_ROWS = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Field:
    """What a role (context, question, answer and so on) or a list of choices is taken from.

    Attributes:
        role: What messages call it, such as "columns.answer".
        spec: A column's name, or a format template such as "Premise: {premise}" or "{answers[text][0]}". A list is
            written with what stands behind the colon between its items, ", " by default: "{entities:; }".
        columns: The columns that ``spec`` needs.
    """

    role: str
    spec: str
    columns: tuple[str, ...]

    @classmethod
    def parse(cls, role: str, spec: str) -> Field:
        """Read ``spec``; a brace in it makes it a template.

        Raises:
            TaskError: If a template is malformed or names no column.
        """
        if "{" not in spec and "}" not in spec:
            return cls(role, spec, (spec,))
        try:
            named = [name for _, name, _, _ in string.Formatter().parse(spec) if name is not None]
        except ValueError as error:
            raise TaskError(f"{role} is not a valid template ({error}): {spec!r}") from None
        columns = tuple(dict.fromkeys(re.split(r"[.\[]", name)[0] for name in named))
        if not columns or any(not column or column.isdigit() for column in columns):
            raise TaskError(f"{role} is a template that must name its columns, as in '{{text}}': {spec!r}")
        return cls(role, spec, columns)

    def render(self, values: dict[str, Any]) -> str:
        """Return the text for one row's ``values`` of ``columns``; a null counts as the empty text."""
        if self.columns == (self.spec,):
            return _as_text(values[self.spec])
        return self.spec.format(**{name: _formattable(value) for name, value in values.items()}).strip()

    def items(self, values: dict[str, Any]) -> list[str]:
        """Return the texts of a list that is a column ("options") or lies in one ("{choices[text]}").

        What is no list gives one text, as ``render`` writes it; an empty text gives none.
        """
        alone = re.fullmatch(r"\{([^{}:!]+)\}", self.spec)
        if self.columns == (self.spec,) or alone:
            name = alone[1] if alone else self.spec
            found = string.Formatter().get_field(name, (), values)[0] if alone else values[name]
            if isinstance(found, list | tuple):
                return [_as_text(item) for item in found]
        text = self.render(values)
        return [text] if text else []


@dataclass(frozen=True)
class Table:
    """Rows with the name that messages give them.

    Attributes:
        source: The file, or the Hub id and split.
        data: The rows.
    """

    source: str
    data: Dataset

    def check(self, field: Field) -> None:
        """Raise TaskError if a column that ``field`` needs is lacking."""
        for column in field.columns:
            if column not in self.data.column_names:
                raise TaskError(
                    f"{self.source} has no column {column!r} ({field.role}); "
                    f"it has: {', '.join(self.names)}{near_names(column, self.names)}"
                )

    @property
    def names(self) -> list[str]:
        """The columns' names."""
        return list(self.data.column_names)

    def texts(self, field: Field | None, rows: Sequence[int]) -> list[str]:
        """Return the text of ``field`` for ``rows``; without a field, empty texts.

        Raises:
            TaskError: If a row's value is no plain value, or does not fit the template.
        """
        return [""] * len(rows) if field is None else self._taken(field, rows, field.render)

    def items(self, field: Field, rows: Sequence[int]) -> list[list[str]]:
        """Return the texts of the list that ``field`` is in each of ``rows``; raises as ``texts`` does."""
        return self._taken(field, rows, field.items)

    def _taken(self, field: Field, rows: Sequence[int], take: Callable[[dict[str, Any]], T]) -> list[T]:
        data = self.data.select_columns(list(field.columns))
        found: list[T] = []
        for chunk in chunks(rows, _BATCH_ROWS):
            batch: dict[str, list[Any]] = data[list(chunk)]
            for row, *values in zip(chunk, *(batch[column] for column in field.columns), strict=True):
                try:
                    found.append(take(dict(zip(field.columns, values, strict=True))))
                except (TypeError, ValueError, LookupError, AttributeError) as error:
                    raise TaskError(
                        f"{self.source} row {row} does not fit {field.role} {field.spec!r}: {one_line(error)}"
                    ) from None
        return found


def chunks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Cut ``rows`` into pieces of at most ``size``."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def read_file(path: Path) -> Table:
    """Read a parquet, json (list or lines), jsonl, csv or tsv file into memory; no cache is written.

    Values of csv and tsv files stay texts, as they stand: nothing is guessed to be a number or missing ("None", "NA").

    Raises:
        TaskError: If the file is missing, of another kind, unreadable or without rows.
    """
    if not path.is_file():
        raise TaskError(f"no file {str(path)!r}{_near_files(path)}")
    if path.suffix not in SUFFIXES:
        raise TaskError(f"{path} is of no known kind; known endings: {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise TaskError(f"{path} is empty")
    try:
        data = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv}.get(path.suffix, _json)(path)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:  # pyarrow's, pandas' and json's among these
        raise TaskError(f"cannot read {path}: {one_line(error)}") from None
    if len(data) == 0:
        raise TaskError(f"{path} holds no rows")
    return Table(str(path), data)


def read_folder(folder: Path, name: str | None, split: str) -> Table:
    """Read one split from a folder of split files.

    Looked for, in the folder, its sub-folder ``name`` and the sub-folder "data" of each: train.parquet,
    train-00000-of-00002.parquet (the Hub's shards) and, with a name, NAME.train.parquet; any known ending.

    Raises:
        TaskError: If no file, or files of several kinds, hold the split; or as ``read_file``.
    """
    from datasets import concatenate_datasets

    prefix = f"({re.escape(name)}[.])?" if name else ""
    stem = re.compile(prefix + re.escape(split) + r"(-\d+-of-\d+)?")
    homes = [home for base in ([folder / name, folder] if name else [folder]) for home in (base, base / "data")]
    for home in homes:
        files = sorted(path for path in home.glob("*") if path.suffix in SUFFIXES and stem.fullmatch(path.stem))
        if len({path.suffix for path in files}) > 1:
            raise TaskError(f"{home} holds split {split!r} more than once: {', '.join(path.name for path in files)}")
        if files:
            tables = [read_file(path) for path in files]
            return Table(tables[0].source, concatenate_datasets([table.data for table in tables]))
    raise TaskError(
        f"folder {str(folder)!r} holds no file of split {split!r} (looked for {split}.parquet and the like)"
    )


def read_hub(path: str, name: str | None, split: str) -> Table:
    """Load one split of a data set of the Hugging Face Hub, through the library's own cache.

    Raises:
        TaskError: If it cannot be loaded, for whatever reason.
    """
    import datasets

    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # not found, gated, no network, bad split: the Hub's errors share no base class
        raise TaskError(
            f"cannot load split {split!r} of {path!r} from the Hugging Face Hub ({one_line(error)}); "
            "a local file or folder in its place works too"
        ) from None
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    source = f"{path} (split {split!r})"
    if not isinstance(data, datasets.Dataset) or len(data) == 0:
        raise TaskError(f"{source} holds no rows")
    return Table(source, data)


def _as_text(value: Any) -> str:
    """Return a plain value as text: null and NaN as "", 1.0 as "1" (an integer column with nulls comes as floats)."""
    if value is None or value != value:  # NaN, as pandas writes a missing number
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value).strip()
    raise TypeError(f"it holds a {type(value).__name__}; a template such as '{{column[key]}}' reaches into it")


class _Items(list):
    """A list that a template writes as its items, with what stands behind the template's colon between them."""

    def __format__(self, between: str) -> str:
        return (between or ", ").join(_as_text(item) for item in self)


def _formattable(value: Any) -> Any:
    """Return a value as templates take it: null as "", and every list in it, however deep, as its items."""
    if isinstance(value, dict):
        return {key: _formattable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return _Items(_formattable(item) for item in value)
    return "" if value is None else value


def _near_files(path: Path) -> str:
    """Return the hint for a missing file: its folder is missing too, or holds files of near names."""
    if not path.parent.is_dir():
        return f" (nor a folder {str(path.parent)!r})"
    return near_names(path.name, [one.name for one in path.parent.iterdir() if one.suffix in SUFFIXES])


def _parquet(path: Path) -> Dataset:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    table = pyarrow.parquet.read_table(path)
    for index, field in enumerate(table.schema):
        if pyarrow.types.is_dictionary(field.type):  # pandas writes categories so, and Dataset cannot take them
            table = table.set_column(index, field.name, table.column(index).cast(field.type.value_type))
    return Dataset(table)


def _csv(path: Path) -> Dataset:
    from datasets import Dataset

    with open(path, newline="", encoding="utf-8-sig") as file, _fields_of_any_length():
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            names = next(reader)
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"line 1 names the column {twice[0]!r} twice")
            columns: dict[str, list[str]] = {name: [] for name in names}
            line = reader.line_num
            for fields in reader:
                first, line = line + 1, reader.line_num  # a quoted field may go over several lines
                if len(fields) not in (0, len(names)):
                    raise ValueError(
                        f"line {first} has {len(fields)} fields and the header {len(names)}: put quotes around a "
                        "field that holds the separator"
                    )
                for name, field in zip(names, fields, strict=False):
                    columns[name].append(field)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None
    return Dataset.from_dict(columns)


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lift the limit of Python's csv on a field's length, which is the process's, inside the ``with``."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _json(path: Path) -> Dataset:
    from datasets import Dataset

    text = path.read_text(encoding="utf-8-sig").strip()
    if path.suffix == ".json" and text.startswith("["):
        rows = json.loads(text)
    else:
        # Not splitlines: it also cuts at separators that JSON allows inside a text.
        rows = [_json_line(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold one JSON object for each row")
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def _json_line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from None

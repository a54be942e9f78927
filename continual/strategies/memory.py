"""Training rows kept between stages: a reservoir that is a fair sample of everything seen, or balanced over classes.

Reservoir sampling: Vitter 1985, algorithm R: row n of the stream enters a memory of m rows with probability m / n, in
the place of a random one, so that each row seen so far is kept with the same probability m / n.
Class-balanced: Chrysakis & Moens 2020, 'Online Continual Learning from Imbalanced Data', algorithm 1: once the memory
is full, a row of a class that was never the largest takes the place of one of the largest class; any other row enters
with probability (kept of its class) / (seen of its class), in the place of one of its own class.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Sampler

from continual.data.batch import Row

_Item = TypeVar("_Item")

_SCHEMA = pa.schema(
    [
        ("stage", pa.int32()),
        ("instruction", pa.dictionary(pa.int32(), pa.string())),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("x", pa.list_(pa.float32())),
        ("y", pa.float32()),
    ]
)


@dataclass(eq=False)  # equal only to itself, so that what goes with a row can be looked up by it
class Kept:
    """A row in memory: encoded, without the text that it came from."""

    row: Row
    stage: int

    @classmethod
    def of(cls, row: Row, stage: int) -> Kept:
        """Keep of a row what training needs: token ids, or the numbers of a regression."""
        numbers = {name: row.source[name] for name in ("x", "y") if name in row.source}
        return cls(Row(numbers, row.instruction, row.prompt_ids, row.answer_ids), stage)

    @cached_property
    def label(self) -> str:
        """The class: the stage and its answer's token ids."""
        return f"{self.stage}:{' '.join(map(str, self.row.answer_ids))}"


@dataclass
class RowMemory:
    """At most ``size`` rows of all stages so far.

    Attributes:
        size: Rows at most.
        class_balanced: Fill it evenly over classes, not in the proportions of the stream.
        items: The rows kept.
        seen: Rows seen so far, by class; under one key where classes do not matter.
        full: Classes that once were the largest.
    """

    size: int
    class_balanced: bool = False
    items: list[Kept] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    full: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.items)

    def add(self, rows: Iterable[Row], stage: int, rng: random.Random) -> None:
        """Show the memory the rows of a stage, one after another."""
        for row in rows:
            item = Kept.of(row, stage)
            self.seen[item.label if self.class_balanced else ""] += 1
            if len(self.items) < self.size:
                self.items.append(item)
            elif (place := self._place_of(item, rng)) is not None:
                self.items[place] = item

    def _place_of(self, item: Kept, rng: random.Random) -> int | None:
        """Return the place that a row takes in a full memory; None where it is passed over."""
        if not self.class_balanced:
            place = rng.randrange(self.seen[""])
            return place if place < self.size else None
        kept = Counter(other.label for other in self.items)
        most = max(kept.values())
        self.full |= {label for label, count in kept.items() if count == most}
        label = item.label
        if label not in self.full:
            largest = [place for place, other in enumerate(self.items) if kept[other.label] == most]
            return rng.choice(largest)
        own = [place for place, other in enumerate(self.items) if other.label == label]
        return rng.choice(own) if own and rng.random() <= len(own) / self.seen[label] else None

    # -- on disk ------------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Write the memory as ``rows.parquet``."""
        rows = [
            {
                "stage": item.stage,
                "instruction": item.row.instruction,
                "prompt_ids": item.row.prompt_ids,
                "answer_ids": item.row.answer_ids,
                "x": item.row.source.get("x"),
                "y": item.row.source.get("y"),
            }
            for item in self.items
        ]
        state = json.dumps({"seen": self.seen, "full": sorted(self.full)})
        table = pa.Table.from_pylist(rows, schema=_SCHEMA).replace_schema_metadata({"memory": state})
        pq.write_table(table, folder / "rows.parquet", compression="zstd")

    def read(self, folder: Path) -> None:
        """Take up what ``write`` wrote."""
        table = pq.read_table(folder / "rows.parquet", partitioning=None)  # type: ignore[arg-type]
        state = json.loads(table.schema.metadata[b"memory"])
        self.seen, self.full = Counter(state["seen"]), set(state["full"])
        self.items = []
        for row in table.to_pylist():
            numbers = {} if row["x"] is None else {"x": row["x"], "y": row["y"]}
            self.items.append(
                Kept(Row(numbers, row["instruction"], row["prompt_ids"], row["answer_ids"]), row["stage"])
            )


def in_rounds(items: Sequence[_Item], rng: random.Random) -> Iterator[_Item]:
    """Yield items for ever, at random, each once before any comes again."""
    while True:
        yield from rng.sample(items, len(items))


class MixedBatches(Sampler[list[int]]):
    """Batches of new rows, each with ``num_old`` rows of the memory behind them; as many batches as without.

    Args:
        batches: Batches of new rows.
        first: Index of the memory's first row; its rows stand behind the new ones.
        num_kept: Rows in the memory.
        num_old: Rows of the memory in a batch.
        seed: Decides which; each row of the memory comes once before any comes again.
    """

    def __init__(self, batches: Sampler[list[int]], first: int, num_kept: int, num_old: int, seed: int) -> None:
        self.batches, self.first, self.num_kept, self.num_old = batches, first, num_kept, num_old
        self.rng = random.Random(seed)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        old = in_rounds(range(self.first, self.first + self.num_kept), self.rng)
        for batch in self.batches:
            yield [*batch, *(next(old) for _ in range(self.num_old))]

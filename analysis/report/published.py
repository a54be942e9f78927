"""Scores that papers publish for the six orders of four and fifteen tasks: given as published, never as measured.

The orders are O-LoRA's (arXiv 2310.14152): configs/published/order1.yaml to order6.yaml. Each number is the final
average accuracy in per cent, a mean over orders 1 to 3 or 4 to 6 unless one order is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.report.content import ReportTable, TableCell, cell, make_table
from analysis.summaries.summary import Summary

FEW, MANY = (1, 2, 3), (4, 5, 6)
T5, LLAMA = "T5-large", "Llama-2-7B"


ORDERS: dict[tuple[str, ...], int] = {
    tuple(stages.split()): number
    for number, stages in {
        1: "dbpedia amazon yahoo agnews",
        2: "dbpedia amazon agnews yahoo",
        3: "yahoo amazon agnews dbpedia",
        4: "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo",
        5: "multirc boolq wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo",
        6: "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic",
    }.items()
}
"""The orders by their stages, as configs/published names them."""


@dataclass(frozen=True)
class PublishedScore:
    """One published number: the method, the orders it is a mean over, per cent, the backbone, and where it stands."""

    method: str
    orders: tuple[int, ...]
    percent: float
    backbone: str
    source: str
    forgetting_percent: float | None = None


def _pair(method: str, few: float, many: float, source: str) -> tuple[PublishedScore, PublishedScore]:
    return PublishedScore(method, FEW, few, T5, source), PublishedScore(method, MANY, many, T5, source)


_OLORA = "arXiv 2310.14152"
ROWS: tuple[PublishedScore, ...] = (
    *_pair("SeqFT", 28.5, 7.4, _OLORA),
    *_pair("SeqLoRA", 43.7, 1.6, _OLORA),
    *_pair("replay", 57.8, 54.2, _OLORA),
    *_pair("EWC", 50.3, 45.1, _OLORA),
    *_pair("L2P", 60.7, 56.1, _OLORA),
    *_pair("LFPT5", 72.7, 69.2, _OLORA),
    *_pair("O-LoRA", 75.8, 69.6, _OLORA),
    *_pair("LB-CL", 76.7, 69.2, "Learn more, but bother less (NeurIPS 2024)"),
    *_pair("N-LoRA", 78.8, 72.4, "arXiv 2410.10179"),
    *_pair("MIGU + FT", 78.8, 73.8, "arXiv 2406.17245"),
    *_pair("GORP", 79.8, 76.0, "arXiv 2507.02503"),
    PublishedScore("GainLoRA", (6,), 78.0, T5, "arXiv 2505.15424", 0.8),
    PublishedScore("GainLoRA", (4,), 77.5, T5, "arXiv 2505.15424", 1.2),
    *_pair("all tasks at once (MTL)", 80.0, 76.5, _OLORA),
    PublishedScore("O-LoRA", FEW, 76.1, LLAMA, "arXiv 2507.02503"),
    PublishedScore("N-LoRA", FEW, 77.6, LLAMA, "arXiv 2507.02503"),
    PublishedScore("GORP", FEW, 78.6, LLAMA, "arXiv 2507.02503"),
)


def order_number(name: str, stages: Sequence[str] = ()) -> int | None:
    """Return which published order this is, by its stages or by a name: 4 for order4, order4-1a2b3c, or a path."""
    found = re.fullmatch(r"(?:.*/)?order([1-6])(?:-[0-9a-f]+)?(?:\.ya?ml)?", name)
    return ORDERS.get(tuple(stages)) or (int(found.group(1)) if found else None)


@dataclass(frozen=True)
class Measured:
    """One of our numbers beside them: the method, its orders, the mean final score in [0, 1], and the backbone."""

    method: str
    orders: tuple[int, ...]
    score: float | None
    backbone: str


def table(measured: Iterable[Measured]) -> ReportTable | None:
    """Return our numbers above the published ones of the same orders, or None where no order is a published one."""
    ours = list(measured)
    orders = {order for row in ours for order in row.orders}
    if not orders:
        return None
    rows = [
        [
            TableCell(row.method),
            cell(None if row.score is None else 100 * row.score, 1),
            cell(None),
            _orders(row.orders),
            TableCell(row.backbone),
            TableCell("measured here"),
        ]
        for row in ours
    ]
    for row in ROWS:
        if orders & set(row.orders):
            source = TableCell(f"published, not measured here: {row.source}")
            numbers = [cell(row.percent, 1), cell(row.forgetting_percent, 1)]
            rows.append([TableCell(row.method), *numbers, _orders(row.orders), TableCell(row.backbone), source])
    note = "Final average accuracy and forgetting in per cent. The published rows are copied from the papers: another "
    note += "backbone, other prompts, rows and seeds, so a difference from ours says little of the methods. Baselines "
    note += "there are often untuned: SeqFT goes from 22.2 to 75.7 with its learning rate (arXiv 2406.17245, Table 9)."
    columns = ["method", "accuracy (%)", "forgetting (%)", "orders", "backbone", "where from"]
    return make_table("published", "Published for these orders", columns, rows, note)


def _orders(orders: tuple[int, ...]) -> TableCell:
    text = str(orders[0]) if len(orders) == 1 else f"{orders[0]} to {orders[-1]}"
    whole = orders == tuple(range(orders[0], orders[-1] + 1))
    return TableCell(text if whole else ", ".join(map(str, orders)))


def published_table(summary: Summary) -> ReportTable | None:
    """Return the published table for one run, or None where the run is of no published order."""
    run, order = summary.run, order_number(summary.run.name, summary.run.stages)
    if order is None:
        return None
    adapter = str(run.model.get("adapter") or "this run").rsplit(".", 1)[-1]
    score = summary.values["average_accuracy"] if run.complete else None
    return table([Measured(adapter, (order,), score, str(run.model.get("backbone") or "–"))])

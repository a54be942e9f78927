"""A sweep's methods under reworded prompts and their routes: by hand, by brute force, and where data are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sweep_files import place, write_cell, write_sweep

from analysis.figures import sweeps as plots
from analysis.report.study_content import study_parts
from analysis.report.study_extras import kind_name, measures_by_method
from analysis.summaries import studies
from analysis.summaries.sweep_wordings import wording_differences
from analysis.summaries.sweeps import Sweep, load_sweep
from continual.storage import records

TASKS = ["one", "two"]
ROWS = 40


def earned(seed: int, level: float) -> np.ndarray:
    return (np.random.default_rng(seed).random((3, 2, ROWS)) < level).astype(float)


def put_in_words(cell: Path, seed: int, level: float, kinds: list[tuple[str, str, str]]) -> dict[Any, np.ndarray]:
    """Add scores under reworded prompts to a cell; returns what each row earned, by wording and task."""
    found, rows, scores = {}, [], []
    for number, (name, where, options) in enumerate(kinds):
        for task in TASKS:
            values = (np.random.default_rng([seed, number, len(task), ord(task[0])]).random(ROWS) < level).astype(float)
            found[name, where, options, task] = values
            keys = {"run": cell.name, "seed": seed, "stage": 2, "task": task}
            words = {"wording": name, "where": where, "options": options}
            rows += [keys | words | {"row": row, "value": value} for row, value in enumerate(values)]
            share = {"metric": "abstained", "direction": "none", "value": 0.1 * (number + 1), "count": ROWS}
            scores.append(keys | words | share)
    records.append(cell, "wording_answers", rows)
    records.append(cell, "wordings", scores)
    return found


PAIR = [("file-1", "both", "kept"), ("file-2", "both", "kept"), ("none", "both", "kept")]


@pytest.fixture
def worded(tmp_path: Path) -> tuple[Sweep, dict[Any, np.ndarray], dict[Any, np.ndarray]]:
    """Two methods of two orders, in two paraphrases and without an instruction; one cell was never put in words."""
    cells, words, finals = [], {}, {}
    for method, level in (("bank", 0.9), ("lora", 0.6)):
        for order, seed in (("a", 0), ("a", 1), ("b", 0)):
            entry = place(method, order, seed)
            cells.append(entry)
            values = earned(seed + 10 * len(method) + ord(order), level)
            write_cell(tmp_path / entry["dir"], TASKS, values, seed)
            finals[method, order, seed] = values[-1]
            if (method, order, seed) != ("lora", "a", 1):
                words[method, order, seed] = put_in_words(tmp_path / entry["dir"], seed, level - 0.2, PAIR)
    return load_sweep(write_sweep(tmp_path, cells, baseline="bank")), words, finals


def table(sweep: Sweep) -> pd.DataFrame:
    cells, problems = studies.load_cells(sweep, ("wordings", "wording_answers"))
    assert problems == []
    return wording_differences(sweep, cells["wording_answers"], cells["wordings"])


def test_means_over_orders_seeds_tasks_and_rows(worded: tuple) -> None:
    sweep, words, finals = worded
    frame = table(sweep).set_index(["words", "method"])

    def mean(method: str, cells: list[tuple[str, int]], source: Any) -> float:
        by_order: dict[str, list[float]] = {}
        for order, seed in cells:
            by_order.setdefault(order, []).append(float(np.mean([source((method, order, seed), t) for t in TASKS])))
        return float(np.mean([np.mean(values) for values in by_order.values()]))

    cells = {"bank": [("a", 0), ("a", 1), ("b", 0)], "lora": [("a", 0), ("b", 0)]}
    both = lambda key, t: np.mean([words[key][f"file-{i}", "both", "kept", t].mean() for i in (1, 2)])  # noqa: E731
    for method, own in cells.items():
        row = frame.loc[("file", method)]
        assert (row["cells"], row["num_tasks"]) == (len(own), 2)
        assert row["score"] == pytest.approx(mean(method, own, both))
        trained = mean(method, own, lambda key, t: finals[key][TASKS.index(t)].mean())
        assert row["trained"] == pytest.approx(trained)
        assert row["difference"] == pytest.approx(row["score"] - trained)
        assert row["low"] < row["difference"] < row["high"]
    apart = mean("lora", cells["lora"], both) - mean("bank", cells["lora"], both)
    assert frame.loc[("file", "lora"), "apart"] == pytest.approx(apart)
    assert frame.loc[("file", "lora"), "verdict"] == "below" and frame.loc[("file", "bank"), "verdict"] == ""
    assert np.isnan(frame.loc[("file", "bank"), "apart"])
    assert frame["abstained"].to_dict() == pytest.approx(
        {("file", "bank"): 0.15, ("file", "lora"): 0.15, ("none", "bank"): 0.3, ("none", "lora"): 0.3}
    )


def test_a_pair_in_the_same_words_cancels_what_both_lose(tmp_path: Path) -> None:
    cells = [place(method, "a", seed) for method in ("bank", "twin") for seed in (0, 1)]
    for entry in cells:
        write_cell(tmp_path / entry["dir"], TASKS, earned(entry["seed"], 0.9), entry["seed"])
        put_in_words(tmp_path / entry["dir"], entry["seed"], 0.5, PAIR[:1])
    frame = table(load_sweep(write_sweep(tmp_path, cells, baseline="bank"))).set_index("method")
    assert frame.loc["twin", ["apart", "apart_low", "apart_high"]].tolist() == [0, 0, 0]
    assert frame.loc["twin", "verdict"] == "not told apart"
    assert (frame["high"].to_numpy() < 0).all()


def test_a_report_shows_rewordings_where_there_are_any(worded: tuple) -> None:
    sweep, _, _ = worded
    parts = study_parts(sweep)
    assert "words" in [key for key, *_ in parts.sections]
    content = next(content for content in parts.report_figures if content.name == "words_by_method")
    assert content.draw is not None
    figure = content.draw()
    assert [ax.get_title() for ax in figure.axes] == ["file, prompt and gate", "no instruction"]
    lines = parts.tables["words_by_method"][0].rows
    assert [[cell.text for cell in line[:2]] for line in lines] == [
        [kind, method] for kind in ("file, prompt and gate", "no instruction") for method in ("bank", "lora")
    ]
    assert lines[0][9].text == "15.0%" and lines[0][7].text == "baseline" and lines[1][8].text == "below"


def test_a_sweep_without_rewordings_or_routes_has_no_such_sections(tmp_path: Path) -> None:
    entry = place("lora", "a", 0)
    write_cell(tmp_path / entry["dir"], TASKS, earned(0, 0.9))
    sweep = load_sweep(write_sweep(tmp_path, [entry]))
    assert not {"words", "routes"} & {key for key, *_ in study_parts(sweep).sections}
    assert table(sweep).empty


def test_gates_and_untouched_text_are_means_over_cells(tmp_path: Path) -> None:
    cells = [place("bank", "a", seed) for seed in (0, 1)] + [place("lora", "a", 0)]
    for entry in cells:
        folder = tmp_path / entry["dir"]
        write_cell(folder, TASKS, earned(entry["seed"], 0.9), entry["seed"])
        keys = {"run": folder.name, "seed": entry["seed"]}
        nats = [-3.0, -3.0, -3.3 if entry["method"] == "lora" else -3.0]
        value = {"metric": "log_likelihood_nats", "direction": "higher", "count": 9}
        text = [keys | {"stage": stage, "task": "general"} | value | {"value": at} for stage, at in enumerate(nats)]
        records.append(folder, "general", text)
        if entry["method"] == "bank":
            home = {"metric": "routed_home", "direction": "none", "count": ROWS}
            for stage, shares in ((1, (0.1, 0.1)), (2, (0.9, 0.7 + 0.1 * entry["seed"]))):
                rows = [
                    keys | {"stage": stage, "task": task} | home | {"value": share}
                    for task, share in zip(TASKS, shares, strict=True)
                ]
                records.append(folder, "scores", rows)
    sweep = load_sweep(write_sweep(tmp_path, cells))
    scores, _ = studies.load_cells(sweep, ("scores",))
    frame = measures_by_method(sweep, scores["scores"], problems := []).set_index("method")
    assert problems == [] and frame["cells"].to_dict() == {"bank": 2, "lora": 1}
    assert frame.loc["bank", "routed_home"] == pytest.approx((0.8 + 0.85) / 2)  # of the last stage alone
    assert frame["general_ability_change"].to_dict() == pytest.approx({"bank": 0.0, "lora": -0.1})
    assert np.isnan(frame.loc["lora", "routed_home"]) and frame["moved_since_trained"].isna().all()
    (found,) = study_parts(sweep).tables["routes"]
    assert found.columns == ["method", "cells", "learning accuracy", "rows sent home", "untouched text"]
    assert [cell.text for cell in found.rows[1][3:]] == ["–", "−10.0%"]


def test_kinds_have_names() -> None:
    assert kind_name("none", "both", "kept") == "no instruction"
    assert kind_name("file", "gate", "dropped") == "file, gate alone, options dropped"


def test_many_kinds_are_drawn_in_even_rows() -> None:
    kinds = [f"kind {number}" for number in range(6)]
    lines = [(kind, method, -0.1, -0.2, 0.01) for kind in kinds for method in ("a", "b")]
    figure = plots.words_by_method(
        pd.DataFrame(lines, columns=["kind", "method", "difference", "low", "high"]), ["b", "c", "a"]
    )
    drawn = [ax for ax in figure.axes if ax.get_visible() and ax.get_title()]
    assert len(drawn) == 6 and [label.get_text() for label in drawn[0].get_yticklabels()] == ["b", "a"]

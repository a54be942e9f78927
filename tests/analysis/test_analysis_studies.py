"""The studies' numbers worked by hand, and their sections in a sweep's report where their data are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sweep_files as files
from hypothesis import given
from hypothesis import strategies as st

from analysis import figures, load_sweep
from analysis.measures.pareto import on_front
from analysis.report import write_report
from analysis.report.study_content import earned
from analysis.summaries import studies
from analysis.summaries.sweeps import ABOVE, BELOW, EVEN
from continual.storage import records


def frame(rows: list[tuple[Any, ...]], columns: str) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns.split())


# ---- the numbers


def test_loss_variance_is_over_the_last_fifth_of_a_stages_steps() -> None:
    rows = [("m", "o", 0, 1, "a", step, "train_loss", float(step**2)) for step in range(10, 0, -1)]
    rows += [("m", "o", 0, 2, "b", step, "train_loss", 1.0) for step in range(1, 4)]  # a fifth of 3 steps is one
    rows += [("m", "o", 0, 1, "a", 10, "grad_norm", 7.0)]
    found = studies.loss_variance(frame(rows, "method order seed stage task step metric value"))
    (row,) = found.to_dict("records")
    assert (row["task"], row["steps"]) == ("a", 2)
    assert row["variance"] == pytest.approx((100 - 81) ** 2 / 2)  # of 81 and 100, unbiased


def test_final_scores_take_each_tasks_own_metric_and_last_stage() -> None:
    rows = [("m", "o", 0, stage, "a", "rmse", 3.0 - stage) for stage in (2, 0, 1)]
    rows += [("m", "o", 0, 2, "a", "r2", 9.0), ("m", "o", 0, 1, "b", "accuracy", 0.5)]
    scores = frame(rows, "method order seed stage task metric value")
    found = studies.final_scores(scores, {"a": "rmse", "b": "accuracy"}).set_index("task")["value"]
    assert found.to_dict() == {"a": 1.0, "b": 0.5}
    assert not len(studies.final_scores(scores, {"a": "none"}))


def test_spread_and_cells_by_hand() -> None:
    finals = frame(
        [("m", "o", seed, "a", value) for seed, value in enumerate((1.0, 3.0))], "method order seed task value"
    )
    (row,) = studies.spread(finals).to_dict("records")
    assert (row["mean"], row["cells"]) == (2.0, 2)
    assert row["deviation"] == pytest.approx(2**0.5)
    both = pd.concat([finals, finals.assign(task="b", value=[5.0, 5.0])])
    assert studies.by_cell(both)["value"].tolist() == [3.0, 4.0]


def test_cells_are_paired_by_order_and_seed() -> None:
    values = [("base", "o", seed, value) for seed, value in enumerate((1.0, 2.0, 3.0))]
    values += [("up", "o", 0, 2.0), ("up", "o", 1, 2.5), ("up", "other", 2, 99.0)]  # the last has no twin
    values += [("down", "o", 2, 1.0), ("even", "o", 0, 0.0), ("even", "o", 1, 4.0)]
    found = studies.paired_by_cell(frame(values, "method order seed value"), "base").set_index("method")
    assert found.loc["up", ["cells", "difference", "verdict"]].tolist() == [2, 0.75, ABOVE]
    assert found.loc["down", "difference"] == -2.0
    assert found.loc["down", "verdict"] == EVEN and np.isnan(found.loc["down", "low"])  # one cell has no interval
    assert found.loc["even", "verdict"] == EVEN
    turned = studies.paired_by_cell(frame(values, "method order seed value"), "up").set_index("method")
    assert turned.loc["base", ["difference", "verdict"]].tolist() == [-0.75, BELOW]


def test_a_front_by_hand() -> None:
    costs, scores = [1, 2, 3, 3, 4, np.nan], [0.5, 0.4, 0.7, 0.6, 0.7, 1.0]
    assert on_front(costs, scores).tolist() == [True, False, True, False, False, False]
    assert on_front([1, 1], [0.5, 0.5]).tolist() == [True, True]  # equals do not beat each other


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_who_is_beaten_is_beaten_by_the_front(points: list[tuple[int, int]]) -> None:
    costs, scores = zip(*points, strict=True)
    front = on_front(costs, scores)
    assert front.any()
    for index, (cost, score) in enumerate(points):
        better = [
            c <= cost and s >= score and (c, s) != (cost, score)
            for (c, s), kept in zip(points, front, strict=True)
            if kept
        ]
        assert any(better) is not bool(front[index])


ADAPTER = "model.adapter.init_args."
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"model.adapter": {"class_path": "peft.LoraConfig"}},
    "whole": {},
    "no_prior": {f"{ADAPTER}prior_weight": 0},
    "detached": {f"{ADAPTER}detach_query": True},
    "smaller": {f"{ADAPTER}r": 2, f"{ADAPTER}prior_weight": 0},
}


def test_an_ablation_is_the_whole_but_for_one_part() -> None:
    assert studies.whole_adapter(METHODS) == "whole"
    assert studies.ablated(METHODS, "whole", "no_prior") == {"prior_weight": 0}
    assert studies.ablated(METHODS, "whole", "smaller") == {} == studies.ablated(METHODS, "whole", "lora")
    assert studies.ablated(METHODS, "no_prior", "whole") == {}
    assert studies.whole_adapter({"a": {}, "b": {f"{ADAPTER}r": 2}}) is None


# ---- the report


def study(directory: Path) -> Path:
    """Write a sweep with all that the studies' sections are drawn from."""
    names = ["sst2-32", "sst2-100", "other"]
    cells, rng = [], np.random.default_rng(0)
    for number, method in enumerate(METHODS):
        for seed in (0, 1, 2):
            cells.append(files.place(method, "base", seed))
            folder = directory / cells[-1]["dir"]
            level = 0.8 - 0.1 * number
            earned_rows = (np.arange(40)[None, None] < np.round(40 * np.full((4, 3, 1), level))).astype(float)
            parts = {"parameters": 10, "flops_per_token": 20, "flops_per_row": 0}
            model: dict[str, Any] = {
                "r": 2 + number,
                "num_atoms": 8,
                "top_k": 2,
                "trainable_parameters": 1000 * (number + 1),
            }
            model["accounting"] = {"A": parts, "total": parts, "lora": parts}
            tasks = {
                name: {"metric": "accuracy", "constant_score": 0.1, "trained_rows": rows}
                for name, rows in zip(names, (32, 100, 7), strict=True)
            }
            more = {"model": model, "tasks": tasks, "milliseconds_a_row": {"3": 1.0 + number}}
            files.write_cell(folder, names, earned_rows, seed, **more)
            key = {"run": folder.name, "seed": seed, "direction": "none", "count": 1}
            gradients, theory = [], []
            for stage, name in enumerate(names, start=1):
                for step in range(1, 21):
                    place = key | {"stage": stage, "task": name, "step": step, "epoch": step // 11}
                    gradients.append(place | {"layer": "", "metric": "train_loss", "value": rng.random()})
                    gradients.append(place | {"layer": "", "metric": "grad_concentration", "value": 1.5})
                    for layer in ("model.layers.0", "model.layers.1", "bank"):
                        gradients.append(place | {"layer": layer, "metric": "grad_norm", "value": 0.3})
                    theory += [
                        place | {"block": 0, "metric": metric, "value": 0.5} for metric in ("update", "operator")
                    ]
            records.append(folder, "gradients", gradients)
            records.append(folder, "theory", theory)
            best = [key | {"stage": s, "task": n} for s, n in enumerate(names, start=1)]
            scored = [row | {"metric": "accuracy_best_training", "value": level + 0.05} for row in best]
            records.append(folder, "scores", scored)
    return files.write_sweep(directory, cells, baseline="lora", methods=METHODS)


FIGURES = {
    "contributions",
    "learning_curves",
    "spread_and_stability",
    "gradient_norms_by_method",
    "concentration_by_epoch",
    "pareto_fronts",
    "theory_bounds",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study(tmp_path_factory.mktemp("study") / "sweep")


def test_every_study_has_its_figure_and_numbers(directory: Path) -> None:
    report = write_report(directory)
    drawn = {path.stem for path in report.with_name("figures").glob("*.png")}
    assert drawn >= FIGURES
    text = report.with_name("report.md").read_text(encoding="utf-8")
    for heading in ("What each part earns", "Few rows", "Stability", "Gradients by method", "Size and speed"):
        assert text.count(f"## {heading}\n") >= 1, heading
    assert "Parameters and FLOPs by component" in text
    assert text.count("### Score, spread and stability") == 1


@pytest.mark.parametrize("count", [6, 7])
def test_many_methods_have_a_panel_each_to_show_their_concentration(count: int) -> None:
    rows = [(f"m{m}", "o", seed, epoch, 2.0 + m + seed) for m in range(count) for seed in (0, 1) for epoch in (1, 2)]
    axes = figures.concentration_by_epoch(frame(rows, "method order seed epoch value"))
    together = count == 6
    assert len(axes) == (1 if together else count)
    for method, ax in enumerate([axes[0]] * count if together else axes):
        lines = {tuple(np.asarray(line.get_ydata())) for line in ax.lines}
        assert (method + 2.5,) * 2 in lines  # the mean over the seeds
        assert len(lines) == count
    if not together:
        assert [ax.get_title() for ax in axes] == [f"m{m}" for m in range(count)]


@pytest.mark.parametrize("count", [6, 7])
def test_many_methods_have_a_panel_each_to_show_their_gradient_norms(count: int) -> None:
    rows = [(f"m{m}", f"model.layers.{depth}", 1.0 + m + depth) for m in range(count) for depth in (1, 0)]
    rows += [(f"m{m}", "bank", 0.5 + m) for m in range(1, count)]  # m0 has no bank
    *layers, bank = figures.norms_by_layer(frame(rows, "method layer value"))
    together = count == 6
    assert len(layers) == (1 if together else count)
    for method, ax in enumerate(layers * count if together else layers):
        assert (1.0 + method, 2.0 + method) in {tuple(np.asarray(line.get_ydata())) for line in ax.lines}
        assert len(ax.lines) == count
    assert bank.get_title() == "bank" and len(bank.patches) == count - 1
    if not together:
        assert [ax.get_title() for ax in layers] == [f"m{m}" for m in range(count)]
        assert [name.get_text() for name in bank.get_yticklabels()] == [f"m{m}" for m in range(count - 1, 0, -1)]
        assert [patch.get_width() for patch in bank.patches] == [0.5 + m for m in range(count - 1, 0, -1)]  # type: ignore[attr-defined]


def test_what_a_part_earns_is_the_whole_minus_the_rest(directory: Path) -> None:
    found = earned(load_sweep(directory)).set_index("method")
    assert set(found.index) == {"no_prior", "detached"}
    assert found.loc["no_prior", "difference"] == pytest.approx(0.1)
    assert found.loc["detached", "difference"] == pytest.approx(0.2)
    assert (found["low"] <= found["difference"]).all() and (found["high"] >= found["difference"]).all()
    assert set(found["verdict"]) == {ABOVE}


def test_what_tuning_chose_is_no_part_of_the_adapter(directory: Path) -> None:
    rate = "model.optimizer.init_args.lr"
    sweep = load_sweep(directory)
    tuned = {method: {**settings, rate: 0.1 * place} for place, (method, settings) in enumerate(sweep.methods.items())}
    chosen = {method: {"settings": {rate: settings[rate]}} for method, settings in tuned.items()}
    told = {"directory": sweep.directory, "methods": tuned, "tuning": chosen}
    assert studies.own_settings(type(sweep)(**(vars(sweep) | told))) == METHODS


def test_curves_are_of_tasks_in_several_sizes(directory: Path) -> None:
    curves = studies.learning_curves(load_sweep(directory))
    assert set(curves["task"]) == {"sst2"} and set(curves["rows"]) == {32, 100}
    assert len(curves) == 5 * 3 * 2


def test_sections_without_data_do_not_stand(tmp_path: Path) -> None:
    report = write_report(
        files.plausible_sweep(tmp_path / "plain", ("growing", "sequential"), 3, ("first",), num_rows=20)
    )
    drawn = {path.stem for path in report.with_name("figures").glob("*.png")}
    assert not drawn & FIGURES
    text = report.with_name("report.md").read_text(encoding="utf-8")
    assert "## Stability" not in text and "accounting" not in text


def test_a_damaged_table_is_named_and_the_rest_stands(tmp_path: Path) -> None:
    directory = study(tmp_path / "sweep")
    cell = json.loads((directory / "sweep.json").read_text())["cells"][0]["dir"]
    path = directory / cell / "gradients.parquet"
    path.write_bytes(path.read_bytes()[:100])
    report = write_report(directory)
    text = report.with_name("report.md").read_text(encoding="utf-8")
    assert f"{cell}: gradients.parquet" in text
    assert {path.stem for path in report.with_name("figures").glob("*.png")} >= FIGURES

"""What atoms are for, hand-worked on frames of a few rows; every figure of every sort of run, and of none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from analysis import Frames, load
from analysis.figures import specialization as plots
from analysis.runs.load import NO_SLICE
from analysis.summaries import specialization as tables
from continual.storage import records

KEYS = {"run": "r", "seed": 0}
TASKS = ["one", "two"]
# Usage of two blocks of three atoms after stage 2; the third atom is nobody's.
USAGE = {"one": [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], "two": [[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]}


def measured(metric: str, value: float) -> dict[str, Any]:
    return {"metric": metric, "direction": "none", "value": value, "count": 4}


def write_manifest(directory: Path, **changes: Any) -> None:
    state = {"run": "r", "seed": 0, "stages": TASKS, "finished_stage": 2, "complete": True} | changes
    state = {"model": {"num_atoms": 3, "adapter": "a.QueryableLoraConfig"}} | state
    (directory / "manifest.json").write_text(json.dumps(state))


def token_rows(stage: int, task: str, said: list[tuple[str, list[list[float]]]]) -> list[dict[str, Any]]:
    """Rows of tokens whose weights are given block by block."""
    return [
        KEYS
        | {"stage": stage, "task": task, "row": place, "place": place, "token": token, "before": f"before {place} "}
        | {"block": block, "atom": atom, "value": value}
        for place, (token, weights) in enumerate(said)
        for block, own in enumerate(weights)
        for atom, value in enumerate(own)
        if value
    ]


def ablation_rows(task: str, metric: str, by_atom: dict[int, tuple[float, list[float]]]) -> list[dict[str, Any]]:
    """Rows of scores and of what each row earned, by the atom taken out."""
    rows = []
    for atom, (score, earned) in by_atom.items():
        key = KEYS | {"stage": 2, "task": task, "atom": atom}
        rows.append(key | {"row": -1} | measured(metric, score))
        rows.append(key | {"row": -1} | measured("changed", float(atom == 0)))
        rows += [key | {"row": row} | measured("answer", value) for row, value in enumerate(earned)]
    return rows


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Frames:
    """The frames of a run of two tasks."""
    directory = tmp_path_factory.mktemp("hand")
    write_manifest(directory)
    routing, drift = [], []
    for stage in range(3):
        for task, blocks in USAGE.items():
            key = KEYS | {"stage": stage, "task": task}
            for block, own in enumerate(blocks):
                now = own if stage == 2 else [1 / 3] * 3
                routing += [key | {"block": block, "atom": m} | measured("usage", u) for m, u in enumerate(now)]
                for metric in ("usage_entropy_nats", "token_entropy_nats"):
                    routing.append(key | {"block": block, "atom": -1} | measured(metric, block * np.log(3)))
            for block, value in ((-1, 9.0), (0, 0.1), (1, 0.3)) if stage else ():
                place = {"reference": "previous", "reference_stage": stage - 1, "block": block}
                drift.append(key | place | measured("js", value))
    records.append(directory, "routing", routing)
    records.append(directory, "drift", drift)
    stale = token_rows(1, "one", [("old", [[0.0, 0.0, 1.0]] * 2)])
    said = [("a b", [[1.0, 0, 0], [0.5, 0.5, 0]])] * 2 + [("\n", [[0, 1.0, 0], [0, 1.0, 0]])] * 2
    records.append(directory, "tokens", [*stale, *token_rows(2, "one", said)])
    labels = {-1: (0.75, [1, 1, 1, 0.0]), 0: (0.0, [0, 0, 0, 0.0]), 1: (0.75, [1, 1, 1, 0.0]), 2: (1.0, [1.0] * 4)}
    numbers = {-1: (0.5, [1.0, 1, 1, 1]), 0: (0.0, [2.0, 2, 2, 2]), 1: (0.5, [1.0] * 4), 2: (0.5, [1.0] * 4)}
    taken = ablation_rows("one", "accuracy", labels) + ablation_rows("two", "r2", numbers)
    records.append(directory, "ablation", taken)
    return load(directory)


def test_usage_and_atoms(frames: Frames) -> None:
    used = tables.usage(frames.routing)
    assert used.index.tolist() == TASKS and used.columns.tolist() == ["0", "1", "2"]
    np.testing.assert_allclose(used.to_numpy(), [[0.75, 0.25, 0], [0.25, 0.75, 0]])
    np.testing.assert_allclose(tables.usage(frames.routing, stage=0).to_numpy(), np.full((2, 3), 1 / 3))
    atoms = tables.atoms(frames.routing)
    np.testing.assert_allclose(atoms["usage"], [0.5, 0.5, 0.0])
    np.testing.assert_allclose(atoms["entropy"], [0.5, 0.5, np.nan])  # 0 in the first block, 1 in the second
    assert atoms["task"].tolist() == ["one", "two", ""] and atoms["dead"].tolist() == [False, False, True]
    np.testing.assert_allclose(atoms["share"], [0.75, 0.75, 0.0])


def test_entropies_sharing_and_drift(frames: Frames) -> None:
    for metric in ("usage_entropy_nats", "token_entropy_nats"):
        np.testing.assert_allclose(tables.entropies(frames.routing, metric).to_numpy(), np.full((2, 3), 0.5))
    (pair,) = tables.sharing(frames.routing).to_dict("records")
    assert (pair["task"], pair["other"], pair["atoms"]) == ("one", "two", "0, 1")
    assert pair["common"] == pytest.approx(0.5) and pair["js"] == pytest.approx(np.log(2) / 2)
    moved = tables.drift(frames.drift)
    assert moved.columns.tolist() == [1, 2]
    np.testing.assert_allclose(moved.to_numpy(), np.full((2, 2), 0.2))  # the mean over blocks, not what block -1 says
    assert tables.drift(frames.drift, "trained").empty


def test_tokens_are_the_latest_samples(frames: Frames) -> None:
    weights = tables.token_weights(frames.tokens).set_index(["atom", "token"])
    assert "old" not in weights.index.get_level_values("token")
    first = weights.loc[("0", "a␣b")]
    assert (first["count"], first["weight"], first["usual"]) == (2, 0.75, 0.375)
    assert first["lift"] == pytest.approx((1.5 - 2 * 0.375) / 4) and first["tasks"] == "one"
    top = tables.top_tokens(frames.tokens, num=2)
    assert top.loc["0"].tolist() == ["0.38", "a␣b 0.75 x2", ""]
    assert top.loc["1"].tolist() == ["0.62", "⏎ 1.00 x2", ""]
    examples = tables.token_examples(frames.tokens, num=1)
    assert examples["text"].tolist() == ["before␣0␣[a␣b]", "before␣2␣[⏎]"]


def test_what_removing_an_atom_costs(frames: Frames) -> None:
    costs = tables.removal(frames.ablation, frames.routing).set_index(["task", "atom"])
    assert costs.index[0] == ("one", "0") and len(costs) == 6
    assert len(tables.removal(frames.ablation, num=2)) == 2
    dear = costs.loc[("one", "0")]
    assert (dear["whole"], dear["without"], dear["cost"], dear["changed"], dear["usage"]) == (0.75, 0, 0.75, 1, 0.75)
    assert 0 < dear["low"] < 0.75 < dear["high"] <= 1
    free, better = costs.loc[("one", "1")], costs.loc[("one", "2")]
    assert (free["cost"], free["low"], free["high"]) == (0, 0, 0)
    assert better["cost"] == -0.25 and better["low"] < -0.25 < better["high"] == 0
    number = costs.loc[("two", "0")]  # the same for each row: nothing to be unsure of
    assert number["cost"] == 0.5 and (number["low"], number["high"]) == pytest.approx((0.5, 0.5))


def every_figure(frames: Frames) -> list[Axes]:
    routing, ablation = frames.routing, frames.ablation
    return [
        plots.usage_map(routing),
        plots.specialists(routing),
        plots.entropy_map(routing),
        plots.sharing_graph(routing),
        plots.drift_map(frames.drift),
        plots.drift_map(frames.drift, "trained"),
        plots.token_map(frames.tokens),
        plots.removal_map(ablation),
        plots.removal_against_usage(tables.removal(ablation, routing)),
    ]


def every_table(frames: Frames) -> list[pd.DataFrame]:
    routing, ablation = frames.routing, frames.ablation
    made = [tables.overview(frames), tables.usage(routing), tables.atoms(routing), tables.entropies(routing)]
    made += [tables.sharing(routing), tables.drift(frames.drift), tables.top_tokens(frames.tokens)]
    return made + [tables.token_examples(frames.tokens), tables.removal(ablation), tables.removal(ablation, routing)]


def test_figures_say_what_they_draw(frames: Frames) -> None:
    axes = every_figure(frames)
    assert all(isinstance(ax, Axes) and ax.figure is not None for ax in axes)
    usage, drift, removal = axes[0], axes[4], axes[7]
    np.testing.assert_allclose(usage.collections[0].get_array().ravel(), [0.75, 0.25, 0, 0.25, 0.75, 0])  # type: ignore[union-attr]
    assert [label.get_text() for label in usage.get_yticklabels()] == TASKS
    assert len(drift.patches) == 2  # a frame for each stage that trained its task
    assert len(removal.patches) == 2  # the sure costs of atom 0; atom 2's gain may be the rows' luck


@pytest.mark.parametrize("finished", [-1, 0, 1, 3])
def test_a_run_still_going_and_one_of_many_atoms(finished: int, make_run: Any) -> None:
    frames = load(make_run(names=["a", "b", "c"], finished=finished, num_atoms=40, num_rows=20, num_steps=4))
    assert all(isinstance(ax, Axes) for ax in every_figure(frames))
    assert all(isinstance(table, pd.DataFrame) for table in every_table(frames))
    note = tables.overview(frames)["note"]
    assert "python -m continual.ablate" in note["atoms taken out"] or finished < 0


def test_a_run_without_routes_says_so(make_run: Any) -> None:
    frames = load(make_run(routes=False, num_rows=20, num_steps=4))
    texts = [" ".join(text.get_text() for text in ax.texts) for ax in every_figure(frames)]
    assert all("no routes" in t or "No drift" in t or "no tokens" in t or "No atom" in t for t in texts)
    notes = tables.overview(frames)["note"]
    assert all(
        "LoraConfig does not route over atoms" in notes[part] for part in ("usage and entropy", "atoms taken out")
    )
    assert all(len(table) == 0 for table in every_table(frames)[1:])


def test_a_table_cut_short_is_named_and_the_rest_drawn(frames: Frames, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(frames.runs[0].directory, tmp_path / "run"))
    path = directory / "tokens.parquet"
    path.write_bytes(path.read_bytes()[:100])
    cut = load(directory)
    assert tables.overview(cut).loc["tokens", "note"].startswith("tokens.parquet: not a readable parquet file")
    assert all(isinstance(ax, Axes) for ax in every_figure(cut))
    assert len(tables.removal(cut.ablation)) == 6


def test_one_task_alone(make_run: Any) -> None:
    frames = load(make_run(names=["a"], num_rows=20, num_steps=4))
    assert all(isinstance(ax, Axes) for ax in every_figure(frames))
    assert tables.atoms(frames.routing)["entropy"].isna().all() and tables.sharing(frames.routing).empty


def test_several_runs_are_refused(make_run: Any) -> None:
    small: dict[str, Any] = {"names": ["a", "b"], "num_rows": 20, "num_steps": 4}
    first, _ = make_run("first", **small), make_run("second", **small)
    with pytest.raises(ValueError, match="load one of first, second"):
        tables.overview(load(first.parent / "*"))


def test_atoms_of_a_growing_bank_have_their_slices_name(make_run: Any) -> None:
    directory = make_run(names=["a", "b"], num_atoms=5, num_rows=20, num_steps=4)
    state = json.loads((directory / "manifest.json").read_text())
    state["model"]["num_atoms"] = 2
    (directory / "manifest.json").write_text(json.dumps(state))
    bank = directory / "adapters" / "stage-02" / "bank.json"
    bank.parent.mkdir(parents=True)
    names = [NO_SLICE, "default:0", "default:1", "stage02:0", "stage02:1"]
    for content, expected in (
        (json.dumps({"slices": ["default", "stage02"]}), names),
        (json.dumps({"slices": ["default"]}), list("01234")),  # a folder and tables of different moments
        ("{", list("01234")),
    ):
        bank.write_text(content)
        assert list(load(directory).routing["name"].cat.categories) == expected
    bank.write_text(json.dumps({"slices": ["default", "stage02"]}))
    frames = load(directory)
    assert tables.usage(frames.routing).columns.tolist() == names
    assert tables.atoms(frames.routing).index.tolist() == names[1:]
    assert all(isinstance(ax, Axes) for ax in every_figure(frames))
